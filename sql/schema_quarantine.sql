-- Columns of corpus/<stage>/quarantine-*.parquet: one row per document that was set aside.
CREATE TABLE columns.quarantine (
    document_id VARCHAR,
    reason VARCHAR,
    filename VARCHAR
);
