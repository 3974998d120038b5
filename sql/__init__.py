"""SQL of the catalog: schema_*.sql (stored columns), view_*.sql, and ready queries; one statement a file."""
