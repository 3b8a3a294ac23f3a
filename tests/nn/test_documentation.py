"""The documentation of what is public says what goes in and out, what is raised, and where it is from."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import p2pfast.nn as fused
from p2pfast import functional

PUBLIC = {
    **{name: getattr(fused, name) for name in fused.__all__},
    **{name: getattr(functional, name) for name in functional.__all__},
}


def documentation(thing: Any) -> str:
    """Of a class, with its forward's, and of those that it stands on; of an operator's function."""
    thing = getattr(thing, "_init_fn", thing)
    bases = (
        [b for b in inspect.getmro(thing) if b.__module__.startswith("p2pfast")]
        if inspect.isclass(thing)
        else []
    )
    parts = [thing, *bases, *(vars(b)["forward"] for b in bases if "forward" in vars(b))]
    return "\n".join(inspect.getdoc(part) or "" for part in parts)


@pytest.mark.parametrize("name", list(PUBLIC))
def test_shapes_dtypes_errors_and_source(name: str) -> None:
    text = documentation(PUBLIC[name])
    assert re.search(r"\(N, |H, W\)|\(N, \.\.\.\)|tensors of one shape|L1Loss|list", text), "shapes"
    assert re.search(r"dtype|float32|floating|integer", text), "dtypes"
    assert re.search(r"Raises|raises", text), "errors"
    assert re.search(r"arXiv|published|pix2pixHD|Source", text), "source"
