-- Columns of corpus/<stage>/documents-*.parquet: one row per document that was tokenized.
CREATE TABLE columns.documents (
    document_id VARCHAR,
    text VARCHAR,
    source VARCHAR,
    metadata VARCHAR,
    n_sequences INTEGER,
    n_tokens BIGINT,
    shard INTEGER,
    fingerprint VARCHAR,
    filename VARCHAR
);
