from __future__ import annotations

import torch
from torch import Tensor


def channels_last_reference(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` (N, C, H, W) in ``dtype`` and channels_last memory format; itself if it is that already."""
    return x.to(dtype).contiguous(memory_format=torch.channels_last)
