-- Which tokens of a document (or of the query) carry a score?
CREATE VIEW tokens AS
SELECT run_id, query_id, document_id, position, token, score, side
FROM stored.tokens
SEMI JOIN runs USING (run_id);
