-- From which sources does the support of the newest run come? `lift` compares with the source's share of documents.
WITH found AS (
    SELECT coalesce(source, '(none given)') AS source, count(*) AS n_ranked, sum(score) AS total_score, avg(score) AS mean_score
    FROM answers
    SEMI JOIN latest_run USING (run_id)
    WHERE side = 'proponent'
    GROUP BY ALL
), corpus AS (
    SELECT
        coalesce(d.source, '(none given)') AS source,
        count(*) AS n_documents,
        count(*) / sum(count(*)) OVER () AS share
    FROM documents AS d
    WHERE d.stage = (SELECT attributed_stage FROM runs SEMI JOIN latest_run USING (run_id))
    GROUP BY ALL
)
SELECT
    source,
    n_documents,
    n_ranked,
    total_score,
    mean_score,
    n_ranked / sum(n_ranked) OVER () / share AS lift
FROM found
LEFT JOIN corpus USING (source)
ORDER BY total_score DESC;
