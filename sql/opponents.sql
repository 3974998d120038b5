-- Which documents of the newest run speak against a completion? More training on them would raise its loss.
SELECT query_id, rank, round(score, 4) AS score, round(percentile, 1) AS percentile, document_id, source, text
FROM answers
SEMI JOIN latest_run USING (run_id)
WHERE side = 'opponent'
ORDER BY query_id, rank;
