-- Columns of attributions/<run>/tokens.parquet: the part of a score that one token carries.
CREATE TABLE columns.tokens (
    run_id VARCHAR,
    query_id VARCHAR,
    document_id VARCHAR,
    position INTEGER,
    token VARCHAR,
    score FLOAT,
    side VARCHAR
);
