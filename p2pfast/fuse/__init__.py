"""Capture of a module into a graph of fused operations."""
