-- The tokenized stages, from corpus/<stage>/manifest.json.
CREATE TABLE stages (
    stage VARCHAR PRIMARY KEY,
    n_documents BIGINT,
    n_sequences BIGINT,
    n_quarantined BIGINT,
    n_shards INTEGER,
    fingerprint VARCHAR,
    max_length INTEGER,
    bytes BIGINT
);
