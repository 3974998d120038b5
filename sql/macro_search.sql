-- Full-text search: documents that hold words of the query, ranked by BM25 (k1 = 1.2, b = 0.75).
--   SELECT * FROM search('a question in plain words') LIMIT 10
-- Words are runs of letters and digits, in lower case; a document's length is that of its text. It scans the texts,
-- and splits only those into words that hold one of them: there is no second index to keep in step.
CREATE MACRO search(words) AS TABLE (
    WITH query AS (
        SELECT list_distinct(regexp_extract_all(lower(words), '[\p{L}\p{N}]+')) AS terms
    ), average AS (
        SELECT stage, avg(length(text)) AS length, count(*) AS n FROM documents GROUP BY stage
    ), holding AS (
        SELECT stage, document_id, length(text) AS length, lower(text) AS text, terms
        FROM documents CROSS JOIN query
        WHERE len(list_filter(terms, lambda term: contains(lower(text), term))) > 0
    ), hits AS (
        SELECT
            stage,
            document_id,
            length,
            unnest(list_filter(
                regexp_extract_all(text, '[\p{L}\p{N}]+'), lambda token: list_contains(terms, token)
            )) AS term
        FROM holding
    ), counts AS (
        SELECT stage, document_id, length, term, count(*) AS frequency FROM hits GROUP BY ALL
    ), weights AS (
        SELECT c.stage, term, ln(1 + (any_value(n) - count(*) + 0.5) / (count(*) + 0.5)) AS weight
        FROM counts AS c
        JOIN average AS a ON a.stage = c.stage
        GROUP BY c.stage, term
    )
    SELECT
        c.stage,
        c.document_id,
        sum(weight * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * c.length / a.length))) AS match,
        list(c.term ORDER BY weight DESC, c.term) AS terms
    FROM counts AS c
    JOIN weights AS w ON w.stage = c.stage AND w.term = c.term
    JOIN average AS a ON a.stage = c.stage
    GROUP BY c.stage, c.document_id
    ORDER BY match DESC, c.document_id
);
