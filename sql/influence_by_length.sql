-- Do long documents win only because they are long? Score, and score per token, by length class (powers of two).
SELECT
    2 ** floor(log2(greatest(n_tokens, 1))) AS from_tokens,
    count(*) AS n_ranked,
    avg(score) AS mean_score,
    avg(score / n_tokens) AS mean_score_per_token,
    avg(percentile) AS mean_percentile
FROM answers
SEMI JOIN latest_run USING (run_id)
WHERE side = 'proponent' AND n_tokens > 0
GROUP BY from_tokens
ORDER BY from_tokens;
