-- What the sources of candidates find of the exactly scored best, by generation, source and share; errors are standard errors.
-- share: what each source is asked for, of all sequences; taken: how many are scored exactly for it, in the mean over queries;
-- recall: of the exact top ten; weight: of the influence that stands out; best: queries whose exact best sequence is found.
CREATE TABLE recall (
    generation VARCHAR,
    source VARCHAR,
    share DOUBLE,
    taken DOUBLE,
    sequences BIGINT,
    recall DOUBLE,
    recall_error DOUBLE,
    weight DOUBLE,
    weight_error DOUBLE,
    best DOUBLE,
    best_error DOUBLE
);
