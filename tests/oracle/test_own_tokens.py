"""Scores of texts against brute force on the sequences that the model's own tokenizer gives."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from msif_core.config import Config
from msif_core.pipeline import Pipeline
from tests.oracle import dense
from tests.real_tokenizers import TEXTS, saved
from tests.words import write_jsonl

QUERIES = [
    {"id": "q0", "prompt": "The answer is:", "completion": "yes"},
    {"id": "q1", "prompt": "What is a kite?", "completion": " A thing that flies."},
]


def test_texts_score_as_the_sequences_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = saved("llama", tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=128, initializer_range=0.4)
    LlamaForCausalLM(config).double().save_pretrained(tmp_path)
    documents = [{"id": f"d{i}", "text": text[: 20 + i]} for i, text in enumerate(TEXTS)]
    stage = {
        "name": "s", "model": str(tmp_path), "filter": {"kind": "identity"},
        "documents": write_jsonl(tmp_path / "a.jsonl", documents),
    }  # fmt: skip
    settings = {"workspace": str(tmp_path / "w"), "stages": [stage], "compute": {"dtype": "float64", "device": "cpu"}}
    pipeline = Pipeline(Config.model_validate(settings))
    pipeline.tokenize("s")
    pipeline.fit_stage("s")
    scores = pipeline.score(QUERIES, documents)

    model, maps, end = pipeline.model("s"), pipeline.maps("s"), tokenizer.eos_token_id

    def gradients(text: str, prompt: str = "") -> dict[str, torch.Tensor]:
        ids = [*tokenizer(text)["input_ids"], end]
        assert ids[0] == tokenizer.bos_token_id
        unseen = len(tokenizer(prompt)["input_ids"]) if prompt else 1
        return dense.gradients(model, maps, np.array(ids), np.array([-100] * unseen + ids[unseen:]), "causal_lm")

    asked = [gradients(q["prompt"] + q["completion"], q["prompt"]) for q in QUERIES]
    found = [gradients(document["text"]) for document in documents]
    expected = np.array([[float(sum((q[m.name] * d[m.name]).sum() for m in maps)) for d in found] for q in asked])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
