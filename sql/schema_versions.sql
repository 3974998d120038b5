-- Columns of corpus/<stage>/documents-*.parquet in all versions that are kept, not the current one alone.
CREATE TABLE columns.versions (
    document_id VARCHAR,
    fingerprint VARCHAR,
    filename VARCHAR
);
