"""Records of documents and queries: read from jsonl, Parquet, hub datasets or Python lists, and checked."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from numbers import Integral
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msif_core import chats, storage
from msif_core.batching import IGNORED
from msif_core.config import Documents, HubDataset
from msif_core.errors import InputError

Record = dict[str, Any]
Check = Callable[[Any], str | None]
"""What is wrong with a record, None if nothing is."""

Located = Iterator[tuple[str, Any]]
"""Records, each after where it stands."""

KNOWN = {"id", "text", "source", "prompt", "completion", "messages", "input_ids", "labels", "label"}
QUERY_FIELDS = KNOWN | {"contrast", "set"}
ENCODED = {"text", "prompt", "completion", "messages", "input_ids", "labels"}
"""Fields that become tokens."""

LARGEST_TOKEN = (1 << 31) - 1
"""Tokens are stored in 32 bits."""


@dataclass
class Skipped:
    """Malformed records that were passed over: how many, and the first one's message."""

    count: int = 0
    first: str | None = None

    def add(self, message: str, skip: bool) -> None:
        """Count a bad record, or raise if bad records are not to be skipped."""
        if not skip:
            raise InputError(message)
        self.count += 1
        self.first = self.first or message


class Unreadable(str):
    """What is wrong with a line that holds no record."""


def files_of(pattern: str) -> list[Path]:
    """The files a glob matches, sorted; folders that it matches too are passed over.

    Raises:
        InputError: it matches none, or is a folder itself.
    """
    if Path(pattern).is_file():  # brackets in its name are no pattern
        return [Path(pattern)]
    if Path(pattern).is_dir():
        raise InputError(f"{pattern}: a folder; name its files, for example {Path(pattern) / '*.jsonl'}")
    found = sorted(path for path in map(Path, glob(pattern, recursive=True)) if not path.is_dir())
    if not found:
        raise InputError(f"{pattern}: no file matches; paths are relative to the folder msif is called from")
    return found


def source_fingerprint(documents: Documents) -> str:
    """Digest of what the sources hold: the bytes of files, the names of datasets on the hub."""
    parts: list[Any] = []
    for source in _listed(documents):
        if isinstance(source, HubDataset):
            parts.append(source.model_dump())
            files = sorted(path for path in Path(source.dataset).rglob("*") if path.is_file())
        else:
            files = files_of(source)
        parts.extend((path.name, storage.file_digest(path)) for path in files)
    return storage.fingerprint(parts)


def read_records(
    documents: Documents, skipped: Skipped, skip: bool = False, check: Check | None = None
) -> Iterator[Record]:
    """Stream the records of all sources, checked as documents or by `check`.

    Raises:
        InputError: a malformed record (unless `skip`), a duplicate id; names file and line.
    """
    seen: dict[str, str] = {}
    for stream in (stream for source in _listed(documents) for stream in _streams(source)):
        good, first_bad = False, None
        for where, record in stream:
            problem = str(record) if isinstance(record, Unreadable) else (check or problem_of)(record)
            good = good or problem is None
            if problem is None and (first := seen.get(record["id"])) is not None:
                problem = _twice(record["id"], first)
            if problem is not None:
                first_bad = first_bad or f"{where}: {problem}"
                skipped.add(f"{where}: {problem}", skip)
                continue
            seen[record["id"]] = where
            yield record
        if first_bad is not None and not good:
            raise InputError(
                f"{first_bad}; nor is any other record of it good, and corpus.skip_bad_records skips no whole file: "
                "name files of jsonl (.gz, .bz2 or .zst as well) or Parquet"
            )


def check_all(records: Iterable[Record], name: str, check: Check) -> list[Record]:
    """Check records given as Python dictionaries."""
    found = [_usual(record) for record in records]
    seen: dict[str, int] = {}
    for number, record in enumerate(found, 1):
        problem = check(record)
        if problem is None and (first := seen.setdefault(record["id"], number)) != number:
            problem = _twice(record["id"], f"record {first}")
        if problem is not None:
            raise InputError(f"{name}, record {number}: {problem}")
    return found


def _twice(name: str, first: str) -> str:
    number = " (a whole number is taken for its digits)" if name.removeprefix("-").isdigit() else ""
    return f"id {name!r} stands already at {first}; ids must differ{number}"


def is_pair(record: Record) -> bool:
    """Whether a record is a prompt with its completion, which go before a text; a prompt alone beside a text is not."""
    return "prompt" in record and ("completion" in record or "text" not in record)


def lacks_completion(record: Record) -> bool:
    """Whether a query is a prompt alone, or a chat that ends with another's turn, which the model is to answer."""
    if record.get("completion") not in (None, "") or "input_ids" in record:
        return False
    if "messages" in record:
        last = record["messages"][-1] if isinstance(record["messages"], list) and record["messages"] else None
        return not isinstance(last, dict) or last.get("role") != chats.ASSISTANT
    return "prompt" in record


def query_problem_of(record: Any) -> str | None:
    """What is wrong with a query: a record that may lack its completion, have a contrast, and name its sets."""
    if not isinstance(record, dict):
        return problem_of(record)
    alone = lacks_completion(record)
    if (problem := problem_of(record | {"completion": "generated"} if alone else record)) is not None:
        return problem
    if alone and "messages" not in record and not record["prompt"].strip():  # a str: there is no problem so far
        return "empty prompt; write what the model should answer"
    contrast, named = record.get("contrast"), record.get("set")
    if contrast is not None:
        words = ("prompt" in record or "messages" in record) and isinstance(contrast, str) and contrast
        label = "label" in record and isinstance(contrast, int) and not isinstance(contrast, bool)
        if not words and not label:
            return "contrast must be another completion of its prompt as text (or another label of its text)"
        own = record.get("label") if label else parts_of(record)[1]
        if contrast == own:
            return "contrast is the completion itself, so there is no difference to explain; give another one"
    names = [named] if isinstance(named, str) else named
    if named is not None and not (isinstance(names, list) and names and all(isinstance(n, str) and n for n in names)):
        return "set must be a name, or a list of names"
    gold = record.get("gold_doc_ids")
    if gold is not None and not (isinstance(gold, list) and all(isinstance(name, str) for name in gold)):
        return "gold_doc_ids must be a list of documents' ids, each as text or as a whole number"
    return None


def problem_of(record: Any) -> str | None:
    """What is wrong with a record, None if nothing is."""
    if not isinstance(record, dict):
        return "not a JSON object; write one {...} a line"
    name = record.get("id")
    if not isinstance(name, str) or not name:
        wrong = "no id" if name in (None, "") else f"id {name!r} is neither a text nor a whole number"
        return f"{wrong}; give each record a string `id`"
    if "input_ids" in record:
        read = "messages" in record and chats.problem_of_messages(record, answered=False)
        return _problem_of_tokens(record["input_ids"], record.get("labels")) or read or None
    if "messages" in record:
        return chats.problem_of_messages(record)
    if is_pair(record):
        ok = isinstance(record["prompt"], str) and isinstance(record.get("completion"), str) and record["completion"]
        return None if ok else "prompt without a completion; give both as text"
    if not isinstance(record.get("text"), str):
        return "neither text, nor prompt and completion, nor messages, nor input_ids; give one of them"
    return None if record["text"].strip() else "empty text; remove the record"


def _problem_of_tokens(ids: Any, labels: Any) -> str | None:
    if not _whole_numbers(ids) or not ids or not 0 <= min(ids) <= max(ids) <= LARGEST_TOKEN:
        return f"input_ids must be a list of tokens, whole numbers from 0 to {LARGEST_TOKEN}, and not empty"
    if labels is None:
        return None
    if not _whole_numbers(labels):
        return "labels must be a list of whole numbers"
    if len(labels) != len(ids):
        return "input_ids and labels must have the same length"
    wrong = [label for label in labels if label != IGNORED and not 0 <= label <= LARGEST_TOKEN]
    return f"label {wrong[0]}; labels are tokens, and {IGNORED} leaves one out of the loss" if wrong else None


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def metadata_of(record: Record, known: set[str] = KNOWN) -> Record:
    """The fields that msif does not know: kept, and queryable in SQL."""
    read = known | chats.VARIABLES if "messages" in record else known
    return {key: value for key, value in record.items() if key not in read}


def text_of(record: Record) -> str:
    """What a person reads of a record."""
    if "messages" in record:
        return chats.transcript(chats.turns(record))
    return "".join(parts_of(record))


def parts_of(record: Record) -> tuple[str, str]:
    """What a person reads of a record as the question and as the answer, which is empty where the model is to give it.

    The answer of a chat is the assistant's last turn, that of a text all of it.
    """
    if "messages" in record:
        turns = chats.turns(record)
        answer = chats.said(turns.pop()) if turns[-1]["role"] == chats.ASSISTANT else ""
        return chats.transcript(turns), answer
    if is_pair(record):
        return str(record["prompt"]), str(record.get("completion") or "")  # given tokens need no completion
    return "", str(record.get("text") or record.get("completion") or "")


def _listed(documents: Documents) -> Sequence[str | HubDataset]:
    return documents if isinstance(documents, list) else [documents]


def _streams(source: str | HubDataset) -> Iterator[Located]:
    """The records of a dataset, or of each file that a glob matches; damage met in their middle is an error of them."""
    if isinstance(source, HubDataset):
        yield _undamaged(f"dataset {source.dataset}", _hub(source))
        return
    for path in files_of(source):
        yield _undamaged(str(path), _rows(path) if path.suffix == ".parquet" else _lines(path))


def _undamaged(name: str, found: Located) -> Located:
    """The records, each as `_usual`."""
    try:
        for where, record in found:
            yield where, _usual(record)
    except (OSError, OverflowError, pa.ArrowException) as error:
        raise InputError(f"{name}: cannot be read ({error}); write the damaged file again") from None


def _usual(record: Any) -> Any:
    """A record as every source gives it: a null is a field that is absent, an id that is a whole number its digits."""
    if not isinstance(record, dict):
        return record
    found = {key: value for key, value in record.items() if value is not None}
    if "id" in found:
        found["id"] = _digits(found["id"])
    if isinstance(gold := found.get("gold_doc_ids"), list):
        found["gold_doc_ids"] = list(map(_digits, gold))
    return found


def _digits(name: Any) -> Any:
    return str(name) if isinstance(name, Integral) and not isinstance(name, bool) else name


def _rows(path: Path) -> Located:
    row, file = 0, _parquet(path)
    names = file.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{path}: two columns are named {twice[0]!r}; write it again with one of them")
    for batch in file.iter_batches(batch_size=4096):
        for record in batch.to_pylist():
            row += 1
            yield f"{path}, row {row}", record


def _lines(path: Path) -> Located:
    """The lines of a jsonl file; one that is compressed is known by its name (.gz, .bz2, .zst)."""
    with io.BufferedReader(pa.input_stream(path)) as handle:
        for number, line in enumerate(handle, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Any:
    """What a line says, `Unreadable` if it is no JSON."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 ({error.reason}); re-encode the file")
    except (ValueError, RecursionError) as error:  # syntax, a number of too many digits, brackets nested too deep
        return Unreadable(
            f"not valid JSON ({getattr(error, 'msg', error)}); mend the line or set corpus.skip_bad_records"
        )


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _hub(source: HubDataset) -> Located:
    for number, row in enumerate(_loaded(source)):
        yield f"dataset {source.dataset}, row {number}", _row(source, number, row)


def _loaded(source: HubDataset) -> Iterable[Record]:
    """The rows of the split that is named, of the hub or of a folder.

    Raises:
        InputError: it cannot be loaded, or has no such split.
    """
    import datasets

    folder = Path(source.dataset)
    try:
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            rows: Iterable[Record] = datasets.load_dataset(
                source.dataset, source.name, split=source.split, streaming=True
            )
            return rows
        found: Any = datasets.load_from_disk(folder)  # what `save_to_disk` wrote: a dataset, or one of each split
    except Exception as error:
        raise InputError(f"dataset {source.dataset}: cannot be loaded: {error}") from None
    splits = found if isinstance(found, dict) else {str(found.split or source.split): found}
    if source.split not in splits:
        raise InputError(f"dataset {source.dataset}: no split {source.split!r}; set `split` to one of {sorted(splits)}")
    rows = splits[source.split]
    return rows


def _row(source: HubDataset, number: int, row: Record) -> Record:
    """A row of a dataset as a record: what is encoded and its id are of the named columns alone."""
    chat = source.text == "text" and "messages" in row
    paired = not chat and source.text == "text" and {"prompt", "completion"} <= row.keys()
    named = (None if chat or paired else source.text, source.id)
    if missing := [name for name in named if name is not None and name not in row]:
        raise InputError(f"dataset {source.dataset}: no column {missing[0]!r}; it has {sorted(row)}")
    rest = {key: value for key, value in row.items() if key not in (*ENCODED, "id", source.text, source.id)}
    read = ["messages"] if chat else [key for key in ("text", "prompt", "completion") if key in row]
    encoded: Record = {key: row[key] for key in read} if chat or paired else {"text": row[source.text]}
    key = f"{source.dataset}/{source.split}/{number}" if source.id is None else row[source.id]
    return {"id": key, **encoded, **rest}


def read_list(source: Path | Sequence[Record], check: Check = problem_of) -> list[Record]:
    """Records of a jsonl file or of a Python list, checked."""

    def whole(record: Any) -> str | None:
        return check(record) or ("a lone surrogate is no text; re-encode it" if _has_lone_surrogate(record) else None)

    if isinstance(source, str | Path):
        return list(read_records(str(source), Skipped(), check=whole))
    return check_all(source, "records", whole)


def _has_lone_surrogate(record: Record) -> bool:
    try:
        json.dumps(record, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        return True
    return False
