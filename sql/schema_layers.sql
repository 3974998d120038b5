-- Columns of attributions/<run>/layers.parquet: the part of a score that one linear map carries.
CREATE TABLE columns.layers (
    run_id VARCHAR,
    query_id VARCHAR,
    document_id VARCHAR,
    map VARCHAR,
    score FLOAT
);
