-- Which documents speak for many different queries? Hubs of the corpus, or documents with large gradients.
SELECT
    document_id,
    any_value(source) AS source,
    count(DISTINCT query_id) AS n_queries,
    avg(rank) AS mean_rank,
    sum(score) AS total_score,
    any_value(left(text, 120)) AS text
FROM answers
SEMI JOIN latest_run USING (run_id)
WHERE side = 'proponent'
GROUP BY document_id
HAVING count(DISTINCT query_id) > 1
ORDER BY n_queries DESC, total_score DESC
LIMIT 50;
