"""Prefect flows: each file reads from top to bottom as the story of one job."""

import os

from flows.proxies import spare_loopback

PREFECT_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
}
"""Telemetry is off, and a run sends heartbeats, so that a killed one is found out. A local server records task runs
in batches: one write for each, beside the next task's request for a place at the accelerator, is refused by SQLite
as often as not, and the client asks again after two seconds. Who finds no place asks again after one second, not
thirty."""


def prefect_defaults() -> None:
    """Settings of Prefect for this process and its children, where the user has set none; no proxy for this machine.

    Prefect reads some of it when it is imported, so this comes first.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    spare_loopback()
