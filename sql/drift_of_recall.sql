-- Does retrieval get worse as the corpus grows over pinned factors? Recall@10 at 2% re-scored, build by build.
SELECT
    g.generation,
    g.created,
    g.published,
    g.n_sequences,
    r.recall,
    r.recall - lag(r.recall) OVER builds AS since_last_build,
    r.recall - first_value(r.recall) OVER builds AS since_these_factors,
    g.recall_queries,
    g.drift
FROM generations AS g
LEFT JOIN recall AS r ON r.generation = g.generation AND r.k = 10 AND r.share = 0.02
WINDOW builds AS (PARTITION BY g.factors ORDER BY g.created, g.generation)
ORDER BY g.created DESC, g.generation;
