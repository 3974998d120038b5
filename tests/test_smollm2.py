"""A tokenizer and a chat template that people use: SmolLM2-135M-Instruct's, from documents to heat maps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from msif_core import corpus
from msif_core.attribution import Attribution
from msif_core.batching import IGNORED
from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tests.smollm2 import make_folder, smollm2_tokenizer
from tests.words import write_jsonl

ASK = {"role": "user", "content": "What is 日本 🙂?"}
ANSWER = {"role": "assistant", "content": "Japan, in kanji."}
MORE = {"role": "user", "content": "And é?"}
DOCUMENTS: list[dict[str, Any]] = [
    {"id": "chat", "messages": [ASK, ANSWER, MORE, {"role": "assistant", "content": "A letter."}]},
    {"id": "ended", "text": "A kite flies in the wind.<|im_end|>"},
    {"id": "pair", "prompt": "The answer is:", "completion": " yes, 日本."},
    *({"id": f"d{i}", "text": f"A text about number {i}, é and 日本."} for i in range(8)),
]
QUERIES: list[dict[str, Any]] = [
    {"id": "answered", "messages": [ASK]},
    {"id": "chat", "messages": [ASK, ANSWER], "contrast": "A country."},
    {"id": "pair", "prompt": "The answer is:", "completion": " no [bold]:book:\x1b[31m"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    model = str(make_folder(folder / "model", tokenizer))
    stage = {"name": "s", "model": model, "documents": write_jsonl(folder / "documents.jsonl", DOCUMENTS)}
    write_jsonl(folder / "queries.jsonl", QUERIES)
    settings = {
        "workspace": str(folder / "workspace"), "stages": [stage], "sketch": {"dimensions": 64},
        "retrieval": {"random_sample": 4}, "completion": {"max_new_tokens": 6},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def pipeline(config: Path) -> Pipeline:
    built = Pipeline(Config.load(config))
    built.run()
    return built


@pytest.fixture(scope="module")
def attribution(pipeline: Pipeline, config: Path) -> Attribution:
    return pipeline.attribute(config.parent / "queries.jsonl", top_k=12)


def of_document(pipeline: Pipeline, name: str) -> tuple[list[int], list[int]]:
    found = corpus.sequences_of_documents(pipeline.workspace.corpus("s"), [name])
    (ids,), (labels,) = found.input_ids, found.labels
    return ids.tolist(), labels.tolist()


def test_documents_are_what_its_tokenizer_and_template_say(pipeline: Pipeline, tokenizer: Any) -> None:
    ids, labels = of_document(pipeline, "chat")
    assert ids == tokenizer.apply_chat_template(DOCUMENTS[0]["messages"], tokenize=True)["input_ids"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == (
        "Japan, in kanji.<|im_end|>A letter.<|im_end|>"
    )
    assert of_document(pipeline, "ended")[0] == tokenizer(DOCUMENTS[1]["text"])["input_ids"]
    ids, labels = of_document(pipeline, "pair")
    assert ids == tokenizer("The answer is: yes, 日本.<|im_end|>")["input_ids"]
    assert labels == [IGNORED] * 4 + ids[4:]
    assert pipeline.corpus_manifest("s")["unknown"] is None, "it has all bytes"
    (manifest,) = pipeline.workspace.generations.glob("*/manifest.json")
    assert json.loads(manifest.read_text())["tokens"] == {"s": {"max_length": 2048, "unknown": None}}


def test_queries_and_answers_go_by_its_template(pipeline: Pipeline, tokenizer: Any, config: Path) -> None:
    found = pipeline.read_queries(config.parent / "queries.jsonl")
    prompt = tokenizer.apply_chat_template([ASK], tokenize=True, add_generation_prompt=True)["input_ids"]
    for ids, labels in list(zip(found.sequences.input_ids, found.sequences.labels, strict=True))[:2]:
        assert ids[: len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == IGNORED).all()
        assert labels[len(prompt)] == ids[len(prompt)]
    answer = found.sequences.input_ids[0][len(prompt) :]
    assert 1 <= len(answer) <= 6
    assert found.completions[0] == tokenizer.decode(answer, skip_special_tokens=True)
    assert (found.prompts[1], found.completions[1]) == ("What is 日本 🙂?", "Japan, in kanji.")


def test_heat_maps_read_as_the_texts(attribution: Attribution, tokenizer: Any) -> None:
    chat = tokenizer.apply_chat_template(DOCUMENTS[0]["messages"], tokenize=False)
    heat = attribution.heatmap("chat", "chat")
    assert "".join(heat.tokens) == chat
    assert {"<|im_start|>", " 日", "本", " 🙂", " é"} <= set(heat.tokens)
    row = next(r for r in attribution.table.to_pylist() if (r["query_id"], r["document_id"]) == ("chat", "chat"))
    np.testing.assert_allclose(heat.scores.sum(), row["best_score"], rtol=1e-3, atol=1e-6)
    first = next(r["document_id"] for r in attribution.table.to_pylist() if r["query_id"] == "pair")
    asked = attribution.heatmap("pair", first, "query")
    assert "".join(asked.tokens) == "The answer is: no [bold]:book:\x1b[31m<|im_end|>"
    assert "".join(attribution.heatmap("chat", "chat", "contrast").tokens).endswith("A country.<|im_end|>\n")
    page = attribution.to_html(attribution.folder / "page.html").read_text(encoding="utf-8")
    assert "Japan, in kanji." in page


def test_tokens_are_shown_before_anything_is_built(config: Path, tokenizer: Any) -> None:
    model = config.parent / "model" / "model.safetensors"
    weights, state = model.read_bytes(), model.stat()
    model.unlink()  # none are needed
    try:
        shown = CliRunner().invoke(app, ["tokens", str(config), "--stage", "s", "--count", "3"])
        asked = CliRunner().invoke(app, ["tokens", str(config), "--queries", str(config.parent / "queries.jsonl")])
    finally:
        model.write_bytes(weights)
        os.utime(model, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert shown.exit_code == asked.exit_code == 0, shown.output + asked.output
    lines = shown.output.splitlines()
    assert "Stage s, windows of 2,048 tokens at most" in lines
    answer = [tokenizer.decode([token]) for token in tokenizer("Japan, in kanji.<|im_end|>")["input_ids"]]
    assert f"loss ▶ │{'│'.join(answer)}│" in lines
    assert any("│ 日│…│…│本│ 🙂│?│" in line and not line.startswith("loss") for line in lines)
    assert "loss ▶ │ yes│,│ 日│…│…│本│.│<|im_end|>│" in lines
    assert "document pair: 12 tokens, 8 with a loss" in lines
    assert "prompt answered: 38 tokens, 0 with a loss" in asked.output
    assert "loss ▶ │ no│ [│bold│]:│book│:│\\x1b│[│3│1│m│<|im_end|>│" in asked.output, "data is no markup"
    assert "contrast chat" in asked.output
    assert "\x1b" not in asked.output


def test_a_stage_and_queries_are_shown_together(config: Path) -> None:
    queries = str(config.parent / "queries.jsonl")
    shown = CliRunner().invoke(app, ["tokens", str(config), "--stage", "s", "--queries", queries, "--count", "1"])
    heads = [line for line in shown.output.splitlines() if line.startswith(("Stage", "Queries", "document", "prompt"))]
    assert [head.split(":")[0] for head in heads] == [
        "Stage s, windows of 2,048 tokens at most", "document chat",
        "Queries of stage s, 8,192 tokens at most", "prompt answered",
    ], shown.output  # fmt: skip
    found = Pipeline(Config.load(config)).tokens("s", queries=QUERIES, count=1)
    assert [seen.kind for seen in found] == ["document", "prompt"]


def test_tokens_from_python(config: Path) -> None:
    pipeline = Pipeline(Config.load(config))
    (chat,) = pipeline.tokens("s", count=1)
    text = "".join(token.text for token in chat.tokens if token.target)
    assert text == "Japan, in kanji.<|im_end|>A letter.<|im_end|>"
    assert [token.text for token in chat.tokens if token.special][:2] == ["<|im_start|>", "<|im_end|>"]
    assert [seen.kind for seen in pipeline.tokens(queries=QUERIES)] == ["prompt", "query", "contrast", "query"]
