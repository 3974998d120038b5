"""Prefect flows: each file reads from top to bottom as the story of one job."""

import os


def silence_telemetry() -> None:
    """Turn Prefect's telemetry off for this process and its children, unless the user has set it.

    Prefect reads some of it when it is imported, so this comes first.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
