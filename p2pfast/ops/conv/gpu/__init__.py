"""The Triton kernels of ``conv``; ``p2pfast.ops.conv.triton`` is what others import."""
