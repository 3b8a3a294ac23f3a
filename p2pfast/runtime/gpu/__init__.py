"""Plans and runs fused graphs on NVIDIA GPUs. Importing this package imports neither triton nor CUDA.

``lower`` turns a graph into the steps of a ``plan``, ``forms`` decides how each convolution gets its input,
``schedule`` spreads steps over streams and places tensors in one arena, ``frame`` runs a plan (as a CUDA
graph where it can), ``engine`` keeps plans, ``kernels`` knows what operators take.
"""
