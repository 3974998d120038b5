-- Which layers carry the newest run's support? Sums over all queries and their proponents.
SELECT
    layer,
    count(DISTINCT map) AS n_maps,
    sum(l.score) AS total_score,
    sum(l.score) / nullif(sum(sum(l.score)) OVER (), 0) AS share
FROM layers AS l
SEMI JOIN latest_run USING (run_id)
JOIN influences AS i USING (run_id, query_id, document_id)
WHERE i.side = 'proponent'
GROUP BY layer
ORDER BY layer;
