-- How large is each build of the index, and what does its retrieval find of the exactly scored best, source by source?
SELECT
    g.generation,
    g.created,
    g.published,
    g.n_sequences,
    g.index_bytes,
    g.bytes_per_sequence,
    g.seconds,
    r.source,
    r.share,
    r.taken,
    r.taken / r.sequences AS chance,
    r.recall,
    r.weight,
    r.best,
    g.recall_queries,
    g.verdict
FROM generations AS g
LEFT JOIN recall AS r USING (generation)
ORDER BY g.created DESC, r.share, r.source DESC;
