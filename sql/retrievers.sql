-- Which retriever found the documents that the exact scores rank highest: gradients, BM25, or both?
SELECT candidate_source, side, count(*) AS n_ranked, count(*) FILTER (rank <= 3) AS n_in_top_3, avg(score) AS mean_score
FROM influences
SEMI JOIN latest_run USING (run_id)
GROUP BY candidate_source, side
ORDER BY side DESC, n_ranked DESC;
