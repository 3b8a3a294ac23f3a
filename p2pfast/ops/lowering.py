"""Autocast, switched off around what is lowered already."""

from __future__ import annotations

import torch


class without_autocast:
    """``torch.autocast(kind, enabled=False)`` for the layers of a training step, each of which enters it a
    few times: where autocast is off, nothing is done."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._was_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)

    def __enter__(self) -> None:
        if self._was_on:
            torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *_: object) -> None:
        if self._was_on:
            torch.set_autocast_enabled(self._kind, True)
