-- The fitted EK-FAC factors, from factors/<fingerprint>/; `stage` is empty where no stage uses them now.
CREATE TABLE factors (
    fingerprint VARCHAR PRIMARY KEY,
    stage VARCHAR,
    n_sequences BIGINT,
    mean_targets DOUBLE,
    n_maps INTEGER,
    bytes BIGINT,
    maps JSON
);
