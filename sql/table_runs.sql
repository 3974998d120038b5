-- Stored attributions, from attributions/<run>/manifest.json; `levels` is the damping of each map, stage and block.
CREATE TABLE runs (
    run_id VARCHAR PRIMARY KEY,
    created TIMESTAMPTZ,
    generation VARCHAR,
    attributed_stage VARCHAR,
    n_queries BIGINT,
    n_rescored BIGINT,
    seconds DOUBLE,
    factors JSON,
    levels JSON,
    settings JSON
);
