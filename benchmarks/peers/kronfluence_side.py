"""kronfluence's side: `fit_all_factors` and `compute_pairwise_scores`. Runs in its own environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task

from benchmarks.peers.protocol import Case, Step, serve


class NextToken(Task):
    """Summed next-token loss over every linear map but the head."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
        assert not sample, "the comparison is at the empirical Fisher"
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        targets = batch["input_ids"][:, 1:]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.names

    def get_attention_mask(self, batch: Any) -> torch.Tensor:
        """The last position has no target: the others leave it out of the input covariance too."""
        mask = torch.ones_like(batch["input_ids"])
        mask[:, -1] = 0
        return mask


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = torch.from_numpy(tokens).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[row]}


def prepare(case: Case) -> Mapping[str, Step]:
    """The steps of kronfluence."""
    settings = case.settings
    model = transformers.GPTNeoXForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    task = NextToken(names)
    analyzer = Analyzer(
        "analysis", prepare_model(model, task), task, cpu=settings["device"] == "cpu", disable_tqdm=True,
        output_dir=str(case.scratch("kronfluence_side")),
    )  # fmt: skip
    train, query = Tokens(case.tokens("train")), Tokens(case.tokens("query"))

    def fit() -> None:
        analyzer.fit_all_factors(
            "factors", train, per_device_batch_size=settings["batch"],
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True), overwrite_output_dir=True,
        )  # fmt: skip

    def scores() -> np.ndarray:
        # damping None: 0.1 of the mean eigenvalue, as on the other sides
        assert settings["damping"] == 0.1
        found = analyzer.compute_pairwise_scores(
            "scores", "factors", query, train, per_device_query_batch_size=len(query),
            per_device_train_batch_size=settings["batch"], score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"].cpu().numpy() if found is None else next(
            iter(found.values())
        ).cpu().numpy()  # fmt: skip

    return {"fit": fit, "scores": scores}


if __name__ == "__main__":
    serve(prepare)
