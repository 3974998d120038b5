-- Which queries were explained, and what is their loss (negative log-likelihood) under the last stage? A completion
-- may be the model's own (generated); the loss of a contrast is a difference, that of a set its members' mean.
CREATE VIEW queries AS
SELECT run_id, query_id, prompt, completion, loss, metadata::JSON AS metadata, generated, contrast, members
FROM stored.queries
SEMI JOIN runs USING (run_id);
