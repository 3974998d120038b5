-- What changed between two generations? $before and $after name them; without names: the published one and its parent.
-- No rows where there is no such generation (the first has no parent; one that was pruned is gone).
WITH pair AS (
    SELECT a.generation AS after_id, b.generation AS before_id
    FROM generations AS a
    JOIN generations AS b ON b.generation = coalesce($before, a.parent)
    WHERE CASE WHEN $after IS NULL THEN a.published ELSE a.generation = $after END
), before AS (
    SELECT d.* FROM generation_documents AS d JOIN pair ON d.generation = before_id
), after AS (
    SELECT d.* FROM generation_documents AS d JOIN pair ON d.generation = after_id
)
SELECT
    stage,
    CASE
        WHEN before.document_id IS NULL THEN 'added'
        WHEN after.document_id IS NULL THEN 'removed'
        ELSE 'changed'
    END AS change,
    document_id,
    left(text, 120) AS text_now,
    before_id AS before,
    after_id AS after
FROM before
FULL JOIN after USING (stage, document_id)
CROSS JOIN pair
LEFT JOIN documents USING (stage, document_id)
WHERE before.fingerprint IS DISTINCT FROM after.fingerprint
ORDER BY stage, change, document_id;
