-- How does a score split over layers and linear maps? The rows of one document sum to its best sequence's score.
CREATE VIEW layers AS
SELECT
    run_id,
    query_id,
    document_id,
    map,
    try_cast(regexp_extract(map, '\.(\d+)\.', 1) AS INTEGER) AS layer,
    score
FROM stored.layers
SEMI JOIN runs USING (run_id);
