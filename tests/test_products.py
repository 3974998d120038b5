"""Products with aligned rows equal plain ones, and are laid out as they say."""

import pytest
import torch

from msif_core import products


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 4, 16), (6, 33), (0, 4, 9)])
@pytest.mark.parametrize("n", [1, 16, 17])
def test_product(shape: tuple[int, ...], n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(shape, generator=generator), torch.randn(shape[-1], n, generator=generator)
    for left, right in ((x, y), (x.double(), y.double()), (x.mT.contiguous().mT, y.T.contiguous().T)):
        found = products.product(left, right)
        torch.testing.assert_close(found, left @ right)
        assert found.stride(-2) % products.ROW == 0


def test_zeros() -> None:
    found = products.zeros(torch.empty(0, dtype=torch.float64), 2, 5, 17, dtype=torch.float32)
    assert (found.shape, found.dtype, found.stride(1)) == ((2, 5, 17), torch.float32, 32)
    assert not found.any()


def test_widths_and_what_is_padded_to_them() -> None:
    assert [products.width(n, torch.device("cpu")) for n in (16, 17)] == [16, 17]
    assert [products.width(n, torch.device("cuda")) for n in (16, 17)] == [16, 32]
    x = torch.randn(2, 3, 5)
    assert products.padded(x, 5) is x
    found = products.padded(x, 4, 8)
    assert found.shape == (2, 4, 8)
    assert torch.equal(found[:, :3, :5], x)
    assert found.count_nonzero() == x.count_nonzero()
