-- Does retrieval get worse as the corpus grows over pinned factors? The gradient index's recall@10 at 2%, build by build.
-- Of a sample where 2% is less than ten sequences, it is that of ten.
WITH at_two_percent AS (
    SELECT generation, share, recall, weight
    FROM recall
    WHERE source = 'gradient' AND share >= 0.019
    QUALIFY row_number() OVER (PARTITION BY generation ORDER BY share) = 1
)
SELECT
    g.generation,
    g.created,
    g.published,
    g.n_sequences,
    r.share,
    r.recall,
    r.recall - lag(r.recall) OVER builds AS since_last_build,
    r.recall - first_value(r.recall) OVER builds AS since_these_factors,
    r.weight,
    g.recall_queries,
    g.drift
FROM generations AS g
LEFT JOIN at_two_percent AS r USING (generation)
WINDOW builds AS (PARTITION BY g.factors ORDER BY g.created, g.generation)
ORDER BY g.created DESC, g.generation;
