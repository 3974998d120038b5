-- Columns of attributions/<run>/candidates.parquet: exact scores of all that the retrievers proposed.
CREATE TABLE columns.candidates (
    run_id VARCHAR,
    query_id VARCHAR,
    document_id VARCHAR,
    score FLOAT,
    candidate_source VARCHAR
);
