-- What takes the space of this workspace?
SELECT 'corpus' AS what, stage AS name, bytes FROM stages
UNION ALL
SELECT 'factors', coalesce(stage, fingerprint), bytes FROM factors
UNION ALL
SELECT 'index', generation, index_bytes FROM generations
ORDER BY bytes DESC;
