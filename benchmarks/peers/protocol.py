"""How the driver talks to one side of the comparison: a process that runs the step named on each line it reads.

Imported in every environment: numpy and torch alone. A case is a folder with `model/`, `train.npy` and `query.npy`
(token ids), and `settings.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import peak_bytes, reset_peak

REPLY = "@reply "
Step = Callable[[], np.ndarray | None]


@dataclass(frozen=True)
class Case:
    """The model, data and settings that every side reads."""

    folder: Path

    @property
    def model(self) -> str:
        """Folder of the checkpoint."""
        return str(self.folder / "model")

    def tokens(self, name: str) -> np.ndarray:
        """Token ids [N, T] of `train` or `query`."""
        return np.load(self.folder / f"{name}.npy")

    @property
    def settings(self) -> dict[str, Any]:
        """batch: sequences of a batch. damping: of the mean eigenvalue. threads. device."""
        return dict(json.loads((self.folder / "settings.json").read_text()))

    def scratch(self, side: str) -> Path:
        """A side's own folder."""
        path = self.folder / side
        path.mkdir(exist_ok=True)
        return path


def serve(prepare: Callable[[Case], Mapping[str, Step]]) -> None:
    """Run steps as their names come in; each reply has seconds, the step's peak bytes, and where a matrix lies."""
    case = Case(Path(sys.argv[1]))
    torch.set_num_threads(case.settings["threads"])
    device = case.settings["device"]
    steps = prepare(case)
    _reply(steps=list(steps))
    for line in sys.stdin:
        name = line.strip()
        reset_peak(device)
        start = time.perf_counter()
        matrix = steps[name]()
        if device != "cpu":
            torch.cuda.synchronize()
        took = time.perf_counter() - start
        path = case.folder / f"{Path(sys.argv[0]).stem}-{name.replace(' ', '-')}.npy"
        if matrix is not None:
            np.save(path, matrix)
        _reply(seconds=took, peak=peak_bytes(device), matrix=str(path) if matrix is not None else None)


def _reply(**values: Any) -> None:
    print(REPLY + json.dumps(values), flush=True)


class Side:
    """One side's process, seen from the driver."""

    def __init__(self, python: Path, module: str, case: Case) -> None:
        self.name = module.rpartition(".")[2]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["OMP_NUM_THREADS"] = str(case.settings["threads"])
        self._log = open(case.folder / f"{self.name}.log", "w", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(python), "-m", module, str(case.folder.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        self.steps: list[str] = []

    def load(self) -> None:
        """Wait until the process has loaded all that it needs, and learn its steps.

        Raises:
            RuntimeError: it ended instead.
        """
        self.steps = self._answer()["steps"]

    def run(self, step: str) -> dict[str, Any]:
        """Run a step.

        Raises:
            RuntimeError: the process ended; its log has the reason.
        """
        assert self._process.stdin is not None
        print(step, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(REPLY):
                return dict(json.loads(line.removeprefix(REPLY)))
            self._log.write(line)
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}; see {self._log.name}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()
