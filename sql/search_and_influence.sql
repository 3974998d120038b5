-- Documents that match $words, beside their influence in the newest run: what is about the subject, and what taught it?
SELECT
    s.document_id,
    round(s.match, 3) AS match,
    s.terms,
    count(a.query_id) AS n_queries,
    sum(a.score) AS total_score,
    min(a.rank) AS best_rank,
    arg_max(a.query_id, a.score) AS most_for_query,
    left(d.text, 120) AS text
FROM search($words) AS s
JOIN documents AS d USING (stage, document_id)
LEFT JOIN (FROM answers SEMI JOIN latest_run USING (run_id)) AS a USING (document_id)
WHERE s.stage = (SELECT attributed_stage FROM runs SEMI JOIN latest_run USING (run_id))
GROUP BY ALL
ORDER BY match DESC
LIMIT 50;
