"""BM25 over words: what it finds, what it survives, and that it stands on disk."""

from pathlib import Path

import pytest

from msif_core.lexical import LexicalIndex, words

TEXTS = ["The moon orbits.", "Red water is a disease of cattle.", "Moon, moon and stars", "..."]
NAMES = ["orbit", "disease", "moons", "empty"]


@pytest.fixture(scope="module")
def index() -> LexicalIndex:
    return LexicalIndex.build(zip(NAMES, TEXTS, strict=True))


def test_words_are_words_not_characters():
    assert words("Red-water, NAÏVE 42!") == ["red", "water", "naïve", "42"]


def test_best_document_first_and_only_those_that_share_a_word(index: LexicalIndex):
    found = index.search(["moon", "RED WATER"], 4)
    assert sorted(found[0]) == ["moons", "orbit"]
    assert found[1] == ["disease"]


def test_k_limits_the_answer(index: LexicalIndex):
    assert len(index.search(["moon"], 1)[0]) == 1
    assert index.search(["moon"], 0) == [[]]


def test_ties_fall_alike_whatever_the_order_of_the_documents():
    documents = [(f"d{i:02d}", f"kite number{i % 3}") for i in range(30)]
    there, back = LexicalIndex.build(documents), LexicalIndex.build(documents[::-1])
    assert there.search(["kite"], 7) == back.search(["kite"], 7)


@pytest.mark.parametrize("text", ["", "?!", "zebra", "zebra unicorn"])
def test_a_query_without_a_known_word_finds_nothing(index: LexicalIndex, text: str):
    assert index.search([text], 3) == [[]]


def test_an_unknown_word_beside_a_known_one_changes_nothing(index: LexicalIndex):
    assert index.search(["moon zebra"], 3) == index.search(["moon"], 3)


def test_saved_and_loaded_it_answers_the_same(index: LexicalIndex, tmp_path: Path):
    index.save(tmp_path / "bm25")
    loaded = LexicalIndex.load(tmp_path / "bm25")
    assert loaded.documents == sorted(NAMES)
    asked = ["moon", "water cattle", "zebra"]
    assert loaded.search(asked, 3) == index.search(asked, 3)
    assert not list((tmp_path / "bm25").glob("*.pkl"))
