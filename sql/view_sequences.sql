-- Into what windows was a document cut, and how many tokens of each carry a loss?
CREATE VIEW sequences AS
SELECT
    regexp_extract(filename, 'corpus/([^/]+)/[^/]+$', 1) AS stage,
    sequence_id,
    document_id,
    "window",
    len(input_ids) AS n_tokens,
    len(list_filter(labels, lambda label: label <> -100)) AS n_targets,
    fingerprint
FROM stored.sequences
WHERE regexp_extract(filename, 'corpus/([^/]+/[^/]+)$', 1) IN (SELECT stage || '/' || sequences FROM shards);
