-- Measured recall of each generation: the part of the exact top k found in that share of the sequences.
CREATE TABLE recall (
    generation VARCHAR,
    k INTEGER,
    share DOUBLE,
    recall DOUBLE
);
