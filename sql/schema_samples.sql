-- Columns of attributions/<run>/samples.parquet: exact scores of random documents, behind the percentiles.
CREATE TABLE columns.samples (
    run_id VARCHAR,
    query_id VARCHAR,
    document_id VARCHAR,
    score FLOAT
);
