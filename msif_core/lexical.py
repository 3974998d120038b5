"""BM25 over the words of documents (the library bm25s), as a second source of candidates."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path

import bm25s
import numpy as np
import numpy.typing as npt

from msif_core import storage

WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words; BM25 fed with raw strings would score characters."""
    return WORD.findall(text.lower())


class LexicalIndex:
    """A BM25 index that knows its documents' ids."""

    def __init__(self, bm25: bm25s.BM25, documents: list[str]) -> None:
        self._bm25 = bm25
        self.documents = documents

    @classmethod
    def build(cls, documents: Iterable[tuple[str, str]]) -> LexicalIndex:
        """Index ids and texts, by id: ties fall alike in whatever order they come.

        Of a text its words' numbers are held: 4 bytes a word, and about 16 more for each different one.
        """
        vocabulary: dict[str, int] = {}
        found = {
            name: array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words(text) or [""]])
            for name, text in documents
        }
        names = sorted(found)
        bm25 = bm25s.BM25()
        bm25.index(([found.pop(name) for name in names], vocabulary), show_progress=False)
        return cls(bm25, names)

    def save(self, folder: Path) -> None:
        """Write the index below `folder`."""
        self._bm25.save(str(folder))
        storage.write_json(folder / "documents.json", self.documents)

    @classmethod
    def load(cls, folder: Path) -> LexicalIndex:
        """Open a saved index, memory-mapped."""
        return cls(bm25s.BM25.load(str(folder), mmap=True), storage.read_json(folder / "documents.json"))

    def search(self, texts: Sequence[str], k: int) -> list[list[str]]:
        """The k best documents for each text, best first; documents that share no word are left out."""
        k = min(k, len(self.documents))
        found: list[list[str]] = []
        for text in texts:
            known = self._known(text)
            if not known or k < 1:
                found.append([])
                continue
            rows, scores = self._bm25.retrieve([known], k=k, show_progress=False)
            found.append([self.documents[int(r)] for r, s in zip(rows[0], scores[0], strict=True) if s > 0])
        return found

    def scores(self, texts: Sequence[str], documents: Sequence[str]) -> npt.NDArray[np.float32]:
        """BM25 scores [texts, documents] of documents of this index; -inf where no word is shared."""
        rows = [bisect_left(self.documents, name) for name in documents]
        found = np.full((len(texts), len(rows)), -np.inf, dtype=np.float32)
        for row, text in zip(found, texts, strict=True):
            if known := self._known(text):
                row[:] = self._bm25.get_scores(known)[rows]
        return np.where(found > 0, found, -np.inf).astype(np.float32)

    def _known(self, text: str) -> list[str]:
        """The text's words that some document has: bm25s fails on others."""
        return [word for word in words(text) if word in self._bm25.vocab_dict]
