"""A tokenizer whose tokens are words, and documents made of them: what the corpus is tried on."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msif_core import corpus, storage
from msif_core.config import CorpusSettings

END = 0


def word_tokenizer() -> Any:
    """Words to numbers: `w7` is token 7, the end token 0."""
    vocabulary = {"<end>": END} | {f"w{i}": i for i in range(1, 50)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def words(count: int, start: int = 1) -> str:
    return " ".join(f"w{1 + (start + i) % 49}" for i in range(count))


def documents(count: int, length: int = 6) -> list[dict[str, Any]]:
    return [{"id": f"d{i}", "text": words(length, i), "source": "s", "year": 1900 + i} for i in range(count)]


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def build(documents: Any, folder: Path, tokenizer: Any, **options: Any) -> dict[str, Any]:
    task, length = options.pop("task", "causal_lm"), options.pop("max_length", 8)
    settings = CorpusSettings(**options)
    path = corpus.tokenize(documents, folder, tokenizer=tokenizer, max_length=length, settings=settings, task=task)
    return dict(storage.read_json(path))


def read_all(folder: Path) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {}
    _, entries = corpus.shard_entries(folder)
    for entry in entries:
        shard = corpus.read_shard(folder / entry["sequences"])
        for name, ids in zip(shard.document_ids, shard.input_ids, strict=True):
            found.setdefault(name, []).append(ids.tolist())
    return found
