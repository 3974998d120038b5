-- Which queries were explained, and what is their loss (negative log-likelihood) under the last stage?
CREATE VIEW queries AS
SELECT run_id, query_id, prompt, completion, loss, metadata::JSON AS metadata
FROM stored.queries
SEMI JOIN runs USING (run_id);
