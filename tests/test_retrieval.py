"""The pure half of retrieval: sums per document, percentiles, near-duplicates."""

import numpy as np

from msif_core.retrieval import Candidates, by_document, duplicate_groups, percentiles


def test_document_scores_sum_their_sequences_and_keep_the_best():
    scores = np.array([[1.0, -2.0, 3.0, 0.5]], dtype=np.float32)
    result = by_document(scores, ["b", "a", "b", "a"], np.array([10, 11, 12, 13]))
    assert result.documents == ["a", "b"]
    np.testing.assert_allclose(result.total, [[-1.5, 4.0]])
    np.testing.assert_allclose(result.best, [[-2.0, 3.0]], err_msg="an opponent's strongest is its lowest")
    np.testing.assert_array_equal(result.best_sequence, [[11, 12]])
    np.testing.assert_array_equal(result.best_row, [[1, 2]])


def test_percentile_is_the_share_of_the_other_sampled_documents_below():
    scores = np.array([[0.0, 2.5, 9.0, 1, 2, 3, 4], [5, 5, 5, 5, 5, 5, 5]], dtype=np.float32)
    result, others = percentiles(scores, np.array([3, 4, 5, 6]))
    np.testing.assert_allclose(result[0], [0, 50, 100, 0, 100 / 3, 200 / 3, 100], rtol=1e-6)
    np.testing.assert_allclose(result[1], 0, err_msg="equal is not below")
    assert others.tolist() == [4, 4, 4, 3, 3, 3, 3]


def test_percentile_without_a_sample_or_against_itself_alone_is_unknown():
    none, _ = percentiles(np.zeros((1, 2), np.float32), np.zeros(0, np.int64))
    assert np.isnan(none).all()
    alone, others = percentiles(np.array([[3.0, 1.0]], np.float32), np.array([1]))
    assert alone[0, 0] == 100
    assert np.isnan(alone[0, 1])
    assert others.tolist() == [1, 0]


def test_near_duplicates_share_a_group():
    texts = [
        "the quick brown fox jumps over the lazy dog today",
        "an entirely different sentence about the sea and ships",
        "the quick brown fox jumps over the lazy dog now",
    ]
    assert duplicate_groups(texts) == [0, 1, 0]
    assert duplicate_groups(["", "", *texts]) == [0, 1, 2, 3, 2], "documents of tokens alone are not duplicates"


def test_candidate_sources_are_told_apart():
    candidates = Candidates()
    candidates.add(["a", "b"], "gradient")
    candidates.add(["b", "c"], "bm25")
    assert [candidates.label(name) for name in "abcd"] == ["gradient", "both", "bm25", "exact"]
