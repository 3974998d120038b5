"""The training loop and the demo's tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from msif_core import storage
from msif_core.batching import IGNORED, Sequences, batches, sequence_fingerprint
from msif_core.config import Training
from msif_core.errors import InputError
from msif_core.training import (
    Architecture,
    learning_rates,
    mean_token_loss,
    new_model,
    optimize,
    sequence_losses,
    step_count,
    step_rows,
    train_stage,
    train_tokenizer,
)  # fmt: skip

COLOURS, ANIMALS = ("red", "blue", "grey"), ("cat", "dog")
TEXTS = [f"the {colour} {animal} sat on the {colour} mat" for colour in COLOURS for animal in ANIMALS]
SMALL = Architecture(hidden=16, layers=1, heads=2, positions=32)


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return train_tokenizer(TEXTS, vocabulary=280)


def sequences_of(tokenizer: object, prompt: int = 0) -> Sequences:
    ids = [np.array([*tokenizer(text)["input_ids"], tokenizer.eos_token_id], np.int32) for text in TEXTS]
    labels = [np.where(np.arange(len(row)) < prompt, IGNORED, row).astype(np.int32) for row in ids]
    prints = [sequence_fingerprint(a, b) for a, b in zip(ids, labels, strict=True)]
    return Sequences(ids, labels, prints, [str(i) for i in range(len(ids))], np.arange(len(ids)))


def test_tokenizer_encodes_every_text_and_survives_a_reload(tokenizer: object, tmp_path: Path) -> None:
    text = "naïve café 猫 <tab>\t🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_schedule_warms_up_then_falls() -> None:
    rates = learning_rates(Training(learning_rate=1.0, warmup=0.1), 100)
    assert len(rates) == 100
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rates(Training(), 1) == [Training().learning_rate]


def test_an_epoch_visits_every_row_once_and_sorts_by_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 203)
    settings = Training(epochs=2, batch_size=10)
    steps = list(step_rows(lengths, settings))
    assert len(steps) == step_count(203, settings) == 42
    for epoch in (steps[:21], steps[21:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(203))
    padded = sum(len(s) * lengths[s].max() for s in steps[:21])
    assert padded < 1.15 * lengths.sum()
    again = list(step_rows(lengths, settings))
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))
    assert step_count(203, Training(epochs=0.5, batch_size=10)) == 11


def test_training_learns_is_deterministic_and_is_reused(tokenizer: object, tmp_path: Path) -> None:
    recipe = Training(learning_rate=1e-2, epochs=10, batch_size=3)
    data = sequences_of(tokenizer)
    state = torch.random.get_rng_state()
    first = train_stage(new_model(tokenizer, SMALL), data, tmp_path / "a", recipe, tokenizer)
    second = train_stage(new_model(tokenizer, SMALL), data, tmp_path / "b", recipe, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    record = storage.read_json(first / "training.json")
    assert record == storage.read_json(second / "training.json")
    weights = "model.safetensors"
    assert storage.file_digest(first / weights) == storage.file_digest(second / weights)
    assert record["steps"] == len(record["losses"]) == 20
    assert record["learning_rate_sum"] == pytest.approx(sum(learning_rates(recipe, 20)))
    assert np.mean(record["losses"][-2:]) < 0.6 * record["losses"][0]

    written = (first / weights).stat().st_mtime_ns
    train_stage(new_model(tokenizer, SMALL), data, first, recipe, tokenizer)
    assert (first / weights).stat().st_mtime_ns == written
    train_stage(new_model(tokenizer, SMALL), data, first, recipe.model_copy(update={"seed": 1}), tokenizer)
    assert storage.file_digest(first / weights) != storage.file_digest(second / weights)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}, "a temporary folder is left"


def test_fine_tuning_starts_from_the_checkpoint_and_only_completions_count(tokenizer: object, tmp_path: Path) -> None:
    base = train_stage(
        new_model(tokenizer, SMALL), sequences_of(tokenizer), tmp_path / "base", Training(batch_size=6), tokenizer
    )
    data = sequences_of(tokenizer, prompt=3)
    steps: list[tuple[int, int]] = []
    recipe = Training(learning_rate=5e-3, epochs=5, batch_size=6)
    before = storage.file_digest(base / "model.safetensors")
    tuned = train_stage(base, data, tmp_path / "tuned", recipe, progress=lambda *s: steps.append(s))
    assert steps == [(i, 5) for i in range(1, 6)]
    losses = storage.read_json(tuned / "training.json")["losses"]
    assert losses[-1] < losses[0]
    assert storage.file_digest(base / "model.safetensors") == before


def test_loss_is_the_mean_over_targets_alone(tokenizer: object) -> None:
    model, data = new_model(tokenizer, SMALL).eval(), sequences_of(tokenizer, prompt=4)
    sums, counts = sequence_losses(model, data, batch_tokens=30)
    assert counts.tolist() == [len(ids) - 4 for ids in data.input_ids]
    (batch,) = batches(data, 10_000)
    assert mean_token_loss(model, batch).item() == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert mean_token_loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_sgd_takes_the_plain_step(tokenizer: object) -> None:
    model, data = new_model(tokenizer, SMALL), sequences_of(tokenizer)
    before = [p.detach().clone() for p in model.parameters()]
    settings = Training(optimizer="sgd", learning_rate=1e-3, epochs=1, batch_size=6, warmup=0)
    _, rates = optimize(model, data, settings)
    assert rates == [1e-3]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nothing_to_train_on_and_a_loss_that_explodes(tokenizer: object, tmp_path: Path) -> None:
    data = sequences_of(tokenizer)
    with pytest.raises(InputError, match="no sequence"):
        train_stage(new_model(tokenizer, SMALL), data.take([]), tmp_path / "x", Training())
    model = new_model(tokenizer, SMALL)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="loss of step 0"):
        train_stage(model, data, tmp_path / "x", Training())
    assert not (tmp_path / "x").exists()
