-- Columns of evaluations/retraining/<key>/metrics.parquet: one number of one method, held against retraining.
CREATE TABLE columns.metrics (
    ground_truth VARCHAR,
    method VARCHAR,
    metric VARCHAR,
    stage VARCHAR,
    queries VARCHAR,
    n_queries INTEGER,
    value DOUBLE,
    error DOUBLE
);
