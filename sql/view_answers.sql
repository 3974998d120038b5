-- Ranked documents of every run with the query's words and the document's own columns: one wide, plain table.
CREATE VIEW answers AS
SELECT
    i.run_id,
    i.query_id,
    q.prompt,
    q.completion,
    i.side,
    i.rank,
    i.score,
    i.percentile,
    i.document_id,
    d.source,
    d.license,
    d.n_tokens,
    i.candidate_source,
    i.duplicate_group,
    d.text,
    d.metadata
FROM influences AS i
JOIN runs AS r USING (run_id)
JOIN queries AS q USING (run_id, query_id)
LEFT JOIN documents AS d ON d.document_id = i.document_id AND d.stage = r.attributed_stage;
