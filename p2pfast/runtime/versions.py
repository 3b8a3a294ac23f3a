"""Has a parameter changed since it was last packed?"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_SAMPLES = 8
_INTEGERS: dict[int, Any] = {
    1: ctypes.c_uint8,
    2: ctypes.c_uint16,
    4: ctypes.c_uint32,
    8: ctypes.c_uint64,
}


class _Tensor:
    """One tensor as it was.

    The version counter tells of in-place operations, the address of replacement. Neither tells of writes
    through ``tensor.data`` (as weight clipping and moving averages are often written), so a few elements
    are remembered too: a change that leaves every one of them as it was is not seen.
    """

    __slots__ = ("address", "alias", "elements", "values", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.alias = tensor.detach()  # keeps the memory, so that the address stays this tensor's
        self.address = tensor.data_ptr()
        self.version = 0 if tensor.is_inference() else tensor._version
        self.elements: list[Any] = []
        size = tensor.numel()
        kind = _INTEGERS.get(tensor.element_size())
        if tensor.device.type == "cpu" and size > 0 and kind is not None and tensor.layout == torch.strided:
            strides = zip(tensor.shape, tensor.stride(), strict=True)
            dense = sum((n - 1) * stride for n, stride in strides) == size - 1
            step = tensor.element_size()
            if dense:
                places = {i * (size - 1) // max(1, _SAMPLES - 1) for i in range(_SAMPLES)}
                self.elements = [kind.from_address(self.address + step * i) for i in sorted(places)]
        self.values = [e.value for e in self.elements]

    def matches(self, tensor: torch.Tensor) -> bool:
        if tensor.data_ptr() != self.address or tensor.device != self.alias.device:
            return False
        if tensor.dtype != self.alias.dtype:
            return False
        if (0 if tensor.is_inference() else tensor._version) != self.version:
            return False
        return [e.value for e in self.elements] == self.values


class Seen:
    """Several tensors as they were."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = [_Tensor(t) for t in tensors]

    def matches(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these are the same tensors with, as far as can be told, the same values."""
        return len(tensors) == len(self.tensors) and all(
            seen.matches(t) for seen, t in zip(self.tensors, tensors, strict=True)
        )
