-- The files of the corpora that each generation was built from.
CREATE TABLE generation_shards (
    generation VARCHAR,
    stage VARCHAR,
    documents VARCHAR
);
