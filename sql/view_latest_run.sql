-- Which attribution is the newest? The ready queries look at that one.
CREATE VIEW latest_run AS
SELECT run_id
FROM runs
ORDER BY created DESC, run_id DESC
LIMIT 1;
