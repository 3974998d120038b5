-- Under which licenses are the documents that the newest run's completions draw on?
SELECT
    coalesce(license, '(none given)') AS license,
    count(DISTINCT document_id) AS n_documents,
    count(*) AS n_ranked,
    sum(score) AS total_score,
    sum(score) / sum(sum(score)) OVER () AS share
FROM answers
SEMI JOIN latest_run USING (run_id)
WHERE side = 'proponent'
GROUP BY ALL
ORDER BY total_score DESC;
