"""The file that gpu.sh leaves: the machine, and the tables of every run. No plots: matplotlib may be missing."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import machine, tables


def main() -> None:
    """Write OUT/results/gpu.md and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    lines = ["# Benchmarks on one accelerator", ""]
    lines += [f"- {key}: {value}" for key, value in machine.describe(options.device).items()] + [""]
    for path in sorted(options.out.glob("*/*.json")):
        lines += [table.markdown() for table in tables.load(path)]
    path = options.out / "results" / "gpu.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
