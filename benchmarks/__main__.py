"""The whole set in one go: `python -m benchmarks [--quick] [--out runs/bench]`.

Each section runs as its own process, so that one that fails or runs out of memory leaves the others' results; the
file results/benchmarks.md and its plots are written anew after each. Peers need environments of their own
(benchmarks/peers/install.sh); one without is left out and named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine, plots, tables

SECTIONS = {
    "floor": "benchmarks.floor", "peers": "benchmarks.peers", "search": "benchmarks.search",
    "endtoend": "benchmarks.endtoend", "plan": "benchmarks.plan", "workers": "benchmarks.workers",
}  # fmt: skip
LIMIT = {False: 900.0, True: 300.0}
"""Seconds that a section may take, full and quick."""


def run_section(module: str, out: Path, quick: bool) -> str | None:
    """Run a section; what went wrong, None where nothing did."""
    log = out / f"{module.rpartition('.')[2]}.log"
    command = [sys.executable, "-m", module, "--out", str(out), *(["--quick"] if quick else [])]
    with open(log, "w", encoding="utf-8") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=LIMIT[quick]).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {LIMIT[quick]:.0f} s; see {log}"
    return f"ended with {code}; see {log}" if code else None


def write_report(out: Path, about: dict[str, str], took: dict[str, str]) -> Path:
    """results/benchmarks.md and the plots, from the tables that are there."""
    results = out / "results"
    found = [table for name in took for table in tables.load(out / f"{name}.json")]
    lines = ["# Benchmarks", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [f"- section {name}: {value}" for name, value in took.items()] + [""]
    lines += [f"![]({path.name})" for path in plots.draw(found, results)] + [""]
    path = results / "benchmarks.md"
    path.write_text("\n".join([*lines, *(table.markdown() for table in found)]), encoding="utf-8")
    return path


def main() -> None:
    """Run the sections; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, about five minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"started": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "sizes": "quick" if options.quick else "full"}
    about |= machine.describe()
    took: dict[str, str] = {}
    for name in options.only:
        (options.out / f"{name}.json").unlink(missing_ok=True)
        start = time.perf_counter()
        wrong = run_section(SECTIONS[name], options.out, options.quick)
        took[name] = f"{time.perf_counter() - start:.0f} s" + (f", **{wrong}**" if wrong else "")
        print(f"{name}: {took[name]}", flush=True)
        path = write_report(options.out, about, took)
    print(path.read_text(encoding="utf-8"))
    print(path)
    if any("**" in value for value in took.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
