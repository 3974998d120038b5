"""A stage's tokenizer: loaded and checked, how a text begins and ends in it, and what its tokens read as."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from transformers.utils import cached_file

from msif_core import storage
from msif_core.checkpoint_cache import while_files_stay
from msif_core.errors import InputError
from msif_core.models import adapter_settings

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "spm.model",
)  # fmt: skip
"""Names of the files that vocabularies are kept in; a class may name others."""

SMALLEST_SHARE = 0.5
"""A tokenizer that knows less than this share of its model's vocabulary is another model's, or none."""

RARE = "\U0001242b \U00013000"
"""Cuneiform and a hieroglyph: in hardly a vocabulary, unless it has all bytes."""

FOUND_AT = {"name_or_path", "is_local", "local_files_only", "cache_dir", "revision", "_commit_hash"}
"""Options of a tokenizer that say where it was found, and nothing of what it does."""

SPACES = " \u2581"
"""A space, and SentencePiece's sign for one."""

REPLACEMENT = "\ufffd"
"""What bytes that are no whole character decode to."""


@while_files_stay(4)
def load_tokenizer(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer, None where it has none (records with input_ids need none).

    An adapter without one has its base model's. A class that makes up a vocabulary where there is no file of one
    counts as none.

    Raises:
        InputError: it has a file of a vocabulary, which cannot be loaded.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of many kinds, as a broken file has it
        if found := _vocabulary(source, revision, VOCABULARIES):
            raise _broken(source, found, error) from None
        if not isinstance(error, OSError | ValueError):
            raise
        tokenizer = None
    if tokenizer is not None:
        named = tuple(type(tokenizer).vocab_files_names.values())  # empty where bytes are tokens
        if not named or _vocabulary(source, revision, (*VOCABULARIES, *named)):
            return tokenizer
    adapter = adapter_settings(source, revision)
    if adapter is None:
        return None
    return load_tokenizer(adapter["base_model_name_or_path"], adapter.get("revision"), trust_remote_code)


def _vocabulary(source: str, revision: str | None, names: Sequence[str]) -> str | None:
    """The first of the named files that the folder or hub id has."""

    def has(name: str) -> bool:
        if Path(source).is_dir():
            return Path(source, name).is_file()
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        try:
            return cached_file(source, name, revision=revision, **quiet) is not None
        except OSError:  # no such folder or hub id: what reads the checkpoint says so
            return False

    return next((name for name in dict.fromkeys(names) if has(name)), None)


def _broken(source: str, file: str, error: Exception) -> InputError:
    mend = "save it there again"
    if file.endswith(".model"):
        mend = f"{file} is damaged, or what reads it is missing: pip install sentencepiece protobuf"
    return InputError(f"{source}: its tokenizer cannot be loaded ({type(error).__name__}: {error}); {mend}")


def check_size(tokenizer: Any, rows: int, source: str) -> None:
    """Refuse a tokenizer that is not that of a model with `rows` embeddings.

    A vocabulary is often padded, so that a model knows some more tokens than its tokenizer.

    Raises:
        InputError: it has less than `SMALLEST_SHARE` of them.
    """
    if tokenizer is not None and len(tokenizer) < SMALLEST_SHARE * rows:
        raise InputError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) knows {len(tokenizer):,} tokens and its model "
            f"{rows:,}, so it is not the model's; put the files of the model's own tokenizer there"
        )


def start_tokens(tokenizer: Any, setting: str) -> list[int]:
    """Tokens in front of a text: as `corpus.start` has it, under `auto` those that the tokenizer itself puts there.

    These are found with a text of one letter: the special tokens that its encoding begins with, and no more of them
    than the tokenizer adds (it may end texts with one, too).

    Raises:
        InputError: `always`, and the tokenizer has no start token.
    """
    if setting == "never":
        return []
    if setting == "always":
        if tokenizer.bos_token_id is None:
            raise InputError(
                f"{tokenizer.name_or_path}: corpus.start is always, but its tokenizer has no start token (bos_token); "
                "set corpus.start to auto"
            )
        return [int(tokenizer.bos_token_id)]
    both = tokenizer("a", return_special_tokens_mask=True)
    ids, special = both["input_ids"], both["special_tokens_mask"]
    added = len(ids) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
    leading = next((i for i, mark in enumerate(special) if not mark), len(special))
    return list(ids[: min(added, leading)])


@dataclass(frozen=True)
class EndOfTexts:
    """The token that ends a text, None without one, and those after which none is put."""

    token: int | None
    ending: frozenset[int]

    def put_after(self, ids: list[int]) -> list[int]:
        """A text's tokens with their end."""
        return ids if self.token is None or (ids and ids[-1] in self.ending) else [*ids, self.token]


def end_of_texts(tokenizer: Any) -> EndOfTexts:
    """How its texts end: also with other special tokens than its end token, as those of a chat's turns."""
    if tokenizer is None:
        return EndOfTexts(None, frozenset())
    end = tokenizer.eos_token_id
    return EndOfTexts(end, frozenset(special_tokens(tokenizer) - {unknown_token(tokenizer)} | {end}))


def special_tokens(tokenizer: Any) -> set[int]:
    """Tokens that are no text: the start, the end, those of a chat's turns."""
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | set(tokenizer.all_special_ids)


def unknown_token(tokenizer: Any) -> int | None:
    """The token of what a vocabulary lacks; None where it lacks nothing, or where that token begins or ends texts."""
    if tokenizer is None or tokenizer.unk_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id):
        return None
    token = int(tokenizer.unk_token_id)
    return token if token in tokenizer(RARE, add_special_tokens=False)["input_ids"] else None


def first_unknown(tokenizer: Any, text: str) -> str:
    """The characters of a text that become its first unknown token; without offsets, the text's beginning."""
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token == tokenizer.unk_token_id:
                return text[start:end][:40]
    return text[:40]


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Digest of what a tokenizer does, less the truncation and padding that its last call left in it."""
    if tokenizer is None:
        return None
    named = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.chat_template, tokenizer.split_special_tokens)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = (tokenizer.get_vocab(), _vocabulary_digests(tokenizer))
        return storage.fingerprint(type(tokenizer).__name__, *vocabulary, _options(tokenizer), *named)
    state = json.loads(backend.to_str())
    return storage.fingerprint({**state, "truncation": None, "padding": None}, *named)


def _vocabulary_digests(tokenizer: Any) -> list[str]:
    """Of a slow tokenizer's files: merges and normalizers are in them, and not in its vocabulary."""
    with TemporaryDirectory() as folder:
        try:
            files = tokenizer.save_vocabulary(folder) or ()
        except Exception:  # of many kinds: code of others, and not every class has such files
            return []
        return [storage.file_digest(Path(file)) for file in files]


def _options(tokenizer: Any) -> dict[str, Any]:
    """What a slow tokenizer was made with and kept, as whether it lowers cases, less where it was found."""
    plain = {
        name: value for name, value in tokenizer.init_kwargs.items() if isinstance(value, str | int | float | dict)
    }
    return {name: value for name, value in plain.items() if name not in FOUND_AT and not name.endswith("_file")}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token reads as in its place, so that joined they are the text; its number without a tokenizer.

    Of a character whose bytes are several tokens, the first has the character and the others nothing. A token that
    a decoder leaves out (the space that SentencePiece puts before a text) has nothing either (`reads_as_nothing`).
    """
    if tokenizer is None:
        return [str(int(token)) for token in ids]

    def read(tokens: Sequence[int]) -> str:
        return str(
            tokenizer.decode([int(t) for t in tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    texts = [""] * len(ids)
    before, first = 0, 0  # tokens of the piece before, which a decoder may need to see, and of the one at hand
    for i in range(len(ids)):
        piece = read(ids[before : i + 1])[len(read(ids[before:first])) :]
        # Decoders replace the bytes of half a character, or drop them.
        half = piece.endswith(REPLACEMENT) or (not piece and not reads_as_nothing(tokenizer, ids[i]))
        if half and i + 1 < len(ids) and i - first < 3:  # a character is four bytes at most
            continue
        if REPLACEMENT in piece:  # no whole character comes of these bytes
            texts[first : i + 1] = [read([token]) for token in ids[first : i + 1]]
        else:
            texts[first] = piece
        before, first = first, i + 1
    return texts


def reads_as_nothing(tokenizer: Any, token: int) -> bool:
    """Whether a token without text stands for itself: a space that decoding leaves out, or a number without a token.

    Others are parts of a character.
    """
    name = tokenizer.convert_ids_to_tokens(int(token))
    return name is None or not name.strip(SPACES)
