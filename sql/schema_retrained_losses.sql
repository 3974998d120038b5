-- Columns of evaluations/retraining/<key>/losses-*.parquet: a query's loss after a stage of one retraining.
CREATE TABLE columns.retrained_losses (
    ground_truth VARCHAR,
    run VARCHAR,
    kind VARCHAR,
    subset INTEGER,
    seed INTEGER,
    stage VARCHAR,
    query_id VARCHAR,
    loss DOUBLE,
    targets INTEGER,
    n_documents INTEGER,
    steps INTEGER,
    seconds DOUBLE
);
