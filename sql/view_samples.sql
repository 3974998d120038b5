-- How do random documents score on a query? The ground that percentiles are read against.
CREATE VIEW samples AS
SELECT run_id, query_id, document_id, score
FROM stored.samples
SEMI JOIN runs USING (run_id);
