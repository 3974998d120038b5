-- Which documents did each retriever propose, and what are they worth? The ranked documents are among them.
CREATE VIEW candidates AS
SELECT run_id, query_id, document_id, score, candidate_source
FROM stored.candidates
SEMI JOIN runs USING (run_id);
