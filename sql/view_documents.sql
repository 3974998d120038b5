-- What documents is each stage trained on, from where, under what license, how long?
CREATE VIEW documents AS
SELECT
    regexp_extract(filename, 'corpus/([^/]+)/[^/]+$', 1) AS stage,
    document_id,
    text,
    source,
    metadata ->> '$.license' AS license,
    n_sequences,
    n_tokens,
    shard,
    fingerprint,
    metadata::JSON AS metadata
FROM stored.documents
WHERE regexp_extract(filename, 'corpus/([^/]+/[^/]+)$', 1) IN (SELECT stage || '/' || documents FROM shards);
