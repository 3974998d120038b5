"""Recall, fact tracing and tail-patch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from msif_core.batching import Sequences, sequence_fingerprint
from msif_core.errors import InputError
from msif_core.evaluation.facts import MISSED, ranks_of_rankings, ranks_of_scores, trace_facts
from msif_core.evaluation.recall import recall_at_k
from msif_core.evaluation.tail_patch import tail_patch


def sequences_of(tokens: list[list[int]]) -> Sequences:
    ids = [np.array(row, np.int32) for row in tokens]
    return Sequences(
        ids, ids, [sequence_fingerprint(row, row) for row in ids], [str(i) for i in range(len(ids))],
        np.arange(len(ids)),
    )  # fmt: skip


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return GPTNeoXForCausalLM(config).eval().requires_grad_(False)


def test_recall_counts_the_exact_best_that_were_found() -> None:
    exact = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    ids = np.array([10, 11, 12, 13])
    retrieved = np.array([[10, 12, -1], [13, 12, 10]])
    assert recall_at_k(exact, ids, retrieved, 2) == pytest.approx(0.75)
    np.testing.assert_allclose(recall_at_k(exact, ids, retrieved, 2, per_query=True), [0.5, 1.0])
    assert recall_at_k(exact, ids, np.tile(ids, (2, 1)), 100) == 1.0


@pytest.mark.parametrize(
    ("exact", "ids", "retrieved", "k"),
    [
        (np.zeros((1, 2)), [1, 2, 3], [[1]], 1),
        (np.zeros((2, 2)), [1, 2], [[1]], 1),
        (np.zeros((1, 0)), [], [[1]], 1),
        (np.zeros((1, 2)), [1, 2], [[1]], 0),
        (np.array([[np.nan, 1.0]]), [1, 2], [[1]], 1),
    ],
)
def test_recall_refuses_what_does_not_fit(exact: object, ids: object, retrieved: object, k: int) -> None:
    with pytest.raises(InputError, match="recall"):
        recall_at_k(exact, ids, retrieved, k)


def test_ranks_of_scores_and_of_rankings() -> None:
    gold = [["b"], ["a", "c"], [], ["elsewhere"]]
    scores = np.array([[3, 2, 1], [1, 1, 2], [0, 0, 0], [1, 2, 3]], np.float32)
    assert ranks_of_scores(scores, ["a", "b", "c"], gold) == [[2], [3, 1], [], [MISSED]]  # a tie counts against
    rankings = [["a", "b"], ["c", "b", "c"], ["a"], []]
    assert ranks_of_rankings(rankings, gold) == [[2], [MISSED, 1], [], [MISSED]]
    with pytest.raises(InputError, match="fact tracing"):
        ranks_of_scores(scores[:2], ["a", "b", "c"], gold)
    with pytest.raises(InputError, match="fact tracing"):
        ranks_of_rankings(rankings[:1], gold)


def test_fact_tracing_leaves_controls_out() -> None:
    traced = trace_facts([[2], [3, 1], [], [MISSED]], ks=(1, 3))
    assert traced.queries == 3
    assert traced.mrr == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert traced.recall == pytest.approx({1: (0 + 0.5 + 0) / 3, 3: (1 + 1 + 0) / 3})
    with pytest.raises(InputError, match="no query has gold_doc_ids; give some the ids of the documents"):
        trace_facts([[], []])


def test_tail_patch_prefers_the_query_itself_and_touches_nothing(model: torch.nn.Module) -> None:
    queries = sequences_of([[1, 2, 3, 4, 5], [6, 7, 8, 9]])
    others = sequences_of([[20, 21, 22, 23], [24, 25, 26]])
    before = copy.deepcopy(model.state_dict())
    steps: list[tuple[int, int]] = []
    retrieved = {
        "itself": [queries.take([0]), queries.take([1])],
        "others": [others, others],
        "again": [queries.take([0]), queries.take([])],
    }
    changes = tail_patch(model, queries, retrieved, 0.1, progress=lambda *step: steps.append(step))
    assert (changes["itself"] < 0).all()
    assert (changes["itself"] < changes["others"]).all()
    assert changes["again"][0] == changes["itself"][0], "the copy is not put back exactly between steps"
    assert np.isnan(changes["again"][1])
    assert steps[-1] == (6, 6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_tail_patch_is_the_first_order_change_for_a_small_step(model: torch.nn.Module) -> None:
    model = model.double()
    query, document = sequences_of([[1, 2, 3, 4]]), sequences_of([[2, 3, 4, 9, 1]])

    def gradient(sequences: Sequences) -> torch.Tensor:
        twin = copy.deepcopy(model).requires_grad_(True)
        ids = torch.tensor(np.stack(sequences.input_ids), dtype=torch.long)
        loss = twin(input_ids=ids, labels=ids).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))])

    rate = 1e-5
    change = tail_patch(model, query, {"m": [document]}, rate)["m"][0]
    expected = -rate * float(gradient(query) @ gradient(document)) * 3  # three targets in the query's sum
    assert change == pytest.approx(expected, rel=1e-2)


def test_tail_patch_needs_documents_for_every_query(model: torch.nn.Module) -> None:
    queries = sequences_of([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(InputError, match="1 of 2 queries"):
        tail_patch(model, queries, {"short": [queries]}, 0.1)
