"""What was read of a checkpoint is kept in the process, as long as its files stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import Concatenate, ParamSpec, TypeVar

Options = ParamSpec("Options")
Found = TypeVar("Found")

READ = {".safetensors", ".json", ".model", ".txt"}
"""Suffixes of a checkpoint's files that are read: weights, configuration, tokenizer."""


def while_files_stay(
    count: int,
) -> Callable[[Callable[Concatenate[str, Options], Found]], Callable[Concatenate[str, Options], Found]]:
    """Keep `count` results of a function of a checkpoint (a folder or a hub id) and options.

    A result is let go before it is replaced: a model may be as large as its device.
    """

    def keeping(read: Callable[Concatenate[str, Options], Found]) -> Callable[Concatenate[str, Options], Found]:
        kept: dict[object, tuple[object, Found]] = {}
        alone = RLock()  # an adapter's tokenizer is its base model's: one call within the other

        @wraps(read)
        def found(source: str, /, *options: Options.args, **named: Options.kwargs) -> Found:
            key, state = (source, options, tuple(sorted(named.items()))), files_state(source)
            with alone:
                if key in kept and kept[key][0] != state:
                    del kept[key]
                if key not in kept:
                    for oldest in list(kept)[: len(kept) + 1 - count]:
                        del kept[oldest]
                    kept[key] = (state, read(source, *options, **named))
                return kept[key][1]

        return found

    return keeping


def files_state(source: str) -> list[tuple[str, int, int]]:
    """Name, time and size of the files of a local checkpoint, an adapter's base model among them; none of a hub id."""
    found = [(path, path.stat()) for path in sorted(Path(source).glob("*")) if path.suffix in READ]
    state = [(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found]
    adapter = Path(source, "adapter_config.json")
    if adapter.exists():
        state += files_state(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    return state
