"""Documents to shards: windows, labels, determinism, reuse, and a message for each kind of bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from msif_core import corpus, dealing, encoding, storage
from msif_core.batching import IGNORED
from msif_core.config import CorpusSettings, HubDataset
from msif_core.errors import InputError

END = 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words to numbers: `w7` is token 7, the end token 0."""
    vocabulary = {"<end>": END} | {f"w{i}": i for i in range(1, 50)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def words(count: int, start: int = 1) -> str:
    return " ".join(f"w{1 + (start + i) % 49}" for i in range(count))


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


# -- windows and labels -------------------------------------------------------------------------------


def test_text_is_cut_into_windows_that_keep_document_boundaries(tokenizer: Any):
    [windows] = encoding.encode([{"id": "a", "text": words(10)}], tokenizer, 4, "causal_lm")
    assert [len(ids) for ids, _ in windows] == [4, 4, 3]
    assert windows[-1][0][-1] == END
    assert all(ids == labels for ids, labels in windows)


def test_a_last_window_without_a_target_is_left_out(tokenizer: Any):
    [windows] = encoding.encode([{"id": "a", "text": words(4)}], tokenizer, 4, "causal_lm")
    assert [len(ids) for ids, _ in windows] == [4]


def test_the_loss_is_on_the_completion_and_its_end(tokenizer: Any):
    [[(ids, labels)]] = encoding.encode([{"id": "a", "prompt": "w1 w2", "completion": "w3"}], tokenizer, 8, "causal_lm")
    assert ids == [1, 2, 3, END]
    assert labels == [IGNORED, IGNORED, 3, END]


@pytest.mark.parametrize(("prompt", "completion"), [(20, 3), (3, 20), (20, 20), (0, 5)])
def test_a_long_prompt_loses_its_beginning_never_the_completion_s(tokenizer: Any, prompt: int, completion: int):
    record = {"id": "a", "prompt": words(prompt), "completion": words(completion, 30)}
    [[(ids, labels)]] = encoding.encode([record], tokenizer, 8, "causal_lm")
    assert len(ids) == len(labels) <= 8
    targets = [label for label in labels if label != IGNORED]
    assert targets == tokenizer(record["completion"])["input_ids"][:7] + ([END] if completion < 7 else [])
    assert labels[0] == IGNORED or not prompt


def test_records_of_all_kinds_are_encoded_together_as_one_by_one(tokenizer: Any):
    found = [
        {"id": "a", "text": words(7)},
        {"id": "b", "input_ids": [1, 2, 3]},
        {"id": "c", "prompt": "w1 w2", "completion": "w3"},
        {"id": "d", "text": "w4 w5"},
    ]
    together = encoding.encode(found, tokenizer, 4, "causal_lm")
    assert together == [encoding.encode([record], tokenizer, 4, "causal_lm")[0] for record in found]
    assert encoding.encode([], tokenizer, 4, "causal_lm") == []


def test_given_tokens_need_no_tokenizer_and_are_cut_too():
    record = {"id": "a", "input_ids": list(range(1, 8)), "labels": [-100, -100, 3, 4, 5, -100, -100]}
    [windows] = encoding.encode([record], None, 3, "causal_lm")
    assert windows == [([1, 2, 3], [-100, -100, 3]), ([4, 5, 6], [4, 5, -100])]
    with pytest.raises(InputError, match=r"'b' is text, .* no tokenizer; give input_ids, or a model folder with"):
        encoding.encode([{"id": "b", "text": "w1"}], None, 3, "causal_lm")


def test_classification_puts_its_label_first(tokenizer: Any):
    [[(ids, labels)]] = encoding.encode([{"id": "a", "text": words(9), "label": 2}], tokenizer, 4, "classification")
    assert len(ids) == 4
    assert labels == [2, IGNORED, IGNORED, IGNORED]


@pytest.mark.parametrize("label", [None, "good", True, -1, 1.5])
def test_classification_without_a_usable_label_is_an_input_error(tokenizer: Any, label: Any):
    with pytest.raises(InputError, match="record 'a': a stage with task classification needs `text` and an integer"):
        encoding.encode([{"id": "a", "text": "w1", "label": label}], tokenizer, 4, "classification")


# -- shards -------------------------------------------------------------------------------------------


def documents(count: int, length: int = 6) -> list[dict[str, Any]]:
    return [{"id": f"d{i}", "text": words(length, i), "source": "s", "year": 1900 + i} for i in range(count)]


def test_shards_hold_the_contract_s_columns(tmp_path: Path, tokenizer: Any):
    manifest = build(write_jsonl(tmp_path / "a.jsonl", documents(40)), tmp_path / "c", tokenizer, shard_sequences=10)
    assert len(manifest["shards"]) == 4
    assert sum(s["n_sequences"] for s in manifest["shards"]) == 40
    for number, entry in enumerate(manifest["shards"]):
        table = pq.read_table(tmp_path / "c" / entry["sequences"])
        assert table.schema.equals(corpus.SEQUENCES)
        assert table["sequence_id"].to_pylist() == [number << 40 | row for row in range(len(table))]
        assert {dealing.shard_of(name, 4) for name in table["document_id"].to_pylist()} == {number}
    docs = corpus.read_documents(tmp_path / "c")
    assert docs.schema.equals(corpus.DOCUMENTS)
    row = docs.to_pylist()[0]
    assert json.loads(row["metadata"]) == {"year": 1900 + int(row["document_id"][1:])}
    assert row["n_tokens"] == 7


def test_shard_count_follows_windows_not_documents(tmp_path: Path, tokenizer: Any):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20, 31))  # 4 windows each
    assert len(build(path, tmp_path / "c", tokenizer, shard_sequences=20)["shards"]) == 4


def test_the_order_of_the_source_does_not_matter(tmp_path: Path, tokenizer: Any):
    found = documents(30)
    one = build(write_jsonl(tmp_path / "a.jsonl", found), tmp_path / "a", tokenizer, shard_sequences=8)
    two = build(write_jsonl(tmp_path / "b.jsonl", found[::-1]), tmp_path / "b", tokenizer, shard_sequences=8)
    assert one["fingerprint"] == two["fingerprint"]


def test_records_are_dealt_out_in_small_portions_too(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "a.jsonl", documents(30))
    one = build(path, tmp_path / "a", tokenizer, shard_sequences=8)
    monkeypatch.setattr(dealing, "HELD_BYTES", 100)
    assert build(path, tmp_path / "b", tokenizer, shard_sequences=8)["fingerprint"] == one["fingerprint"]


def test_jsonl_parquet_and_datasets_give_the_same_shards(tmp_path: Path, tokenizer: Any):
    found = documents(12)
    (tmp_path / "hub").mkdir()
    sources = [
        write_jsonl(tmp_path / "a.jsonl", found),
        str(tmp_path / "a.parquet"),
        HubDataset(dataset=str(tmp_path / "hub"), id="id"),
    ]
    pq.write_table(pa.Table.from_pylist(found), sources[1])
    write_jsonl(tmp_path / "hub" / "train.jsonl", found)
    built = [build(source, tmp_path / f"c{i}", tokenizer) for i, source in enumerate(sources)]
    assert len({manifest["fingerprint"] for manifest in built}) == 1
    write_jsonl(tmp_path / "hub" / "train.jsonl", documents(13))
    assert build(sources[2], tmp_path / "c2", tokenizer) != built[2], "a folder that a dataset is read from changed"


def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the documents that are encoded from now on, beside the first ones that size the shards."""
    monkeypatch.setattr(dealing, "SIZED_BY", 1)
    seen: list[str] = []

    def counted(found: list[Any], *rest: Any) -> Any:
        seen.extend(record["id"] for record in found)
        return encoding.encode(found, *rest)

    monkeypatch.setattr(corpus, "encode", counted)
    return seen


def test_a_second_run_does_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "a.jsonl", documents(12))
    first = build(path, tmp_path / "c", tokenizer)
    monkeypatch.setattr(corpus, "partition", None)
    assert build(path, tmp_path / "c", tokenizer) == first


def test_the_tokenizer_s_last_call_does_not_make_it_another(tmp_path: Path, tokenizer: Any):
    before = encoding.tokenizer_fingerprint(tokenizer)
    tokenizer("w1 w2 w3", truncation=True, max_length=2)
    assert encoding.tokenizer_fingerprint(tokenizer) == before


def test_a_changed_document_changes_its_shard_alone(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    found = documents(40)
    first = build(write_jsonl(tmp_path / "a.jsonl", found), tmp_path / "c", tokenizer, shard_sequences=10)
    found[3] = {**found[3], "text": words(5, 17)}
    before = read_all(tmp_path / "c")
    version = corpus.version_path(tmp_path / "c", first)
    seen = encodings(monkeypatch)
    second = build(write_jsonl(tmp_path / "a.jsonl", found), tmp_path / "c", tokenizer, shard_sequences=10)
    assert set(seen[1:]) == {f"d{i}" for i in range(40) if dealing.shard_of(f"d{i}", 4) == dealing.shard_of("d3", 4)}
    assert read_all(tmp_path / "c")["d3"] != before["d3"]
    old = corpus.sequences_of_documents(version, ["d3"])
    assert [ids.tolist() for ids in old.input_ids] == before["d3"], "the version before is as it was"
    changed = [a["digest"] != b["digest"] for a, b in zip(first["shards"], second["shards"], strict=True)]
    assert sum(changed) == 1


def test_a_growing_corpus_keeps_its_number_of_shards(tmp_path: Path, tokenizer: Any):
    build(write_jsonl(tmp_path / "a.jsonl", documents(40)), tmp_path / "c", tokenizer, shard_sequences=10)
    grown = build(write_jsonl(tmp_path / "a.jsonl", documents(60)), tmp_path / "c", tokenizer, shard_sequences=10)
    assert len(grown["shards"]) == 4
    assert len(read_all(tmp_path / "c")) == 60


@pytest.mark.parametrize(("windows", "kept", "shards"), [
    (0, None, 1), (130, None, 1), (150, None, 2), (1000, None, 8), (1200, None, 16),
    (1600, 8, 8), (1601, 8, 16), (400, 8, 8), (399, 8, 4), (100, 8, 1), (900, 9, 9), (1900, 9, 16),
])  # fmt: skip
def test_shards_are_a_power_of_two_that_doubles_and_halves(windows: float, kept: int | None, shards: int):
    assert dealing.shard_count(windows, 100, kept) == shards


@pytest.mark.parametrize(("now", "before", "read"), [(4, 4, 1), (8, 2, 1), (2, 8, 4), (8, 6, 3), (4, 9, 9)])
def test_documents_are_found_in_few_shards_of_another_number(now: int, before: int, read: int):
    for name in (f"d{i}" for i in range(200)):
        related = dealing.related_shards(dealing.shard_of(name, now), now, before)
        assert dealing.shard_of(name, before) in related
        assert len(related) == read


def test_other_metadata_make_another_version(tmp_path: Path, tokenizer: Any):
    found = documents(4)
    first = build(write_jsonl(tmp_path / "a.jsonl", found), tmp_path / "c", tokenizer)
    found[0]["year"] = 2000
    second = build(write_jsonl(tmp_path / "a.jsonl", found), tmp_path / "c", tokenizer)
    assert first["fingerprint"] != second["fingerprint"]
    years = [
        [
            json.loads(m)["year"]
            for m in corpus.read_documents(corpus.version_path(tmp_path / "c", v))["metadata"].to_pylist()
        ]
        for v in (first, second)
    ]
    assert years == [[1900, 1901, 1902, 1903], [2000, 1901, 1902, 1903]]


@pytest.mark.parametrize(("kind", "number"), [("sequences", 1), ("documents", 0)])
def test_a_damaged_shard_is_made_anew(tmp_path: Path, tokenizer: Any, kind: str, number: int):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    first = build(path, tmp_path / "c", tokenizer, shard_sequences=10)
    name = first["shards"][number][kind]
    damaged = tmp_path / "c" / name
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{name}: damaged"):
        corpus.read_table(damaged)
    assert build(path, tmp_path / "c", tokenizer, shard_sequences=10) == first
    assert len(read_all(tmp_path / "c")) == 20


def test_nothing_temporary_stays_behind_after_an_error(tmp_path: Path, tokenizer: Any):
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "text": "w1 w2"}, "{"])
    with pytest.raises(InputError):
        build(path, tmp_path / "c", tokenizer)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_document_without_a_target_is_quarantined(tmp_path: Path, tokenizer: Any):
    records = [{"id": "a", "text": "w1 w2"}, {"id": "b", "input_ids": [4, 5], "labels": [4, -100]}]
    manifest = build(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "c", tokenizer)
    assert manifest["quarantined"] == 1
    table = corpus.read_table(tmp_path / "c" / manifest["shards"][0]["quarantine"])
    assert table["document_id"].to_pylist() == ["b"]
    assert sorted(read_all(tmp_path / "c")) == ["a"]


def test_odd_metadata_is_kept_as_json(tmp_path: Path, tokenizer: Any):
    records = [{"id": "a", "text": "w1 w2", "when": np.datetime64("2020-01-02", "D").item(), "x": float("nan")}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    build(str(tmp_path / "a.parquet"), tmp_path / "c", tokenizer)
    metadata = corpus.read_documents(tmp_path / "c")["metadata"][0].as_py()
    assert json.loads(metadata) == {"when": "2020-01-02", "x": None}


# -- looking things up --------------------------------------------------------------------------------


def test_sequences_and_documents_find_each_other(tmp_path: Path, tokenizer: Any):
    folder = tmp_path / "c"
    build(write_jsonl(tmp_path / "a.jsonl", documents(20, 14)), folder, tokenizer, shard_sequences=10)
    found = corpus.sequences_of_documents(folder, ["d7", "d2"])
    assert len(found) == 4
    assert set(found.document_ids) == {"d2", "d7"}
    ids = np.concatenate([[-1], found.sequence_ids])
    assert corpus.documents_of_sequences(folder, ids) == list(dict.fromkeys(found.document_ids))
    assert len(corpus.sequences_of_documents(folder, [])) == 0
    assert corpus.rows_of_documents(folder, ["d7", "none"], ["text"]) == {
        "d7": {"document_id": "d7", "text": words(14, 7)}
    }


def test_a_sample_reads_the_first_shards_alone(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    folder, read = tmp_path / "c", []
    manifest = build(write_jsonl(tmp_path / "a.jsonl", documents(64)), folder, tokenizer, shard_sequences=8)
    original = corpus.read_table
    monkeypatch.setattr(corpus, "read_table", lambda path, columns: read.append(path.name) or original(path, columns))
    whole = corpus.sample_documents(folder, 100)
    assert sorted(whole) == sorted(row["id"] for row in documents(64))
    for count in (0, 3, 20):
        read.clear()
        assert corpus.sample_documents(folder, count) == whole[:count]
        sizes = np.cumsum([shard["n_documents"] for shard in manifest["shards"]])
        assert read == [shard["documents"] for shard in manifest["shards"]][: int((sizes < count).sum()) + (count > 0)]


def test_read_shard_gives_aligned_arrays(tmp_path: Path, tokenizer: Any):
    manifest = build(write_jsonl(tmp_path / "a.jsonl", documents(3)), tmp_path / "c", tokenizer)
    shard = corpus.read_shard(tmp_path / "c" / manifest["shards"][0]["sequences"])
    assert len(shard) == 3
    assert shard.sequence_ids.dtype == np.int64
    assert all(
        ids.dtype == np.int32 and len(ids) == len(t) for ids, t in zip(shard.input_ids, shard.labels, strict=True)
    )


# -- bad input ----------------------------------------------------------------------------------------

GOOD = {"id": "good", "text": "w1 w2 w3"}
BAD = {
    '{"id": "a", "text": ': r"bad.jsonl:2: not valid JSON .*; mend the line or set corpus.skip_bad_records",
    "[1, 2]": r"bad.jsonl:2: not a JSON object; write one \{...\} a line",
    '{"text": "w1"}': r"bad.jsonl:2: no id; give each record a string `id`",
    '{"id": "a"}': r"bad.jsonl:2: neither text, nor prompt and completion, nor input_ids; give one of them",
    '{"id": "a", "text": " "}': r"bad.jsonl:2: empty text; remove the record",
    '{"id": "a", "prompt": "w1"}': r"bad.jsonl:2: prompt without a completion; give both as text",
    '{"id": "a", "input_ids": [1, 2], "labels": [1]}': r"bad.jsonl:2: input_ids and labels must have the same length",
    '{"id": "a", "input_ids": 5}': r"bad.jsonl:2: input_ids must be a list of tokens, whole numbers from 0 to 21474",
    '{"id": "a", "input_ids": null}': r"bad.jsonl:2: input_ids must be a list of tokens",
    '{"id": "a", "input_ids": []}': r"bad.jsonl:2: input_ids must be a list of tokens",
    '{"id": "a", "input_ids": ["w1"]}': r"bad.jsonl:2: input_ids must be a list of tokens",
    '{"id": "a", "input_ids": [1, -2]}': r"bad.jsonl:2: input_ids must be a list of tokens",
    '{"id": "a", "input_ids": [1, 4294967296]}': r"bad.jsonl:2: input_ids must be a list of tokens",
    '{"id": "a", "input_ids": [1, 2], "labels": 2}': r"bad.jsonl:2: labels must be a list of whole numbers",
    '{"id": "a", "input_ids": [1, 2], "labels": [1, "x"]}': r"bad.jsonl:2: labels must be a list of whole numbers",
    '{"id": "a", "input_ids": [1, 2], "labels": [1, -1]}': r"bad.jsonl:2: label -1; labels are tokens, and -100 leaves",
    '{"id": "good", "text": "w9"}': r"bad.jsonl:2: id 'good' stands already at .*bad.jsonl:1; ids must differ",
    '{"id": "a", "text": "w1 \\ud800"}': r"bad.jsonl.*, record 'a': a lone surrogate is no text; re-encode it",
}


@pytest.mark.parametrize(("line", "message"), BAD.items())
def test_bad_records_stop_with_file_line_and_mend_or_are_counted(
    tmp_path: Path, tokenizer: Any, line: str, message: str
):
    path = write_jsonl(tmp_path / "bad.jsonl", [GOOD, line])
    with pytest.raises(InputError, match=message):
        build(path, tmp_path / "c", tokenizer)
    manifest = build(path, tmp_path / "c", tokenizer, skip_bad_records=True)
    assert manifest["skipped"]["count"] == 1
    assert sorted(read_all(tmp_path / "c")) == ["good"]


def test_invalid_utf8_names_the_line(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "a", "text": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=r"bad.jsonl:2: not UTF-8 \(.*\); re-encode the file"):
        build(str(path), tmp_path / "c", tokenizer)


def test_a_glob_that_matches_nothing(tmp_path: Path, tokenizer: Any):
    with pytest.raises(InputError, match=r"none-\*.jsonl: no file matches"):
        build(str(tmp_path / "none-*.jsonl"), tmp_path / "c", tokenizer)


def test_a_folder_is_no_file(tmp_path: Path, tokenizer: Any):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    write_jsonl(tmp_path / "texts" / "a.jsonl", documents(4))
    with pytest.raises(InputError, match=r"texts: a folder; name its files, for example .*texts/\*\.jsonl"):
        build(str(tmp_path / "texts"), tmp_path / "c", tokenizer)
    build(str(tmp_path / "texts" / "**"), tmp_path / "c", tokenizer)
    assert len(read_all(tmp_path / "c")) == 4


def test_given_tokens_may_have_a_prompt_to_read(tmp_path: Path):
    build(write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "prompt": "Why?", "input_ids": [1, 2]}]), tmp_path / "c", None)
    assert corpus.rows_of_documents(tmp_path / "c", ["a"], ["text"]) == {"a": {"document_id": "a", "text": "Why?"}}


def test_an_empty_source(tmp_path: Path, tokenizer: Any):
    with pytest.raises(InputError, match="no document in it"):
        build(write_jsonl(tmp_path / "a.jsonl", []), tmp_path / "c", tokenizer)


def test_a_corrupt_parquet_source_is_named(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"bad.parquet: not a readable Parquet file"):
        build(str(path), tmp_path / "c", tokenizer)


def test_a_parquet_source_damaged_in_its_middle_is_named(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.Table.from_pylist(documents(500)), path, compression="zstd")
    damaged = bytearray(path.read_bytes())
    damaged[100:1000] = b"\x55" * 900
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"bad.parquet: cannot be read \(.*\); write the damaged file again"):
        build(str(path), tmp_path / "c", tokenizer)
