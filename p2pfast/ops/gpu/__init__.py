"""What the Triton kernels share. Importing this package imports neither triton nor CUDA.

``support`` tells what can run here and checks tensors; ``launch`` describes one launch of a kernel, to run it
or to compile it without a GPU; ``device`` (which imports triton) holds functions called inside kernels;
``compile`` compiles what is shipped ahead of time and prints registers and shared memory.
"""

from __future__ import annotations

from p2pfast.ops.gpu.launch import Launch, Shipped, compile_together
from p2pfast.ops.gpu.support import (
    STORED,
    allows_tf32,
    channels_last,
    check_tensor,
    evenly_spaced,
    interpreted,
    on_device,
    on_kernels,
    pixel_stride,
    require_triton,
    triton_reason,
)

__all__ = [
    "STORED",
    "Launch",
    "Shipped",
    "allows_tf32",
    "channels_last",
    "check_tensor",
    "compile_together",
    "evenly_spaced",
    "interpreted",
    "on_device",
    "on_kernels",
    "pixel_stride",
    "require_triton",
    "triton_reason",
]
