"""Captured inputs and output gradients against autograd's weight gradients; invariances; refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from msif_core.batching import IGNORED, Batch, Sequences, batches
from msif_core.capture import capture, counted_positions
from msif_core.config import CurvatureSettings
from msif_core.curvature.fit import NonFiniteError, covariance_sums, finite_sequences
from msif_core.errors import InputError
from msif_core.forward import forward
from msif_core.losses import target_loss
from msif_core.models import freeze
from msif_core.rows import Rows
from msif_core.scoring import query_gradients
from msif_core.tracking import TrackedMap, tracked_maps
from tests import weights
from tests.conftest import VOCAB, make_model, make_sequences, task_of, tolerance

ROOMY = 10_000


def only(sequences: Sequences) -> Batch:
    (batch,) = batches(sequences, ROOMY)
    return batch


def weight_gradient(model: Any, m: TrackedMap, batch: Batch, task: str) -> torch.Tensor:
    """Autograd's gradient of the summed loss by the map's weight and bias, as [G, b, d_in]."""
    parameters = [model.get_parameter(name) for name in weights.names_of(model, m)]
    for p in parameters:
        p.requires_grad_(True)
    gradients = torch.autograd.grad(target_loss(task)(forward(model, batch), batch), parameters)
    for p in parameters:
        p.requires_grad_(False)
    return weights.of_map(model, m, list(gradients))


@pytest.mark.parametrize("split", ["none", "projection", "head"])
def test_gradients_equal_autograd(architecture: str, split: Any, small_models: dict[str, Any]) -> None:
    model, task = small_models[architecture], task_of(architecture)
    maps = tracked_maps(model, CurvatureSettings(qkv_split=split))
    sequences = make_sequences(4, task=task)
    found = query_gradients(model, maps, sequences, ROOMY, task=task)
    for m in maps:
        expected = weight_gradient(model, m, only(sequences), task)
        torch.testing.assert_close(found[m.name].sum(0), expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_the_backward_ends_at_the_first_map_of_a_sweep(architecture: str, small_models: dict[str, Any]) -> None:
    """Maps of a later layer: the same bits as among all maps, and nothing below them keeps a graph."""
    model, task = small_models[architecture], task_of(architecture)
    maps = tracked_maps(model, CurvatureSettings())
    later = maps[len(maps) // 2 :]
    sequences = make_sequences(3, task=task)
    together = query_gradients(model, maps, sequences, ROOMY, task=task)
    graphs: dict[str, bool] = {}
    hooks = [
        model.get_submodule(m.name).register_forward_hook(
            lambda _module, args, _output, name=m.name: graphs.__setitem__(name, args[0].requires_grad)
        )
        for m in maps
        if m.expert is None
    ]
    alone = query_gradients(model, later, sequences, ROOMY, task=task)
    for hook in hooks:
        hook.remove()
    for m in later:
        assert torch.equal(alone[m.name], together[m.name])
    first = [m.name for m in maps if m not in later or m.input_group == later[0].input_group]
    assert not any(graphs[name] for name in first if name in graphs)
    assert graphs[[m.name for m in later if m.name in graphs][-1]]


def test_a_module_may_write_into_a_maps_output() -> None:
    """As an activation in place does, here on the first layer's maps, where the graph starts."""
    model = make_model("gpt_neox")
    maps = tracked_maps(model, CurvatureSettings())
    expected = query_gradients(model, maps, make_sequences(2), ROOMY, task="causal_lm")
    mlp = model.gpt_neox.layers[0].mlp
    mlp.act = torch.nn.Sequential(torch.nn.Threshold(-1e9, 0.0, inplace=True), mlp.act)
    written = query_gradients(model, maps, make_sequences(2), ROOMY, task="causal_lm")
    for m in maps:
        assert torch.equal(written[m.name], expected[m.name])


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_map_that_does_not_reach_the_loss_has_no_rows(called: bool, alone: bool) -> None:
    model = make_model("gpt_neox")
    model.add_module("aside", torch.nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False))

    def call_aside(_module: Any, _arguments: Any, embedded: torch.Tensor) -> None:
        model.aside(embedded[..., :4])

    if called:
        model.get_input_embeddings().register_forward_hook(call_aside)
    others = [] if alone else tracked_maps(make_model("gpt_neox"), CurvatureSettings())
    aside = TrackedMap("aside", 5, 4, True, 1, 1, "aside")
    seen: list[str] = []
    maps = [*others, aside]
    capture(model, maps, only(make_sequences(2)), target_loss("causal_lm"), lambda m, _rows: seen.append(m.name))
    assert sorted(seen) == sorted(m.name for m in others)


def test_gradient_does_not_depend_on_the_batch(architecture: str, small_models: dict[str, Any]) -> None:
    """Alone, in a padded batch, or in another order: the same gradient, and the same inputs and labels drawn."""
    close = tolerance(architecture)
    model, task = small_models[architecture], task_of(architecture)
    maps = tracked_maps(model, CurvatureSettings())
    sequences = make_sequences(5, task=task)
    together = query_gradients(model, maps, sequences, ROOMY, task=task)
    backwards = query_gradients(model, maps, sequences.take(range(4, -1, -1)), ROOMY, task=task)
    sums = covariance_sums(model, maps, sequences, task=task, seed=3, batch_tokens=ROOMY)
    singles = [
        covariance_sums(model, maps, sequences.take([i]), task=task, seed=3, batch_tokens=ROOMY) for i in range(5)
    ]
    for key, value in sums.items():
        torch.testing.assert_close(value, sum(s[key] for s in singles), **close)
    for m in maps:
        torch.testing.assert_close(backwards[m.name].flip(0), together[m.name], **close)
        for i in range(5):
            single = query_gradients(model, maps, sequences.take([i]), ROOMY, task=task)[m.name][0]
            torch.testing.assert_close(together[m.name][i], single, **close)


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_a_pass_are_as_the_model_says(tf32: bool) -> None:
    model = freeze(make_model("gpt_neox", dtype=torch.float32), tf32)
    maps = tracked_maps(model, CurvatureSettings())
    seen: list[str] = []

    def consume(*_: Any) -> None:
        seen.append(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision("medium")  # what the user's own code has asked for
    try:
        capture(model, maps, only(make_sequences(2)), target_loss("causal_lm"), consume)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"high" if tf32 else "highest"}


def test_bf16_is_close(decoder: str) -> None:
    sequences = make_sequences(6, lengths=(8, 12))
    fine, coarse = make_model(decoder), make_model(decoder, dtype=torch.bfloat16)
    maps = tracked_maps(fine, CurvatureSettings())
    exact = query_gradients(fine, maps, sequences, ROOMY, task="causal_lm")
    rough = query_gradients(coarse, maps, sequences, ROOMY, task="causal_lm")
    a = torch.cat([exact[m.name].flatten() for m in maps])
    b = torch.cat([rough[m.name].flatten() for m in maps]).double()
    assert rough[maps[0].name].dtype == torch.float32
    # A token on the border between two experts may go to the other one.
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > (0.99 if decoder == "mixtral" else 0.995)


@pytest.mark.parametrize("architecture", ["gpt_neox", "bloom", "gpt2"])
def test_fused_blocks_are_query_key_value(architecture: str) -> None:
    """A change of the values moves the attention's output, not its weights; blocks are told apart by that.

    Key rows with their bias alone have no effect (softmax is shift invariant): the key block's bias gradient is 0.
    """
    model = make_model(architecture)
    maps = tracked_maps(model, CurvatureSettings(qkv_split="projection"))
    fused = [m for m in maps if m.groups == 3]
    assert len(fused) == 2
    found = query_gradients(model, fused, make_sequences(4), ROOMY, task="causal_lm")
    for m in fused:
        bias = found[m.name][..., -1].abs().amax(dim=(0, 2))  # [3]
        if architecture != "gpt_neox":  # rotary keys: a constant key does turn with the position
            assert bias[1] < 1e-5 * bias[2]  # BLOOM's softmax is in float32
            assert bias[0] > 1e-3 * bias[2]
        assert bias[2] > 0


@pytest.mark.parametrize("architecture", ["gpt_neox", "bloom", "gpt2"])
def test_fused_blocks_against_the_models_own_attention(architecture: str) -> None:
    """One head's values alone change: exactly that head's slice of the context does."""
    model = make_model(architecture)
    m = next(m for m in tracked_maps(model, CurvatureSettings(qkv_split="head")) if m.groups == 6)
    p = next(m for m in tracked_maps(model, CurvatureSettings(qkv_split="projection")) if m.groups == 3)
    order = p.blocks(torch.arange(p.d_out)).flatten()
    module = model.get_submodule(m.name)
    parent = m.name.rpartition(".")[0]
    output = model.get_submodule(f"{parent}.{'c_proj' if architecture == 'gpt2' else 'dense'}")
    seen: list[torch.Tensor] = []
    handle = output.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(1, -1, 2, 4).clone()))
    batch = only(make_sequences(1, lengths=(6, 7)))
    rows = {  # rows of head 1 by both splits
        "v": order.view(3, 2, 4)[2, 1],
        "q": order.view(3, 2, 4)[0, 1],
    }
    head_rows = torch.arange(24).view(6, 4)
    per_head = {"v": head_rows[5], "q": head_rows[3 if architecture != "gpt2" else 1]}
    try:
        forward(model, batch)
        for kind in ("v", "q"):
            assert torch.equal(rows[kind], per_head[kind])
            before = module.bias.detach().clone()
            module.bias.data[rows[kind]] += 1.0
            forward(model, batch)
            module.bias.data.copy_(before)
    finally:
        handle.remove()
    base, values, queries = seen
    torch.testing.assert_close(values - base, torch.zeros_like(base).index_fill(2, torch.tensor([1]), 1.0))
    assert torch.equal(queries[:, :, 0], base[:, :, 0])  # the other head is left alone
    torch.testing.assert_close(queries[:, 0, 1], base[:, 0, 1])  # the first position attends to itself only
    assert not torch.allclose(queries[:, 1:, 1], base[:, 1:, 1])


def test_grouped_keys_and_shared_inputs() -> None:
    maps = {m.name.split(".", 3)[-1]: m for m in tracked_maps(make_model("llama"), CurvatureSettings(qkv_split="head"))}
    assert maps["self_attn.q_proj"].groups == 2
    assert maps["self_attn.k_proj"].groups == maps["self_attn.v_proj"].groups == 1  # one key head, so one block
    shared = [maps[f"self_attn.{x}_proj"].input_group for x in "qkv"]
    assert len(set(shared)) == 1
    assert maps["mlp.gate_proj"].input_group == maps["mlp.up_proj"].input_group != maps["mlp.down_proj"].input_group


def test_labels_are_shifted(decoder: str, small_models: dict[str, Any]) -> None:
    """One label at position p: the gradient comes from p-1's logits, and from nothing at p or after."""
    model = small_models[decoder]
    maps = tracked_maps(model, CurvatureSettings())
    sequences = make_sequences(1, lengths=(8, 9))
    labels = np.full(8, IGNORED, np.int32)
    labels[4] = sequences.input_ids[0][4]
    sequences = Sequences([sequences.input_ids[0]], [labels], ["0" * 16], ["doc"], np.zeros(1, np.int64))
    batch = only(sequences)
    log_p = forward(model, batch).logits.log_softmax(-1)
    torch.testing.assert_close(target_loss("causal_lm")(forward(model, batch), batch), -log_p[0, 3, labels[4]])
    seen: dict[str, Rows] = {}
    capture(model, maps, batch, target_loss("causal_lm"), lambda m, rows: seen.update({m.name: rows}))
    for rows in seen.values():
        late = rows.tokens[0] > 3
        assert (rows.d[0, late] == 0).all()
        assert (rows.a[0, late] == 0).all()
    whole = [m.name for m in maps if m.expert is None]
    assert all(seen[name].a[0, 3].abs().sum() > 0 for name in whole)
    assert seen[whole[-1]].d[0, 3].abs().sum() > 0


def test_prompts_count_and_padding_does_not(decoder: str, small_models: dict[str, Any]) -> None:
    model = small_models[decoder]
    values = ("query_key_value", "c_attn", "v_proj")
    m = next(m for m in tracked_maps(model, CurvatureSettings()) if m.name.endswith(values))
    batch = only(make_sequences(3))
    counted = counted_positions(model, batch)
    assert counted is not None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    capture(model, [m], batch, target_loss("causal_lm"), lambda _m, rows: seen.append((rows.a, rows.d)))
    a, d = seen[0]
    outside = ~counted
    assert (a[outside] == 0).all()
    assert (d[outside] == 0).all()
    assert d[:, 0].abs().amax(dim=(1, 2)).min() > 0  # prompt tokens receive gradient through attention


def test_a_decoder_classifier_reads_its_last_real_token() -> None:
    model = make_model("llama", task="classification")
    sequences = make_sequences(3, task="classification")
    model.config.pad_token_id = VOCAB - 1
    together = forward(model, only(sequences)).logits
    for row, i in zip(together, only(sequences).rows, strict=True):
        torch.testing.assert_close(row, forward(model, only(sequences.take([i]))).logits[0])
    model.config.pad_token_id = None
    with pytest.raises(InputError, match="classifier without a padding token"):
        forward(model, only(sequences))


def test_a_map_called_twice_has_the_gradient_of_both_calls() -> None:
    model = make_model("gpt_neox")
    model.gpt_neox.layers[1].mlp = model.gpt_neox.layers[0].mlp
    maps = tracked_maps(model, CurvatureSettings())
    twice = [m for m in maps if ".mlp." in m.name]
    assert len(twice) == 2, "a module that two places share is tracked once"
    sequences = make_sequences(3)
    found = query_gradients(model, maps, sequences, ROOMY, task="causal_lm")
    for m in maps:
        expected = weight_gradient(model, m, only(sequences), "causal_lm")
        torch.testing.assert_close(found[m.name].sum(0), expected, rtol=1e-9, atol=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_that_read_different_inputs_share_nothing() -> None:
    """As in MobileBERT, whose values read another tensor than its queries and keys."""
    model = make_model("bert")
    attention = model.bert.encoder.layer[1].attention.self
    attention.value.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    maps = tracked_maps(model, CurvatureSettings())
    groups = [m.input_group for m in maps if "layer.1.attention.self" in m.name]
    assert len(set(groups)) == 3
    sequences = make_sequences(3, task="classification")
    found = query_gradients(model, maps, sequences, ROOMY, task="classification")
    for m in maps:
        expected = weight_gradient(model, m, only(sequences), "classification")
        torch.testing.assert_close(found[m.name].sum(0), expected, rtol=1e-9, atol=1e-12)


def test_a_map_that_stops_reading_what_its_siblings_read_is_refused() -> None:
    """A and a are taken once for all of them."""
    model = make_model("bert")
    maps = tracked_maps(model, CurvatureSettings())
    attention = model.bert.encoder.layer[1].attention.self
    attention.value.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    with pytest.raises(InputError, match=r"layer.1.attention.self.value: reads another input than the maps"):
        query_gradients(model, maps, make_sequences(2, task="classification"), ROOMY, task="classification")


def test_non_finite_gradients_are_found() -> None:
    model = make_model("gpt_neox")
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
    sequences = make_sequences(6, lengths=(6, 9))
    for i, ids in enumerate(sequences.input_ids):
        ids[ids == 3] = 4
        if i == 2:
            ids[1] = 3
    maps = tracked_maps(model, CurvatureSettings())
    flags = finite_sequences(model, maps, sequences, task="causal_lm", batch_tokens=ROOMY)
    assert flags.tolist() == [True, True, False, True, True, True]
    with pytest.raises(NonFiniteError, match="NaN or infinite gradients from document 'doc2'") as caught:
        covariance_sums(model, maps, sequences, task="causal_lm", seed=0, batch_tokens=ROOMY)
    assert caught.value.rows.tolist() == [2]


def test_threads_that_share_a_model_do_not_mix_their_passes() -> None:
    model = make_model("gpt_neox")
    maps = tracked_maps(model, CurvatureSettings())
    parts = [make_sequences(6, seed, lengths=(5, 12)) for seed in range(8)]

    def gradients(part: Sequences) -> dict[str, torch.Tensor]:
        return query_gradients(model, maps, part, 16, task="causal_lm")

    alone = [gradients(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, parts))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[m.name], other[m.name]) for m in maps)
