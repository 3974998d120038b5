-- Which documents move a query's loss? score > 0: training more on it lowers the loss (a proponent).
CREATE VIEW influences AS
SELECT
    run_id, query_id, document_id, sequence_id, rank, score, best_score, percentile, side,
    candidate_source, duplicate_group, n_random
FROM stored.influences
SEMI JOIN runs USING (run_id);
