"""Numbers as the timing tables show them."""

from __future__ import annotations

from p2pfast.pipeline.measure import Result


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def rate(value: float) -> str:
    return f"{1 / value:.2f}" if value > 0.01 else f"{1 / value:.0f}"


def memory(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def timing(result: Result) -> str:
    """Median and, of several runs, interquartile range, in the median's unit."""
    if len(result.seconds) == 1:
        return seconds(result.median)
    if result.median >= 1:
        return f"{result.median:.2f} ± {result.spread:.2f} s"
    return f"{result.median * 1000:.1f} ± {result.spread * 1000:.1f} ms"
