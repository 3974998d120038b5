-- Columns of corpus/<stage>/shard-*.parquet: one row per window of tokens.
CREATE TABLE columns.sequences (
    sequence_id BIGINT,
    document_id VARCHAR,
    "window" INTEGER,
    input_ids INTEGER[],
    labels INTEGER[],
    fingerprint VARCHAR,
    filename VARCHAR
);
