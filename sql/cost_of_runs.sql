-- What did each attribution cost?
SELECT
    run_id,
    created,
    n_queries,
    n_rescored,
    seconds,
    seconds / nullif(n_queries, 0) AS seconds_per_query,
    n_queries * n_rescored / nullif(seconds, 0) AS exact_scores_per_second,
    generation
FROM runs
ORDER BY created DESC;
