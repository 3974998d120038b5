"""What rank 0 tells the other ranks: objects by pickle, the tensors in them from device to device."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def tell(message: Any) -> None:
    """Send to every other rank, each of which is to `hear` it.

    A tensor arrives on the receiver's own device of that kind, and only once where several objects share it: eigenbases
    of gigabytes go over the links of the accelerators, and not through the memory of the host or of the first of them.
    """
    data, tensors = pack(message)
    dist.broadcast_object_list([data])
    for tensor in tensors:
        dist.broadcast(_bytes(tensor), 0)


def hear() -> Any:
    """What rank 0 tells."""
    told: list[Any] = [None]
    dist.broadcast_object_list(told)
    return unpack(told[0], lambda tensor: dist.broadcast(_bytes(tensor), 0))


def pack(message: Any) -> tuple[bytes, list[torch.Tensor]]:
    """A message without its tensors, and the tensors in the order that `unpack` asks for them."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(message)
    return buffer.getvalue(), pickler.tensors


def unpack(data: bytes, fill: Callable[[torch.Tensor], Any]) -> Any:
    """The message again; `fill` is handed each of its tensors, empty."""
    return _Unpickler(io.BytesIO(data), fill).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out: a number, dtype, shape and kind of device stand for each."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return None
        number = self._numbers.setdefault(id(obj), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(obj)
        return number, obj.dtype, tuple(obj.shape), obj.device.type


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fill: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(file)
        self._fill = fill
        self._found: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        number, dtype, shape, device = pid
        if number not in self._found:
            self._found[number] = torch.empty(shape, dtype=dtype, device=device)
            self._fill(self._found[number])
        return self._found[number]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The entries as bytes, which every backend sends whatever the dtype; of a contiguous tensor its own memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
