"""Plans against what the models' authors say of them and against a small model built for real."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from flows.show_plan import print_plan
from msif_core import devices, plan, probe
from msif_core.batching import batches
from msif_core.capture import capture
from msif_core.config import Config, CurvatureSettings
from msif_core.corpus_size import CorpusSize, window_lengths
from msif_core.curvature.fit import partitions
from msif_core.errors import InputError
from msif_core.losses import target_loss
from msif_core.models import freeze
from msif_core.pipeline import Pipeline
from msif_core.tracking import tracked_maps
from msif_core.work import Work
from tests.conftest import CONFIGS, VOCAB, make_model, make_sequences
from tests.smollm2 import make_folder, smollm2_tokenizer


def config_of(tmp_path: Path, model: str, **changes: object) -> Config:
    stage = {"name": "pretrain", "model": model, "documents": str(tmp_path / "*.jsonl")}
    return Config.model_validate({"workspace": str(tmp_path / "run"), "stages": [stage], **changes})


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("EleutherAI/pythia-2.8b", 2_775_208_960),
        ("EleutherAI/pythia-6.9b", 6_857_302_016),
        ("EleutherAI/pythia-12b", 11_846_072_320),
        ("bigscience/bloom-560m", 559_214_592),
    ],
)
def test_known_models_have_their_published_size(model: str, parameters: int, tmp_path: Path) -> None:
    found = plan.make_plan(config_of(tmp_path, model), "h100")
    assert found.stages[0].parameters == parameters
    assert found.stages[0].assumed.startswith("its documents are not here")


def test_windows_beyond_the_models_positions_are_refused(tmp_path: Path) -> None:
    CONFIGS["gpt_neox"]().save_pretrained(tmp_path / "model")
    config = config_of(tmp_path, str(tmp_path / "model"), corpus={"max_length": 33})
    with pytest.raises(
        InputError, match=r"corpus.max_length is 33, but the model of stage 'pretrain' has 32 positions"
    ):
        plan.make_plan(config, "a100", {"pretrain": 5_000})


def test_a_small_model_is_counted_exactly(tmp_path: Path) -> None:
    CONFIGS["gpt_neox"]().save_pretrained(tmp_path / "model")
    config = config_of(tmp_path, str(tmp_path / "model"), sketch={"dimensions": 64})
    found = plan.make_plan(config, "a100", {"pretrain": 5_000})
    stage = found.stages[0]
    maps = tracked_maps(make_model("gpt_neox"), config.curvature)
    assert stage.tracked == sum(m.size for m in maps)
    entries = sum(m.d_in**2 + m.shape[0] * m.shape[1] ** 2 + m.size for m in maps)
    assert stage.factor_bytes == 4 * entries
    assert stage.shards == 2
    assert stage.partial_bytes == 2 * stage.factor_bytes
    assert stage.passes == len(list(partitions(maps, config.curvature.memory_budget_gb)))
    assert found.index_kind == "rabitq"
    assert found.index_bytes == 5_000 * (8 + 8 + 8) + 2 * 4 * 64
    assert found.hours == pytest.approx(sum(step.hours() for step in found.steps[:-2]))
    assert [step.name for step in found.steps] == [
        "covariances",
        "eigenbases",
        "eigenvalues",
        "sketches",
        "search",
        "one query",
    ]


def test_files_are_estimated_from_their_first_records(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "four" * 10} for i in range(2_000)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, "bigscience/bloom-560m", corpus={"max_length": 5, "shard_sequences": 500})
    stage = plan.make_plan(config, "h100").stages[0]
    assert stage.sequences == pytest.approx(4_000, rel=0.05)
    assert stage.tokens == pytest.approx(20_000, rel=0.05)
    assert stage.shards == 8, "of sequences, two a document"
    assert stage.assumed == "estimated from the size of its files"


def test_texts_are_counted_in_the_tokens_of_the_stages_own_tokenizer(tmp_path: Path) -> None:
    make_folder(tmp_path / "model", smollm2_tokenizer())
    text = "In 2023: 1,234,567 (est.), 98.76% of it in 1999"
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i in range(900)))
    config = config_of(tmp_path, str(tmp_path / "model"), corpus={"max_length": 8})
    estimated = plan.make_plan(config, "h100").stages[0]
    pipeline = Pipeline(config)
    pipeline.tokenize("pretrain")
    counted = plan.make_plan(config, "h100").stages[0]
    assert counted.assumed == ""
    assert estimated.tokens == pytest.approx(counted.tokens, rel=0.05)
    assert estimated.sequences == pytest.approx(counted.sequences, rel=0.05)


def test_padding_is_counted_as_batches_have_it() -> None:
    lengths = np.random.default_rng(0).integers(10, 130, 200)
    size = CorpusSize(200, int(lengths.sum()), 1, lengths)
    sequences = make_sequences(200, lengths=(10, 11)).take(np.zeros(200, dtype=np.int64))
    ids = [np.ones(n, dtype=np.int32) for n in lengths]
    real = replace(sequences, input_ids=ids, labels=ids)
    for budget in (512, 4096, 100_000):
        padded = sum(batch.input_ids.numel() for batch in batches(real, budget))
        assert size.padded(200, budget) == pytest.approx(padded / 200, rel=0.02)
    assert size.padded(20, 100_000) == lengths.max()
    assert window_lengths(np.array([25, 10, 3]), 10).tolist() == [10, 10, 10, 5, 3]


def test_compressed_files_hold_more_than_their_size(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "data" / "pretrain" / "wordnet.jsonl").read_bytes()
    (tmp_path / "texts.jsonl.gz").write_bytes(gzip.compress(text))
    config = config_of(tmp_path, "bigscience/bloom-560m", corpus={"max_length": 512})
    source = config.stages[0].model_copy(update={"documents": str(tmp_path / "*.gz")})
    stage = plan.make_plan(config.model_copy(update={"stages": [source]}), "h100").stages[0]
    assert stage.sequences == pytest.approx(text.count(b"\n"), rel=0.5)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("first", [0, 8, 15])
def test_a_pass_takes_the_operations_that_torch_counts(parallel: bool, first: int) -> None:
    """From the first map on, from the third layer's, and for the last map alone."""
    settings = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, use_parallel_residual=parallel,
    )  # fmt: skip
    model = freeze(transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager"))
    maps = tracked_maps(model, CurvatureSettings())
    (batch,) = batches(make_sequences(3, lengths=(40, 41)), 10_000)
    with FlopCounterMode(display=False) as counted:
        capture(model, maps[first:], batch, target_loss("causal_lm"), lambda *_: None)
    planned = 3 * Work(model, maps, 40).passes([maps[first:]])
    assert planned == pytest.approx(counted.get_total_flops(), rel=0.03)


def test_fewer_directions_take_less_of_the_sketches(tmp_path: Path) -> None:
    def sketches(share: float, budget: float) -> plan.Step:
        changes = {"sketch": {"directions": share}, "curvature": {"memory_budget_gb": budget}}
        config = config_of(tmp_path, "EleutherAI/pythia-2.8b", **changes)
        return next(step for step in plan.make_plan(config, "h100").steps if step.name == "sketches")

    assert sketches(0.25, 80).operations < 0.6 * sketches(1, 80).operations
    assert sketches(0.25, 8).memory < sketches(1, 8).memory + 1e9
    swept, whole = sketches(0.25, 8).operations / sketches(0.25, 80).operations, sketches(1, 8).operations
    assert swept < whole / sketches(1, 80).operations, "fewer sweeps too"


def test_twice_the_corpus_takes_twice_the_sketches(tmp_path: Path) -> None:
    config = config_of(tmp_path, "bigscience/bloom-560m")
    one, two = (plan.make_plan(config, "h100", {"pretrain": n}).steps for n in (100_000, 200_000))
    hours = {step.name: step.hours() for step in one}
    for step in two:
        factor = 2 if step.name in ("sketches", "search") else 1
        assert step.hours() == pytest.approx(factor * hours[step.name], rel=0.01)


def test_what_cannot_be_planned_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'abacus' is not known"):
        plan.make_plan(config_of(tmp_path, "bigscience/bloom-560m"), "abacus")
    with pytest.raises(InputError, match=r"--sequences names no stage: \['finetune'\]; stages are \['pretrain'\]"):
        plan.make_plan(config_of(tmp_path, "bigscience/bloom-560m"), "h100", {"finetune": 1})
    with pytest.raises(InputError, match="--sequences pretrain=0: a stage has one sequence at least"):
        plan.make_plan(config_of(tmp_path, "bigscience/bloom-560m"), "h100", {"pretrain": 0})
    (tmp_path / "texts.jsonl").write_text("no record\n")
    with pytest.raises(InputError, match=r"texts.jsonl:1: not valid JSON"):
        plan.make_plan(config_of(tmp_path, "bigscience/bloom-560m"), "h100")
    (tmp_path / "texts.jsonl").unlink()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match=r"\*.jsonl: no document in it"):
        plan.make_plan(config_of(tmp_path, "bigscience/bloom-560m"), "h100")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing: no configuration of a model can be read here"):
        plan.make_plan(config_of(tmp_path, str(tmp_path / "nothing")), "h100")


def test_tf32_speeds_up_statistics_but_no_filter(tmp_path: Path) -> None:
    whole, quick = (
        devices.rates(config_of(tmp_path, "EleutherAI/pythia-2.8b", compute={"tf32": tf32}), "h100", {1024: 1})
        for tf32 in (False, True)
    )
    assert quick.seconds(0, products=1e15, outer=1e15) < whole.seconds(0, products=1e15, outer=1e15) / 7
    assert quick.seconds(0, 0, filters=1e15) == whole.seconds(0, 0, filters=1e15)


def test_devices_divide_whole_tasks_only(tmp_path: Path) -> None:
    config = config_of(tmp_path, "bigscience/bloom-560m")
    found = plan.make_plan(config, "h100", {"pretrain": 50_000}, devices=7)
    steps = {step.name: step for step in found.steps}
    assert steps["covariances"].tasks == steps["eigenbases"].tasks == 10  # parts of 2,048 of 20,000 sequences
    assert steps["covariances"].hours(7) == pytest.approx(steps["covariances"].hours() * 2 / 10)
    assert steps["covariances"].hours(10) == steps["covariances"].hours(64)
    assert steps["sketches"].tasks == 32
    for alone in ("one query", "search"):
        assert steps[alone].hours(64) == steps[alone].hours()
    built = sum(step.hours(7) for name, step in steps.items() if name not in ("one query", "search"))
    assert found.hours == pytest.approx(built)


def test_memory_follows_the_budget_and_the_batch(tmp_path: Path) -> None:
    def peaks(budget: float, tokens: int, kept: float = 1.0, **sizes: int) -> dict[str, float]:
        settings = {"curvature": {"memory_budget_gb": budget, **sizes}, "compute": {"batch_tokens": tokens}}
        config = config_of(tmp_path, "EleutherAI/pythia-2.8b", **settings, sketch={"directions": kept})
        return {step.name: step.memory for step in plan.make_plan(config, "h100", {"pretrain": 50_000}).steps}

    whole, swept, cut = peaks(80, 4096), peaks(8, 4096), peaks(80, 4096, block_size=2560)
    for name in ("covariances", "eigenvalues", "sketches"):
        assert swept[name] < whole[name] - 15e9
        assert cut[name] < whole[name] - 5e9
        assert peaks(80, 8192)[name] > whole[name] + 4e9
    thin = peaks(80, 4096, kept=0.25)
    assert thin["sketches"] < whole["sketches"] - 25e9
    assert thin["eigenvalues"] == whole["eigenvalues"]
    assert swept["covariances"] > 2_775_208_960 * 4  # the weights
    assert swept["one query"] < 11.2e9 + 8e9 + 26e9


@pytest.mark.parametrize("vocabulary", [1_000, 50_000])
def test_few_layers_and_two_batches_give_the_time_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int
) -> None:
    """Passes of 1 + 2 layers + sequences (3 + 4 layers + vocabulary / 100) seconds, exactly."""

    clock = [0.0]

    def passes(_config: object, _stage: object, model: Any, sequences: Any, *_: object) -> probe.Passes:
        layers, entries = len(model.gpt_neox.layers), model.config.vocab_size
        took = 1 + 2 * layers + len(sequences) * (3 + 4 * layers + entries / 100)
        return {"covariances": lambda _: clock.append(clock[-1] + took)}

    monkeypatch.setattr(probe, "_passes", passes)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    settings = CONFIGS["gpt_neox"]()
    settings.num_hidden_layers, settings.vocab_size = 6, vocabulary
    model = transformers.AutoModelForCausalLM.from_config(settings)
    config = config_of(tmp_path, "unused")
    found = probe.measure(config, config.stages[0], model, 8, "cpu", (7, 3), seconds=1e6)["covariances"]
    assert found.call == pytest.approx(1 + 2 * 6)
    assert found.sequence == pytest.approx(3 + 4 * 6 + vocabulary / 100)
    assert found.seconds(2, 10) == pytest.approx(2 * 13 + 10 * (27 + vocabulary / 100))


def smollm2(folder: Path, **changes: int) -> str:
    """The configuration of SmolLM2-135M, without weights."""
    settings = transformers.LlamaConfig(
        **{"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
           "architectures": ["LlamaForCausalLM"]} | changes,
    )  # fmt: skip
    settings.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("slower", "rounds"), [(1, 4), (8, 1)])
def test_probes_end_within_their_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slower: float, rounds: int
) -> None:
    """Of a model that is real in size, on a machine whose passes take that many times what is counted."""
    clock, turns = [0.0], set[int]()

    def passes(_config: object, _stage: object, model: Any, sequences: Any, *_: object) -> probe.Passes:
        work = Work(model, tracked_maps(model, CurvatureSettings()), len(sequences.input_ids[0]))
        operations = len(sequences) * (work.passes([work.maps]) + work.covariance())

        def run(turn: int) -> None:
            clock.append(clock[-1] + slower * operations / 1e11)
            turns.add(turn)

        return dict.fromkeys(("covariances", "eigenvalues", "sketches", "scores"), run)

    known = devices.Rates("cpu", 1e11, 1e11, 1e11, {1536: 1.0})
    monkeypatch.setattr(plan, "rates", lambda *_: known)
    monkeypatch.setattr(probe, "_passes", passes)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    config = config_of(tmp_path, smollm2(tmp_path / "model"), corpus={"max_length": 128})
    found = plan.make_plan(config, sequences={"pretrain": 1_000})
    assert found.stages[0].counted == ""
    assert len(turns) == rounds
    assert clock[-1] < (probe.BUDGET if rounds > 1 else 2 * probe.BUDGET)
    assert {step.name for step in found.steps if not step.measured} == {"eigenbases", "search"}


def test_what_is_too_large_or_unlike_to_try_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = devices.Rates("cpu", 1e11, 1e11, 1e11, {1536: 1.0})
    monkeypatch.setattr(plan, "rates", lambda *_: known)
    found = plan.make_plan(config_of(tmp_path, "EleutherAI/pythia-6.9b"), sequences={"pretrain": 1_000})
    assert found.stages[0].counted == plan.TOO_LARGE
    assert not any(step.measured for step in found.steps)
    settings = transformers.Qwen2MoeConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        mlp_only_layers=[0], architectures=["Qwen2MoeForCausalLM"],
    )  # fmt: skip
    settings.save_pretrained(tmp_path / "mixture")
    found = plan.make_plan(config_of(tmp_path, str(tmp_path / "mixture")), sequences={"pretrain": 1_000})
    assert found.stages[0].counted == plan.UNLIKE
    console = Console(record=True, width=200)
    print_plan(found, console)
    assert "Stage pretrain: times of its passes are counted operations, as its layers are not alike." in (
        console.export_text()
    )


def test_eigendecompositions_take_what_their_own_widths_take() -> None:
    speed = devices.Rates("cpu", 1, 1, 1, {192: 0.01, 576: 0.1, 1536: 1.0})
    assert speed.diagonalising({192: 60, 576: 180, 1536: 90}) == pytest.approx(0.6 + 18 + 90)
    assert speed.diagonalising({96: 8, 768: 8, 3072: 1}) == pytest.approx(0.01 + 1.0 + 8.0), "as the cube of the next"


def test_the_widths_that_take_the_most_are_measured(tmp_path: Path) -> None:
    config = config_of(tmp_path, smollm2(tmp_path / "model"))
    found = devices.rates(config, "measure", {8: 1, 16: 100, 24: 10, 40: 5})
    assert set(found.eigenbases) == {16, 24, 40}
    assert all(seconds > 0 for seconds in found.eigenbases.values())


def test_a_small_model_is_timed_here(tmp_path: Path) -> None:
    CONFIGS["gpt_neox"]().save_pretrained(tmp_path / "model")
    config = config_of(
        tmp_path, str(tmp_path / "model"), sketch={"dimensions": 64}, corpus={"max_length": 8},
        compute={"device": "cpu", "batch_tokens": 32},
    )  # fmt: skip
    steps = {step.name: step for step in plan.make_plan(config, sequences={"pretrain": 100}).steps}
    measured = [name for name, step in steps.items() if step.measured]
    assert measured == ["covariances", "eigenvalues", "sketches", "one query"]
    assert all(0 < steps[name].seconds < 60 for name in measured)
