-- How large is each build of the index, and how much of the exact top ten does its retrieval find?
SELECT
    g.generation,
    g.created,
    g.published,
    g.n_sequences,
    g.index_bytes,
    g.bytes_per_sequence,
    g.seconds,
    r.share AS share_of_sequences_rescored,
    r.recall,
    g.recall_queries
FROM generations AS g
LEFT JOIN recall AS r USING (generation)
ORDER BY g.created DESC, r.share;
