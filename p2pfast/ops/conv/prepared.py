"""Native calls that are described once: what changes from one call of a shape to the next are addresses.

A training step makes hundreds of calls between which other work has filled the processor's caches. Describing
each again takes as long as a small layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from p2pfast import _C
from p2pfast.ops.pages import scratch
from p2pfast.ops.threads import use_torch_threads

_MOST = 1024  # descriptions; of more shapes than that, all are made anew
_known: dict[Hashable, Prepared] = {}


@dataclass(frozen=True)
class Prepared:
    """A program whose slots are the addresses of a call, then those of its scratch.

    Attributes:
        program: a ``_C.Program``.
        scratch: bytes that it needs in each of the last slots.
    """

    program: Any
    scratch: tuple[int, ...]

    def run(self, addresses: Sequence[int]) -> None:
        # Named, so that they live until the kernels have run.
        held = [scratch(size, place) for place, size in enumerate(self.scratch)]
        use_torch_threads()
        self.program.run([*addresses, *(t.data_ptr() for t in held)], 0, len(self.program))


def slot(number: int, offset: int = 0) -> int:
    """The address ``offset`` bytes into a slot, for descriptions."""
    address: int = _C.slot_address(number, offset)
    return address


def prepared(key: tuple[Hashable, ...], prepare: Callable[[], Prepared]) -> Prepared:
    """What ``prepare`` returns for ``key``, on these threads and this instruction-set level."""
    key = *key, torch.get_num_threads(), _C.active_level()
    found = _known.get(key)
    if found is None:
        use_torch_threads()  # the size of scratch depends on them
        found = prepare()
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = found
    return found
