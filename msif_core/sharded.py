"""A model larger than one accelerator: its weights sharded (FSDP) over the ranks of torchrun.

Rank 0 runs a step of the pipeline as ever. The passes inside that step (sums, sketches, gradients, scores) are replaced
by ones that all ranks take part in: rank 0 tells the others what to run, each takes its share of the sequences, and the
sums are added, or the rows gathered, on rank 0. It alone writes files. Sums add in another order than in one process:
equal within float32's precision, not in bits.

    torchrun --nproc-per-node N -m msif_core.sharded FOLDER        # started by msif_core/torchrun.py, with requests
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from msif_core import low_rank, messages, models, scoring, storage
from msif_core.batching import IGNORED, Sequences
from msif_core.config import Config
from msif_core.curvature import fit
from msif_core.errors import InputError
from msif_core.pipeline import Pipeline
from msif_core.sketch import Sketcher
from msif_core.torchrun import ANSWER, MISTAKE

Pass = Callable[..., Any]
IDLE = timedelta(days=30)
"""How long ranks wait for rank 0 to begin another pass. One that dies ends the others at once all the same."""


def share(sequences: Sequences, rank: int, ranks: int) -> tuple[Sequences, list[int]]:
    """A rank's part of the sequences, and their rows; every rank's part has the same number and the same lengths.

    Sequences are dealt in order of length. Shorter ones of a deal are lengthened by tokens without a label, which
    come after the last target and so change nothing in a causal model; a rank that is left without one gets a
    sequence without targets, whose row is -1. So all ranks cut the same batches, as FSDP needs.
    """
    lengths = [len(ids) for ids in sequences.input_ids]
    order = sorted(range(len(sequences)), key=lambda row: -lengths[row])
    part = Sequences([], [], [], [], np.zeros(0, dtype=np.int64))
    rows: list[int] = []
    for first in range(0, len(order), ranks):
        deal = order[first : first + ranks]
        width, row = lengths[deal[0]], deal[rank] if rank < len(deal) else -1
        ids = sequences.input_ids[row] if row >= 0 else np.zeros(width, np.int32)
        labels = sequences.labels[row] if row >= 0 else np.full(width, IGNORED, np.int32)
        part.input_ids.append(np.pad(ids, (0, width - len(ids))))
        part.labels.append(np.pad(labels, (0, width - len(labels)), constant_values=IGNORED))
        part.fingerprints.append(sequences.fingerprints[row] if row >= 0 else "0" * 16)
        part.document_ids.append(sequences.document_ids[row] if row >= 0 else "")
        rows.append(row)
    return part, rows


def _added(run: Pass, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Sums by name, added over the ranks."""
    arguments, _ = _shared(arguments)
    sums = run(*arguments, **keywords)
    for name in sorted(sums):
        sums[name] = sums[name].contiguous()
        dist.all_reduce(sums[name])
    return sums


def _measured(run: Pass, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Gradients of weighted sums of sequences by map, added over the ranks."""
    count = len(next(a for a in arguments if isinstance(a, Sequences)))
    terms = keywords.get("measurements") or [{row: 1.0} for row in range(count)]
    arguments, rows = _shared(arguments)
    at = {row: i for i, row in enumerate(rows) if row >= 0}
    mine = [{at[row]: weight for row, weight in term.items() if row in at} for term in terms]
    mine[0].setdefault(0, 0.0)  # a rank without a term takes part too
    found = run(*arguments, **{**keywords, "measurements": mine})
    for name in sorted(found):
        dist.all_reduce(found[name])
    return found


def _gathered(axis: int) -> Callable[[Pass, tuple[Any, ...], dict[str, Any]], Any]:
    """Rows of an array, put in the order of the sequences on rank 0."""

    def gather(run: Pass, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        count = len(next(a for a in arguments if isinstance(a, Sequences)))
        arguments, rows = _shared(arguments)
        found = run(*arguments, **keywords)
        everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((rows, found), everyone)
        if everyone is None:
            return None
        return _put(everyone, axis, count)

    return gather


def _put(parts: list[tuple[list[int], Any]], axis: int, count: int) -> np.ndarray:
    rows = np.concatenate([r for r, _ in parts]).astype(np.int64)
    joined = np.concatenate([f for _, f in parts], axis=axis)
    order = np.argsort(rows, kind="stable")[(rows < 0).sum() :]
    assert len(order) == count, "every sequence has one row"
    return np.ascontiguousarray(np.take(joined, order, axis=axis))


def _shared(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int]]:
    """The arguments with the sequences replaced by this rank's share, and the share's rows."""
    at = next(i for i, argument in enumerate(arguments) if isinstance(argument, Sequences))
    part, rows = share(arguments[at], dist.get_rank(), dist.get_world_size())
    return (*arguments[:at], part, *arguments[at + 1 :]), rows


PASSES: dict[str, tuple[Any, Callable[[Pass, tuple[Any, ...], dict[str, Any]], Any]]] = {
    "covariance_sums": (fit, _added),
    "eigenvalue_sums": (fit, _added),
    "finite_sequences": (fit, _gathered(0)),
    "query_gradients": (scoring, _measured),
    "score_sequences": (scoring, _gathered(1)),
    "score_low_rank": (low_rank, _gathered(1)),
    "documents": (Sketcher, _gathered(0)),
}
"""The passes, where each lives, and how its results come together."""


class Ranks:
    """The passes of this process, shared with the other ranks."""

    def __init__(self) -> None:
        self._load = models.load_model
        self._loaded: dict[Any, Any] = {}
        self._passes = {name: getattr(home, name) for name, (home, _) in PASSES.items()}
        models.load_model = self.load
        if dist.get_rank() == 0:
            for name, (home, _) in PASSES.items():
                self._replace(home, name, self._leading(name))

    def _replace(self, home: Any, name: str, run: Pass) -> None:
        """Put the leading pass where the pass lives, and where a module has imported it by name."""
        modules = [module for key, module in sys.modules.items() if key.startswith("msif_core.")]
        for place in [home, *modules]:
            if getattr(place, name, None) is self._passes[name]:
                setattr(place, name, run)

    def load(self, *arguments: Any, **keywords: Any) -> Any:
        """`models.load_model`, with the layers' weights sharded over the ranks.

        It is read on the CPU; `fully_shard` moves one layer after the other, so that no device ever holds it whole.

        Raises:
            InputError: the model is not a causal language model.
        """
        key = (arguments, tuple(sorted(keywords.items())))
        if key not in self._loaded:
            model = self._load(*arguments, **{**keywords, "device": "cpu"})
            if not hasattr(model, "get_output_embeddings") or keywords.get("task", "causal_lm") != "causal_lm":
                raise InputError("compute.ranks above 1 takes causal language models only")
            for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
                fully_shard(layer)
            self._loaded[key] = fully_shard(model)
        return self._loaded[key]

    def _leading(self, name: str) -> Pass:
        def run(*arguments: Any, **keywords: Any) -> Any:
            keys = {id(model): key for key, model in self._loaded.items()}
            sent = [_Model(keys[id(a)]) if id(a) in keys else a for a in arguments]
            messages.tell((name, sent, keywords))
            return self._run(name, arguments, keywords)

        return run

    def _run(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        try:
            return PASSES[name][1](self._passes[name], arguments, keywords)
        except fit.NonFiniteError as error:  # no other rank knows: a step that set it aside and went on would hang
            raise InputError(str(error)) from error
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # between steps others use the accelerator

    def follow(self) -> None:
        """Take part in what rank 0 runs, until it has no more."""
        while True:
            told = messages.hear()
            if told is None:
                return
            name, arguments, keywords = told
            given = [self.load(*a.key[0], **dict(a.key[1])) if isinstance(a, _Model) else a for a in arguments]
            self._run(name, tuple(given), keywords)

    def dismiss(self) -> None:
        """Let the other ranks end."""
        messages.tell(None)


class _Model:
    """Stands for a model in what is sent to the other ranks: each has its own part of the weights."""

    def __init__(self, key: Any) -> None:
        self.key = key


def main() -> None:
    """One rank of torchrun."""
    folder = Path(sys.argv[1])
    try:
        serve(Config.model_validate(storage.read_json(folder / "config.json")), folder)
    except InputError as error:
        storage.write_json(folder / MISTAKE, str(error))
        raise


def serve(config: Config, folder: Path) -> None:
    """Run the steps that are asked for on rank 0, which writes what they return, and follow it on the others."""
    cuda = torch.cuda.is_available() and config.compute.device != "cpu"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=IDLE)
    ranks = Ranks()
    if dist.get_rank() == 0:
        for line in sys.stdin:
            storage.write_json(folder / ANSWER, answered(config, json.loads(line)))
        ranks.dismiss()
        shutil.rmtree(folder, ignore_errors=True)  # whoever made it may have been killed
    else:
        ranks.follow()
    dist.destroy_process_group()


def answered(config: Config, request: dict[str, Any]) -> Any:
    """The path or paths that the step returns, or "busy"."""
    try:
        with nullcontext() if request["wait"] else storage.passing_by():
            found = getattr(Pipeline(config), request["step"])(*request["arguments"])
    except storage.BusyError:
        return "busy"
    return [str(path) for path in found] if isinstance(found, list) else str(found)


if __name__ == "__main__":
    main()
