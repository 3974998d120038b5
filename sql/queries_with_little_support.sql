-- Which completions have no clear basis in the attributed stage? Best document barely above random ones, or none.
WITH random AS (
    SELECT run_id, query_id, avg(score) AS mean, stddev(score) AS deviation, count(*) AS n_random
    FROM samples
    GROUP BY run_id, query_id
), best AS (
    SELECT run_id, query_id, max(score) AS best_score, arg_max(document_id, score) AS best_document
    FROM influences
    WHERE side = 'proponent'
    GROUP BY run_id, query_id
)
SELECT
    query_id,
    q.loss,
    best_document,
    best_score,
    (best_score - mean) / nullif(deviation, 0) AS deviations_above_random,
    n_random,
    q.completion
FROM queries AS q
SEMI JOIN latest_run USING (run_id)
LEFT JOIN best USING (run_id, query_id)
LEFT JOIN random USING (run_id, query_id)
ORDER BY deviations_above_random NULLS FIRST
LIMIT 20;
