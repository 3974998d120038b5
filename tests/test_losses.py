"""The loss and its gradient beside torch's own cross entropy; how large the blocks are."""

import pytest
import torch

from msif_core import losses
from msif_core.batching import IGNORED


@pytest.fixture(params=["one block", "many blocks", "a row is a block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"one block": 1 << 18, "many blocks": 5 * 37, "a row is a block": 3}[request.param]
    monkeypatch.setattr(losses, "CACHED_ENTRIES", entries)


def random_case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [3, 8, 37] of a wide range, targets of which some are ignored, and a weight for each position."""
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(3, 8, 37, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 37, (3, 8), generator=generator)
    targets[:, -1] = targets[1, :3] = IGNORED
    return logits, targets, torch.randn(3, 8, generator=generator)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_and_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    logits, targets, weights = random_case(dtype)
    wide = logits if dtype == torch.float64 else logits.float()
    expected = torch.nn.functional.cross_entropy(wide.mT, targets, ignore_index=IGNORED, reduction="none")
    found = losses.negative_log_likelihoods(logits, targets)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    of_expected, of_found = (torch.autograd.grad((x * weights).sum(), logits)[0] for x in (expected, found))
    assert of_found.dtype == dtype
    torch.testing.assert_close(of_found, of_expected)
    assert not of_found[targets == IGNORED].any()


def test_a_sure_prediction_is_as_exact_as_torch_has_it() -> None:
    """Logits far from zero, as GPT-2's are: their norm's own rounding would be larger than what is left of the loss."""
    logits = torch.full((1, 4, 50), -120.0) + torch.arange(50) % 7
    targets = torch.tensor([[0, 13, 20, 48]])
    logits.scatter_(2, targets[..., None], -100.0)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.mT, targets, reduction="none")
    logits.requires_grad_()
    found = losses.negative_log_likelihoods(logits, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    of_expected, of_found = (torch.autograd.grad(x.sum(), at)[0] for x, at in ((expected, exact), (found, logits)))
    torch.testing.assert_close(of_found.double(), of_expected, rtol=1e-6, atol=1.2e-7)


def test_nothing_of_the_logits_size_is_kept_but_the_logits() -> None:
    logits, targets, _ = random_case(torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = losses.negative_log_likelihoods(logits, targets)
    assert [x.data_ptr() for x in kept if x.numel() >= logits.numel()] == [logits.data_ptr()]
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr(), "nor for the gradient"


def test_a_second_backward_is_an_error_not_a_wrong_gradient() -> None:
    logits, targets, _ = random_case(torch.float32)
    found = losses.negative_log_likelihoods(logits * 1.0, targets).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.usefixtures("blocks")
def test_labels_that_are_drawn_do_not_depend_on_the_blocks() -> None:
    logits, targets, _ = random_case(torch.float32)
    u = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = losses.draw_labels(logits.detach(), targets, u)
    cumulative = logits.detach().double().softmax(-1).cumsum(-1)
    expected = (cumulative <= u[..., None]).sum(-1)
    assert torch.equal(drawn, torch.where(targets == IGNORED, IGNORED, expected))
