"""TF32 on a machine without it: the inputs of every matrix product are rounded to ten bits of mantissa."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float32 values with the nearest mantissa of ten bits, as a tensor core reads them."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """Products as a GPU takes them while torch's float32 precision is "high": sums stay in float32."""

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket in PRODUCTS and torch.get_float32_matmul_precision() == "high":
            *added, left, right = arguments  # what a product is added to is no input of it
            arguments = (*added, *(rounded(x) if x.dtype == torch.float32 else x for x in (left, right)))
        return function(*arguments, **(keywords or {}))
