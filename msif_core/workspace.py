"""Where everything that is built lies below the workspace folder."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from msif_core import storage
from msif_core.errors import InputError


def check_name(folder: Path) -> Path:
    """The folder, unless the catalog could not name its files.

    Raises:
        ValueError: there is a backslash in its path.
    """
    if "\\" in str(folder.absolute()):
        raise ValueError("DuckDB takes a backslash in a path for a slash; name a folder without one")
    return folder


@dataclass(frozen=True)
class Workspace:
    """Paths of the workspace `root`; makes no folder and opens no file but the CURRENT pointer."""

    root: Path

    def corpus(self, stage: str) -> Path:
        """Token sequences of a stage, in shards."""
        return self.root / "corpus" / stage

    def factors(self, fingerprint: str) -> Path:
        """EK-FAC factors with that address."""
        return self.root / "factors" / fingerprint

    @property
    def generations(self) -> Path:
        """Builds of the index."""
        return self.root / "generations"

    def rolled_back(self, content: str) -> Path:
        """A file that stands while rebuilds are not to publish that content: it was rolled back."""
        return self.root / "rolled-back" / content

    @property
    def attributions(self) -> Path:
        """Stored answers, one folder a run."""
        return self.root / "attributions"

    @property
    def evaluations(self) -> Path:
        """Tables of `msif evaluate` and of the demo."""
        return self.root / "evaluations"

    def published(self) -> str | None:
        """Id of the published generation, None before the first publish."""
        pointer = self.generations / "CURRENT"
        return pointer.read_text().strip() if pointer.exists() else None

    def publish(self, generation: str) -> None:
        """Move the pointer to `generation`: one atomic step.

        The manifest of the one before is marked with the time: `prune` spares what queries may still be reading.
        """
        if not (self.generations / generation / "manifest.json").exists():
            raise InputError(f"generation {generation} is not complete in {self.generations}")
        before = self.published()
        if before == generation:
            return
        if before is not None and (self.generations / before / "manifest.json").exists():
            os.utime(self.generations / before / "manifest.json")
        storage.write_text(self.generations / "CURRENT", generation + "\n")

    def current_generation(self) -> Path:
        """Folder of the published generation.

        Raises:
            InputError: nothing is published yet, or what was is gone.
        """
        name = self.published()
        if name is None:
            raise InputError(f"{self.root}: no index is published yet; run `msif run CONFIG` first")
        folder = self.generations / name
        if not (folder / "manifest.json").exists():
            raise InputError(f"{folder}: the published generation is gone; `msif run CONFIG` builds it again")
        return folder

    def new_run(self) -> str:
        """A sortable, unique name for an attribution."""
        return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
