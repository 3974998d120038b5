-- What did each retraining on a subset of the documents do to each query's loss, and how long did it take?
CREATE VIEW retrained_losses AS
SELECT * FROM stored.retrained_losses;
