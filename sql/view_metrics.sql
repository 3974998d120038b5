-- How does each method fare against retraining? lds, mrr, recall_at_10, tail_patch, left_out; error is the standard error.
CREATE VIEW metrics AS
SELECT * FROM stored.metrics;
