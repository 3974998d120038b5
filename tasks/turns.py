"""Turns at the accelerator: an answer goes before the next shard of a build.

The limit on the tag `accelerator` admits whoever asks first once a place is free. A build asks again within
milliseconds, an answer that was turned away within seconds, so that it would wait for the last of hundreds of shards.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager

from msif_core import storage
from msif_core.config import Config


@contextmanager
def ahead(config: Config) -> Iterator[None]:
    """Until the end, builds in this workspace begin no shard; several may be ahead together."""
    with _flock(config, fcntl.LOCK_SH):
        yield


def give_way(config: Config) -> None:
    """Wait for those who are ahead, unless there are places for more than one."""
    if config.compute.workers == 1:
        with _flock(config, fcntl.LOCK_EX):
            pass


@contextmanager
def _flock(config: Config, kind: int) -> Iterator[None]:
    """The workspace's file of turns, locked; the system frees it when its holder dies."""
    path = config.workspace / "turns"
    storage.make_folder(path.parent)
    with storage.told(path.parent):
        path.touch()
    with open(path, "ab") as handle:
        fcntl.flock(handle, kind)
        yield
