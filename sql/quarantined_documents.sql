-- How many documents were set aside in each stage, for which reasons? With three examples of each.
SELECT stage, reason, count(*) AS n_documents, list(document_id ORDER BY document_id)[:3] AS examples
FROM quarantine
GROUP BY stage, reason
ORDER BY n_documents DESC;
