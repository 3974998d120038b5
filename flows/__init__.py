"""Prefect flows: each file reads from top to bottom as the story of one job."""
