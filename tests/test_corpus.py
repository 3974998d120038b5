"""Documents to shards: determinism, reuse, versions, quarantine."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msif_core import corpus, dealing, encoding, tokenizers
from msif_core.config import HubDataset
from msif_core.errors import InputError
from tests.words import build, documents, read_all, word_tokenizer, words, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


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


@pytest.mark.parametrize(("name", "codec"), [("gz", "gzip"), ("bz2", "bz2"), ("zst", "zstd")])
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, tokenizer: Any, name: str, codec: str):
    plain = write_jsonl(tmp_path / "a.jsonl", documents(12))
    with pa.CompressedOutputStream(f"{plain}.{name}", codec) as stream:
        stream.write(Path(plain).read_bytes())
    built = [build(path, tmp_path / f"c{i}", tokenizer) for i, path in enumerate((plain, f"{plain}.{name}"))]
    assert built[0]["fingerprint"] == built[1]["fingerprint"]


def hub(folder: Path, records: list[dict[str, Any]], **columns: str) -> HubDataset:
    """A dataset of these rows in a folder."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", records)
    return HubDataset(dataset=str(folder), **columns)


def test_a_dataset_is_read_by_its_named_columns_alone(tmp_path: Path, tokenizer: Any):
    others = {"text": "w9", "id": "z", "prompt": "w8", "completion": "w8", "input_ids": [7, 7], "labels": [7, 7]}
    found = [{"body": "w1 w2", "key": 5, "year": 1900, **others}, {"body": "w3 w4", "key": 6, "year": 1901, **others}]
    build(hub(tmp_path / "hub", found, text="body", id="key"), tmp_path / "c", tokenizer)
    assert read_all(tmp_path / "c") == {"5": [[1, 2, 0]], "6": [[3, 4, 0]]}
    rows = corpus.rows_of_documents(tmp_path / "c", ["5", "6"], ["text", "metadata"])
    assert [rows[name]["text"] for name in ("5", "6")] == ["w1 w2", "w3 w4"]
    assert [json.loads(rows[name]["metadata"]) for name in ("5", "6")] == [{"year": 1900}, {"year": 1901}]


@pytest.mark.parametrize("key", [3, "a"])
def test_a_dataset_without_a_named_id_goes_by_row_numbers(tmp_path: Path, tokenizer: Any, key: Any):
    build(hub(tmp_path / "hub", [{"id": key, "text": "w1 w2"}]), tmp_path / "c", tokenizer)
    assert read_all(tmp_path / "c") == {f"{tmp_path / 'hub'}/train/0": [[1, 2, 0]]}


def test_a_dataset_without_a_text_column_may_have_prompts_and_completions(tmp_path: Path, tokenizer: Any):
    found = [{"id": "a", "prompt": "w1 w2", "completion": " w3"}]
    build(hub(tmp_path / "hub", found, id="id"), tmp_path / "c", tokenizer)
    [labels] = corpus.sequences_of_documents(tmp_path / "c", ["a"]).labels
    assert labels.tolist() == [-100, -100, 3, 0]
    with pytest.raises(InputError, match=r"hub2: no column 'body'; it has \['completion', 'id', 'prompt'\]"):
        build(hub(tmp_path / "hub2", found, text="body"), tmp_path / "c", tokenizer)


def test_a_row_without_an_id_in_its_named_column_is_no_record(tmp_path: Path, tokenizer: Any):
    found = [{"key": "a", "text": "w1"}, {"key": None, "text": "w2"}]
    with pytest.raises(InputError, match="row 1: no id; give each record a string `id`"):
        build(hub(tmp_path / "hub", found, id="key"), tmp_path / "c", tokenizer)


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
    before = tokenizers.tokenizer_fingerprint(tokenizer)
    tokenizer("w1 w2 w3", truncation=True, max_length=2)
    assert tokenizers.tokenizer_fingerprint(tokenizer) == before


def slow_bert(folder: Path, **options: Any) -> Any:
    """As a checkpoint has it: saved, and loaded."""
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy as BertTokenizer

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "foo"]))
    BertTokenizer(str(folder / "vocab.txt"), **options).save_pretrained(folder)
    return BertTokenizer.from_pretrained(folder)


def test_a_slow_tokenizer_s_options_make_it_another_and_its_folder_does_not(tmp_path: Path):
    found = [
        tokenizers.tokenizer_fingerprint(slow_bert(tmp_path / str(i), do_lower_case=lower, strip_accents=accents))
        for i, (lower, accents) in enumerate([(True, None), (True, None), (False, None), (True, True)])
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_what_a_slow_tokenizer_s_file_holds_beside_its_vocabulary_makes_it_another(tmp_path: Path):
    from transformers import CTRLTokenizer

    found = []
    for name, merges in (("a", "a b</w>\nb c</w>"), ("b", "b c</w>\na b</w>")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_text(json.dumps({"<unk>": 0, "a": 1, "b": 2, "c</w>": 3}))
        (tmp_path / name / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        found.append(CTRLTokenizer.from_pretrained(tmp_path / name))
    assert found[0].get_vocab() == found[1].get_vocab()
    assert len({tokenizers.tokenizer_fingerprint(each) for each in found}) == 2


def test_special_tokens_read_as_text_make_another_tokenizer(tokenizer: Any):
    other = deepcopy(tokenizer)
    other.split_special_tokens = True
    assert tokenizers.tokenizer_fingerprint(other) != tokenizers.tokenizer_fingerprint(tokenizer)


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
