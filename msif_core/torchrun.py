"""Steps of a sharded model, from the process that asks for them: the ranks of torchrun, kept from step to step.

To start them and to read a large checkpoint takes longer than many a step, so one group of ranks serves a process as
long as it asks for steps of one configuration. The group ends with that process: rank 0 reads its requests from there.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from msif_core import models, storage
from msif_core.config import Config
from msif_core.errors import InputError

STEPS = {"covariance_part", "eigenvalue_part", "train_index", "index_shard", "exact_shard", "publish_generation"}
"""Steps whose every pass is shared."""

ANSWER, MISTAKE, LOG = "answer.json", "mistake.json", "log.txt"
"""Files in a group's folder: what a step returned, what is wrong with the input, what the ranks print."""
POLL = 0.02
STOP_TIMEOUT = 60.0


def run_step(config: Config, step: str, *arguments: str | int, wait: bool = True) -> Any:
    """Run a step in `compute.ranks` processes of this machine; returns the path or paths that it returned.

    Raises:
        InputError: what a rank says of the input.
        RuntimeError: a rank failed; ends with its last lines.
        BusyError: not to `wait`, and another process is at it.
    """
    if step not in STEPS:
        raise InputError(f"{step}: not a step that sharded models run; those are {sorted(STEPS)}")
    with _LOCK:
        found = _group(config).run({"step": step, "arguments": list(arguments), "wait": wait})
    if found == "busy":
        raise storage.BusyError(step)
    return [Path(path) for path in found] if isinstance(found, list) else Path(found)


class Group:
    """The ranks of torchrun that serve one configuration, of models as they are now."""

    def __init__(self, config: Config) -> None:
        self.serves = _content(config)
        self._temporary = tempfile.TemporaryDirectory(prefix="msif-")
        self._folder = Path(self._temporary.name)
        storage.write_json(self._folder / "config.json", config.model_dump(mode="json"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={config.compute.ranks}", "-m", "msif_core.sharded", str(self._folder)]
        with open(self._folder / LOG, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, request: dict[str, Any]) -> Any:
        """What the step returned; whatever goes wrong, here too, ends the group."""
        answer, asked = self._folder / ANSWER, self._process.stdin
        assert asked is not None
        try:
            asked.write(json.dumps(request).encode() + b"\n")
            asked.flush()
            while not answer.exists():
                if self._process.poll() is not None:
                    raise self._failure()
                time.sleep(POLL)
            found = storage.read_json(answer)
            answer.unlink()
        except BrokenPipeError:
            self._process.wait()
            raise self._failure() from None
        except BaseException:
            self.stop(signal.SIGTERM)
            raise
        return found

    def _failure(self) -> Exception:
        mistake = self._folder / MISTAKE
        if mistake.exists():
            return InputError(storage.read_json(mistake))
        lines = (self._folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        return RuntimeError(f"torchrun ended with {self._process.returncode}:\n" + "\n".join(lines[-80:]))

    @property
    def running(self) -> bool:
        """Whether it takes another request."""
        return self._process.poll() is None

    def stop(self, force: signal.Signals | None = None) -> None:
        """Let the ranks end; `force` ends them in the middle of a step."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if force is not None and self.running:
            os.killpg(self._process.pid, force)
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._temporary.cleanup()


_LOCK = Lock()
_groups: list[Group] = []


def _content(config: Config) -> tuple[Config, list[str]]:
    """What a group holds: the settings, and the weights that it has loaded."""
    return config, [models.model_fingerprint(stage.model, revision=stage.revision) for stage in config.stages]


def _group(config: Config) -> Group:
    """The group of that configuration and its models; another one's is stopped first."""
    if _groups and (_groups[0].serves != _content(config) or not _groups[0].running):
        stop()
    if not _groups:
        _groups.append(Group(config))
    return _groups[0]


@atexit.register
def stop() -> None:
    """End the ranks that this process keeps."""
    while _groups:
        _groups.pop().stop()
