"""A second corpus: `python -m benchmarks.speeches` writes runs/speeches/*.jsonl from the shipped speeches.

Fine-tuning and queries are to continue a speech: its first half is the prompt, the second the completion. Queries,
fine-tuning and pre-training speeches are apart. For deployments/configs/retrain-speeches.yaml.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SOURCE = Path("data/speeches/shakespeare.jsonl")
FOLDER = Path("runs/speeches")
QUERIES, LESSONS = 80, 500
WORDS = range(16, 60)
"""Lengths of the speeches that are to be continued: both halves fit one window."""


def main() -> None:
    speeches = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(speeches))
    fitting = [int(i) for i in order if len(speeches[i]["text"].split()) in WORDS]
    asked, lessons = fitting[:QUERIES], fitting[QUERIES : QUERIES + LESSONS]
    rest = [speeches[i] for i in sorted(set(order.tolist()) - set(asked) - set(lessons))]
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("pretrain", rest)
    write("finetune", [halves(speeches[i]) for i in lessons])
    write("queries", [halves(speeches[i]) for i in asked])


def halves(speech: dict[str, str]) -> dict[str, str]:
    """A speech as prompt and completion."""
    words = speech["text"].split()
    middle = len(words) // 2
    prompt, completion = " ".join(words[:middle]), " " + " ".join(words[middle:])
    return {"id": speech["id"], "prompt": prompt, "completion": completion}


def write(name: str, records: list[dict[str, str]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{FOLDER / name}.jsonl: {len(records)} records")


if __name__ == "__main__":
    main()
