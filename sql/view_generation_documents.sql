-- Which documents did a generation know, and in which version of their text?
CREATE VIEW generation_documents AS
SELECT g.generation, g.stage, d.document_id, d.fingerprint
FROM generation_shards AS g
JOIN stored.versions AS d ON regexp_extract(d.filename, 'corpus/([^/]+/[^/]+)$', 1) = g.stage || '/' || g.documents;
