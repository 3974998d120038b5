-- Which near-duplicates stand together in a ranking of the newest run? Influence that repeated text shares.
SELECT
    query_id,
    duplicate_group,
    count(*) AS n_documents,
    sum(score) AS total_score,
    list(document_id ORDER BY abs(score) DESC) AS document_ids
FROM influences
SEMI JOIN latest_run USING (run_id)
GROUP BY query_id, duplicate_group
HAVING count(*) > 1
ORDER BY n_documents DESC, query_id;
