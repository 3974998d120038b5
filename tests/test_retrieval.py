"""The pure half of retrieval: sums per document, percentiles, near-duplicates."""

import numpy as np

from msif_core.retrieval import Candidates, by_document, duplicate_groups, percentiles


def test_document_scores_sum_their_sequences_and_keep_the_best():
    scores = np.array([[1.0, -2.0, 3.0, 0.5]], dtype=np.float32)
    result = by_document(scores, ["b", "a", "b", "a"], np.array([10, 11, 12, 13]))
    assert result.documents == ["a", "b"]
    np.testing.assert_allclose(result.total, [[-1.5, 4.0]])
    np.testing.assert_allclose(result.best, [[0.5, 3.0]])
    np.testing.assert_array_equal(result.best_sequence, [[13, 12]])


def test_percentile_is_the_share_of_the_sample_below():
    result = percentiles(np.array([[0.0, 2.5, 9.0]], dtype=np.float32), np.array([[1, 2, 3, 4]], dtype=np.float32))
    np.testing.assert_allclose(result, [[0.0, 50.0, 100.0]])


def test_percentile_without_a_sample_is_unknown():
    assert np.isnan(percentiles(np.zeros((1, 2), np.float32), np.zeros((1, 0), np.float32))).all()


def test_near_duplicates_share_a_group():
    texts = [
        "the quick brown fox jumps over the lazy dog today",
        "an entirely different sentence about the sea and ships",
        "the quick brown fox jumps over the lazy dog now",
    ]
    assert duplicate_groups(texts) == [0, 1, 0]


def test_candidate_sources_are_told_apart():
    candidates = Candidates()
    candidates.add(["a", "b"], "gradient")
    candidates.add(["b", "c"], "bm25")
    assert [candidates.label(name) for name in "abcd"] == ["gradient", "both", "bm25", "exact"]
