"""Prefect flows: each file reads from top to bottom as the story of one job."""

import os


def prefect_defaults() -> None:
    """Settings of Prefect for this process and its children, where the user has set none.

    Telemetry is off, and a run sends heartbeats, so that a killed one is found out. Prefect reads some of it when it
    is imported, so this comes first.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
