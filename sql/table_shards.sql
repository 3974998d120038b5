-- The files of each stage's current corpus, from its manifest; a rebuild may leave older files beside them.
CREATE TABLE shards (
    stage VARCHAR,
    shard INTEGER,
    sequences VARCHAR,
    documents VARCHAR,
    n_sequences BIGINT,
    n_documents BIGINT,
    n_quarantined BIGINT
);
