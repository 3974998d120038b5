"""One record is read the same from every source: jsonl, compressed or not, Parquet, datasets, Python lists."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msif_core import records
from msif_core.config import HubDataset
from msif_core.encoding import encode
from msif_core.errors import InputError
from msif_core.queries import load_queries
from msif_core.training import train_tokenizer

SOURCES = ("jsonl", "gz", "marked", "parquet", "hub", "saved", "saved splits", "list")
BOM = b"\xef\xbb\xbf"
Row = dict[str, Any]


def written(found: list[Row], kind: str, folder: Path) -> Any:
    """The records as a source of that kind."""
    lines = "".join(json.dumps(row) + "\n" for row in found).encode()
    if kind == "list":
        return found
    if kind == "hub":
        (folder / "hub").mkdir()
        (folder / "hub" / "train.jsonl").write_bytes(lines)
        return HubDataset(dataset=str(folder / "hub"), id="id")
    if kind.startswith("saved"):
        saved = datasets.Dataset.from_list(found)
        if kind == "saved":
            saved.save_to_disk(folder / kind)
        else:
            other = datasets.Dataset.from_list([{"id": "other", "text": "of another split"}])
            datasets.DatasetDict({"train": saved, "test": other}).save_to_disk(folder / kind)
        return HubDataset(dataset=str(folder / kind), id="id")
    path = folder / {"gz": "a.jsonl.gz", "parquet": "a.parquet"}.get(kind, "a.jsonl")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(found), path)
    else:
        path.write_bytes({"gz": gzip.compress(BOM + lines), "marked": BOM + lines}.get(kind, lines))
    return str(path)


def read(found: list[Row], kind: str, folder: Path) -> list[Row]:
    source = written(found, kind, folder)
    if kind == "list":
        return records.read_list(source)
    return list(records.read_records(source, records.Skipped()))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["a prompt, its completion and a text"], 300)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"id": 7, "text": "a text"}, "a text"),
        ({"id": 7, "text": "a text", "prompt": "a prompt", "completion": " its"}, "a prompt its"),
        ({"id": 7, "text": "a text", "prompt": "a prompt"}, "a text"),
        ({"id": 7, "text": "a text", "completion": " its"}, "a text"),
        ({"id": 7, "text": "a text", "prompt": "a prompt", "completion": None}, "a text"),
        ({"id": 7, "text": None, "prompt": "a prompt", "completion": " its"}, "a prompt its"),
    ],
)
def test_what_is_read_of_a_record(kind: str, row: Row, text: str, tmp_path: Path, tokenizer: Any) -> None:
    [found] = read([row], kind, tmp_path)
    assert found["id"] == "7"
    assert records.text_of(found) == text
    [[(ids, labels)]] = encode([found], tokenizer, 64, "causal_lm")
    assert text in tokenizer.decode(ids)
    assert (labels[0] == -100) == ("its" in text)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", [True, 1.5, [1]])
def test_other_ids_are_refused(kind: str, name: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"id {name!r} is neither a text nor a whole number; give".replace("[", r"\[")
    ):
        read([{"id": name, "text": "a text"}], kind, tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_a_number_and_its_digits_are_one_id(kind: str, tmp_path: Path) -> None:
    twice = r"2: id '1' stands already at .*1; ids must differ \(a whole number is taken for its digits\)"
    with pytest.raises(InputError, match=twice):
        read([{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], kind, tmp_path)


def test_numbers_of_numpy_are_ids_and_a_list_is_left_as_it_was() -> None:
    given: list[Row] = [{"id": np.int64(3), "text": "a", "year": None}]
    assert records.read_list(given) == [{"id": "3", "text": "a"}]
    assert given == [{"id": np.int64(3), "text": "a", "year": None}]


def test_queries_have_numbers_for_ids_too(tmp_path: Path, tokenizer: Any) -> None:
    asked = [{"id": 5, "prompt": "a prompt", "completion": " its", "gold_doc_ids": [12, "d3"], "text": "a text"}]
    for source in (asked, Path(written(asked, "jsonl", tmp_path))):
        found = load_queries(source, tokenizer, 64, "causal_lm")
        assert (found.ids, found.metadata) == (["5"], [{"gold_doc_ids": ["12", "d3"]}])
        assert found.completions == [" its"]


def test_a_split_that_was_not_saved_is_named(tmp_path: Path) -> None:
    source = written([{"id": "a", "text": "a"}], "saved splits", tmp_path)
    other = HubDataset(dataset=source.dataset, id="id", split="test")
    assert [row["id"] for row in records.read_records(other, records.Skipped())] == ["other"]
    wrong = HubDataset(dataset=source.dataset, split="dev")
    with pytest.raises(InputError, match=r"no split 'dev'; set `split` to one of \['test', 'train'\]"):
        list(records.read_records(wrong, records.Skipped()))


def test_a_damaged_folder_that_was_saved_is_named(tmp_path: Path) -> None:
    source = written([{"id": "a", "text": "a"}], "saved", tmp_path)
    next(Path(source.dataset).glob("*.arrow")).unlink()
    with pytest.raises(InputError, match=r"dataset .*saved: cannot be loaded: "):
        list(records.read_records(source, records.Skipped()))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([["a"], ["one"], ["another"]], names=["id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: two columns are named 'text'; write it again with one of them"):
        records.read_list(tmp_path / "a.parquet")
