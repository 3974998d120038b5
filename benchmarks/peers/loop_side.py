"""The plain loop of research code: one `backward` per sequence, gradients in the parameters. torch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peers.protocol import Case, Step, serve


def prepare(case: Case) -> Mapping[str, Step]:
    """EK-FAC fit and scores, a sequence at a time."""
    device = torch.device(case.settings["device"])
    model: Any = transformers.GPTNeoXForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval().to(device)
    head = model.get_output_embeddings()
    maps: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    model.requires_grad_(False)
    for module in maps.values():
        module.requires_grad_(True)
    train, query = (torch.from_numpy(case.tokens(name)).long().to(device) for name in ("train", "query"))
    bases: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    eigenvalues: dict[str, torch.Tensor] = {}

    def gradients(rows: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """Each sequence's gradient of every map, the bias as a last column."""
        for row in rows:
            model.zero_grad()
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
            yield {n: torch.cat([m.weight.grad, m.bias.grad[:, None]], dim=1) for n, m in maps.items()}

    def covariances() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        sums = {n: tuple(torch.zeros(d, d, device=device) for d in (m.in_features + 1, m.out_features))
                for n, m in maps.items()}  # fmt: skip
        inputs: dict[str, torch.Tensor] = {}

        def forward_hook(name: str) -> Any:
            def hook(_module: Any, args: Any, output: torch.Tensor) -> None:
                a = args[0].detach()[0, :-1]
                inputs[name] = torch.cat([a, torch.ones(len(a), 1, device=device)], dim=1)
                output.register_hook(lambda d: add(name, d[0, :-1]))

            return hook

        def add(name: str, d: torch.Tensor) -> None:
            a = inputs.pop(name)
            sums[name][0].addmm_(a.T, a)
            sums[name][1].addmm_(d.T, d)

        handles = [m.register_forward_hook(forward_hook(n)) for n, m in maps.items()]
        for _ in gradients(train):
            pass
        for handle in handles:
            handle.remove()
        return sums

    def fit() -> None:
        for name, (A, S) in covariances().items():
            bases[name] = tuple(torch.linalg.eigh(x.double()).eigenvectors.float() for x in (A, S))
            eigenvalues[name] = torch.zeros(len(S), len(A), device=device)
        for gradient in gradients(train):
            for name, G in gradient.items():
                Q_A, Q_S = bases[name]
                eigenvalues[name] += (Q_S.T @ G @ Q_A) ** 2 / len(train)

    def scores() -> np.ndarray:
        filtered = []
        for gradient in gradients(query):
            for name, G in gradient.items():
                Q_A, Q_S = bases[name]
                level = eigenvalues[name] + case.settings["damping"] * eigenvalues[name].mean()
                gradient[name] = Q_S @ ((Q_S.T @ G @ Q_A) / level) @ Q_A.T
            filtered.append(gradient)
        found = np.zeros((len(query), len(train)), dtype=np.float32)
        for column, gradient in enumerate(gradients(train)):
            for row, q in enumerate(filtered):
                found[row, column] = sum(float((q[name] * G).sum()) for name, G in gradient.items())
        return found

    return {"fit": fit, "scores": scores}


if __name__ == "__main__":
    serve(prepare)
