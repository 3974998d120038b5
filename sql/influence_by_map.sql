-- Which linear maps carry the newest run's support?
SELECT map, sum(l.score) AS total_score, avg(l.score) AS mean_score
FROM layers AS l
SEMI JOIN latest_run USING (run_id)
JOIN influences AS i USING (run_id, query_id, document_id)
WHERE i.side = 'proponent'
GROUP BY map
ORDER BY total_score DESC;
