-- Columns of attributions/<run>/queries.parquet: one row per query that was explained.
CREATE TABLE columns.queries (
    run_id VARCHAR,
    query_id VARCHAR,
    prompt VARCHAR,
    completion VARCHAR,
    loss FLOAT,
    metadata VARCHAR,
    generated BOOLEAN,
    contrast VARCHAR,
    members VARCHAR[]
);
