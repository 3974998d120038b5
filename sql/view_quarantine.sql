-- Which documents were set aside, and why?
CREATE VIEW quarantine AS
SELECT
    regexp_extract(filename, 'corpus/([^/]+)/[^/]+$', 1) AS stage,
    document_id,
    reason
FROM stored.quarantine;
