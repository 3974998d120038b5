"""The exact formula, through the product's own chain, against finite differences of real trainings."""

import pytest
import torch

from msif_core.chain import Chain, FilteredStage
from msif_core.curvature.filters import Damped, block_mean

CLASSES, WIDTH = 3, 4
LAMBDA, ALPHAS = 0.05, (0.1, 0.3)


class DenseMap:
    """A dense curvature matrix with the surface of EK-FAC factors."""

    def __init__(self, H):
        values, self.Q = torch.linalg.eigh(H)
        self.eigenvalues = values[None, None]
        self.mean = block_mean(self.eigenvalues)

    def rotate(self, V):
        return V @ self.Q

    def unrotate(self, V):
        return V @ self.Q.T

    def rebase(self, V, other):
        return other.rotate(self.unrotate(V))


def data(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def loss(theta, x, y):
    return torch.nn.functional.cross_entropy(x @ theta.view(WIDTH, CLASSES), y, reduction="none")


def train(start, x, y, strength, extra=None, epsilon=0.0):
    """Newton to a gradient below 1e-12 of the mean loss plus proximity to `start`."""

    def objective(theta):
        value = loss(theta, x, y).mean() + strength / 2 * (theta - start).square().sum()
        return value if extra is None else value + epsilon * loss(theta, *extra).sum()

    theta = start.clone()
    for _ in range(50):
        gradient = torch.func.grad(objective)(theta)
        if gradient.norm() < 1e-13:
            break
        theta = theta - torch.linalg.solve(torch.func.hessian(objective)(theta), gradient)
    assert gradient.norm() < 1e-12
    return theta


def hessian(theta, x, y):
    return torch.func.hessian(lambda t: loss(t, x, y).mean())(theta)


@pytest.mark.parametrize("attributed", [0, 1, 2])
def test_chain_equals_finite_differences_of_three_stages(attributed):
    stages = [data(seed, 20 + seed) for seed in range(3)]
    strengths = (LAMBDA, *ALPHAS)
    document = tuple(part[:1] for part in stages[attributed])
    query = data(9, 1)

    def measure(epsilon):
        theta = torch.zeros(WIDTH * CLASSES, dtype=torch.float64)
        for k, (x, y) in enumerate(stages):
            extra = document if k == attributed else None
            theta = train(theta, x, y, strengths[k], extra, epsilon)
        return float(loss(theta, *query).sum())

    theta, thetas = torch.zeros(WIDTH * CLASSES, dtype=torch.float64), []
    for (x, y), strength in zip(stages, strengths, strict=True):
        theta = train(theta, x, y, strength)
        thetas.append(theta)
    filtered_stages = tuple(
        FilteredStage({"w": DenseMap(hessian(t, x, y))}, Damped(c, relative=False))
        for t, (x, y), c in zip(thetas, stages, strengths, strict=True)
    )
    V = torch.func.grad(lambda t: loss(t, *query).sum())(thetas[-1])[None, None, None]
    g = torch.func.grad(lambda t: loss(t, *document).sum())(thetas[attributed])
    score = float((Chain(filtered_stages, attributed).filter("w", V)[0, 0, 0] * g).sum())

    step = 1e-4
    slope = (measure(step) - measure(-step)) / (2 * step)
    assert score == pytest.approx(-slope, rel=1e-5)
