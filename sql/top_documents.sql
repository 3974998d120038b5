-- Which documents of the newest run speak most for each query's completion? The first ten of each query.
SELECT query_id, rank, round(score, 4) AS score, round(percentile, 1) AS percentile, document_id, source, text
FROM answers
SEMI JOIN latest_run USING (run_id)
WHERE side = 'proponent' AND rank <= 10
ORDER BY query_id, rank;
