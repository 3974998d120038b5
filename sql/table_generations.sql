-- Complete builds of the index, from generations/<id>/manifest.json.
CREATE TABLE generations (
    generation VARCHAR PRIMARY KEY,
    created TIMESTAMPTZ,
    published BOOLEAN,
    parent VARCHAR,
    corpus VARCHAR,
    n_sequences BIGINT,
    index_bytes BIGINT,
    bytes_per_sequence DOUBLE,
    seconds DOUBLE,
    recall_queries BIGINT,
    recall_sequences BIGINT,
    estimate JSON,
    verdict VARCHAR,
    changes JSON,
    drift JSON,
    factors JSON,
    settings JSON
);
