-- Columns of attributions/<run>/influences.parquet: one row per query and ranked document.
CREATE TABLE columns.influences (
    run_id VARCHAR,
    query_id VARCHAR,
    document_id VARCHAR,
    sequence_id BIGINT,
    rank INTEGER,
    score FLOAT,
    best_score FLOAT,
    percentile FLOAT,
    side VARCHAR,
    candidate_source VARCHAR,
    duplicate_group INTEGER,
    n_random INTEGER
);
