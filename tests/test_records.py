"""Bad sources: a message for each kind that names the file, the record and the mend."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tasks.corpus
import tasks.progress
from msif_core import corpus, records
from msif_core.config import HubDataset
from msif_core.errors import InputError
from tests.tiny_project import change
from tests.words import build, documents, read_all, word_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


GOOD = {"id": "good", "text": "w1 w2 w3"}
BAD = {
    '{"id": "a", "text": ': r"bad.jsonl:2: not valid JSON .*; mend the line or set corpus.skip_bad_records",
    f'{{"id": "a", "text": "w1", "n": {"7" * 5000}}}': r"bad.jsonl:2: not valid JSON .*5000 digits.*; mend the line",
    f'{{"id": "a", "text": "w1", "n": {"[" * 100_000}': r"bad.jsonl:2: not valid JSON .*recursion depth.*; mend",
    "[1, 2]": r"bad.jsonl:2: not a JSON object; write one \{...\} a line",
    '{"text": "w1"}': r"bad.jsonl:2: no id; give each record a string `id`",
    '{"id": "a"}': r"bad.jsonl:2: neither text, nor prompt and completion, nor messages, nor input_ids",
    '{"id": "a", "text": " "}': r"bad.jsonl:2: empty text; remove the record",
    '{"id": "a", "prompt": "w1"}': r"bad.jsonl:2: prompt without a completion; give both as text",
    '{"id": "a", "input_ids": [1, 2], "labels": [1]}': r"bad.jsonl:2: input_ids and labels must have the same length",
    '{"id": "a", "input_ids": 5}': r"bad.jsonl:2: input_ids must be a list of tokens, whole numbers from 0 to 21474",
    '{"id": "a", "input_ids": null}': r"bad.jsonl:2: neither text, nor prompt and completion, nor messages, nor",
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


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=[line[:50] for line in BAD])
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


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"id,text\na,w1\nb,w2\n", r"not valid JSON \(.*\)"),
        (gzip.compress(json.dumps(GOOD).encode()), "not UTF-8"),
        (b'{"text": "w1"}\n{"text": "w2"}\n', "no id; give each record a string `id`"),
    ],
    ids=["csv", "gzip", "without ids"],
)
def test_a_file_without_a_good_record_is_not_skipped(
    tmp_path: Path, tokenizer: Any, content: bytes, problem: str, skip: bool
):
    good, bad = write_jsonl(tmp_path / "a.jsonl", [GOOD]), tmp_path / "b.csv"
    bad.write_bytes(content)
    wanted = rf"b.csv:1: {problem}" + (
        ".*; nor is any other record of it good, .*: name files of jsonl" if skip else ""
    )
    with pytest.raises(InputError, match=wanted):
        build([good, str(bad)], tmp_path / "c", tokenizer, skip_bad_records=skip)


def test_a_file_of_records_that_stand_already_is_skipped(tmp_path: Path, tokenizer: Any):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [GOOD]) for name in "ab"]
    assert build(paths, tmp_path / "c", tokenizer, skip_bad_records=True)["skipped"]["count"] == 1


@pytest.mark.parametrize("part", [slice(20, None), slice(-20)])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, part: slice):
    content = gzip.compress(b"".join(b'{"id": "%d", "text": "w1"}\n' % number for number in range(999)))
    (tmp_path / "a.jsonl.gz").write_bytes(content[part])
    with pytest.raises(InputError, match=r"a.jsonl.gz: cannot be read \(.*\); write the damaged file again"):
        records.read_list(tmp_path / "a.jsonl.gz")


def test_how_many_records_were_skipped_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    config = change(project, corpus={"skip_bad_records": True}).config
    with open(project.parent / "documents.jsonl", "a") as handle:
        handle.write("{\n[]\n")
    monkeypatch.setattr(tasks.corpus, "get_run_logger", lambda: logging.getLogger("run"))
    monkeypatch.setattr(tasks.progress, "step", lambda _name: lambda _done, _total: None)
    for _ in range(2):
        caplog.clear()
        tasks.corpus.tokenize.fn(config, "pretrain")
        [message] = caplog.messages
        assert message.startswith("pretrain: 2 records skipped, the first: ")
        assert "documents.jsonl:49: not valid JSON" in message


def test_a_glob_that_matches_nothing(tmp_path: Path, tokenizer: Any):
    with pytest.raises(InputError, match=r"none-\*.jsonl: no file matches"):
        build(str(tmp_path / "none-*.jsonl"), tmp_path / "c", tokenizer)


def test_a_file_with_brackets_in_its_name_is_that_file(tmp_path: Path):
    path = write_jsonl(tmp_path / "texts [1].jsonl", [GOOD])
    write_jsonl(tmp_path / "texts 1.jsonl", [{"id": "other", "text": "w1"}])
    assert records.read_list(Path(path)) == [GOOD]


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


def test_null_is_absent(tmp_path: Path, tokenizer: Any):
    odd = {"prompt": None, "completion": None, "input_ids": None, "labels": None, "source": None, "year": None}
    build(write_jsonl(tmp_path / "a.jsonl", [GOOD | odd]), tmp_path / "a", tokenizer)
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", [GOOD | {"other": None}, {"id": "b", "text": None}])
    source = HubDataset(dataset=str(tmp_path / "hub"), id="id")
    build(source, tmp_path / "b", tokenizer, skip_bad_records=True)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert read_all(folder) == {"good": [[1, 2, 3, 0]]}
        assert corpus.read_documents(folder)["metadata"].to_pylist() == ["{}"]
    with pytest.raises(InputError, match="row 1: neither text, nor prompt and completion"):
        build(source, tmp_path / "b", tokenizer)


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
