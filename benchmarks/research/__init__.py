"""One-off studies behind the reports in docs: each module says what it finds out and what it takes."""
