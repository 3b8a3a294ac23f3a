"""Bad arguments of the convolution, normalisation and program bindings: an exception, never a crash.

Each call runs in a forked child, so that a crash is a failure of its test and no more.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from p2pfast import _C
from p2pfast.ops.conv.op import ALGORITHMS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

MEMORY = torch.zeros(1 << 18)
BIG = 1 << 31


def place(index: int) -> int:
    """A piece of 64 KB."""
    return MEMORY.data_ptr() + index * 65536


def tensor(index: int, channels: int = 16) -> dict[str, Any]:
    """8x8 pixels."""
    strides = {"image_stride": 64 * channels, "row_stride": 8 * channels, "pixel_stride": channels}
    return {"data": place(index)} | strides


def source(index: int = 0, **change: Any) -> dict[str, Any]:
    return tensor(index) | {"channels": 16} | change


CONV: dict[str, Any] = {
    "sources": [source()],
    "images": 1,
    "height": 8,
    "width": 8,
    "out_height": 8,
    "out_width": 8,
    "out_channels": 16,
    "kernel_h": 3,
    "kernel_w": 3,
    "pad_top": 1,
    "pad_left": 1,
    "weight": place(2),
    "weight_out_stride": 144,
    "weight_in_stride": 9,
    "packed": place(3),
    "out": tensor(5),
    "partial": place(6),
    "count": place(7),
    "workspace": place(8),
}
TRANSPOSED = CONV | {
    "transposed": True,
    "stride": 2,
    "out_height": 16,
    "out_width": 16,
    "kernel_h": 4,
    "kernel_w": 4,
}
SIZE = {"images": 1, "height": 8, "width": 8}
STATISTICS = SIZE | {"source": source(), "partial": place(6), "count": place(7)}
MERGE: dict[str, Any] = {"images": 1, "channels": 16, "parts": 1, "eps": 1e-5}
MERGE |= {"partial": place(6), "count": place(7), "scale": place(8), "shift": place(9)}
APPLY = SIZE | {"first": source(), "out": tensor(5)}
POOL = APPLY | {"source": source(), "out_height": 4, "out_width": 4, "kernel": 3, "stride": 2, "pad": 1}
del POOL["first"]


def conv(algorithm: int) -> Callable[[dict[str, Any]], None]:
    return lambda call: _C.run_conv(algorithm, call)


def pack(call: dict[str, Any]) -> None:
    _C.conv_pack(0, call, call["packed"])


GOOD = [
    (conv(0), CONV),
    (conv(1), CONV),
    (conv(3), CONV),
    (conv(1), TRANSPOSED),
    (pack, CONV),
    (_C.run_statistics, STATISTICS),
    (_C.run_merge, MERGE),
    (_C.run_apply, APPLY),
    (_C.run_avg_pool, POOL),
]

BAD: list[tuple[str, Callable[[dict[str, Any]], None], dict[str, Any], dict[str, Any]]] = []


def bad(
    name: str, function: Callable[[dict[str, Any]], None], good: dict[str, Any], *changes: dict[str, Any]
) -> None:
    BAD.extend((name, function, good, change) for change in changes)


bad(
    "direct",
    conv(0),
    CONV,
    *(
        {field: 0}
        for field in ("packed", "count", "workspace", "height", "width", "out_height", "out_channels")
    ),
    *({field: 0} for field in ("images", "kernel_h", "kernel_w", "stride")),
    *(
        {field: -1}
        for field in ("images", "width", "out_width", "out_channels", "kernel_h", "stride", "pad_left")
    ),
    *({field: BIG - 1} for field in ("height", "stride", "pad_top", "kernel_w", "out_width", "out_channels")),
    *({field: BIG} for field in ("images", "height", "block")),
    {"pad": 3},
    {"act": 8},
    {"weight_dtype": 2},
    {"out_height": 12},
    {"pad": 1, "pad_top": 8, "out_height": 22},
    {"sources": []},
    {"sources": [source()] * 3},
    {"sources": [source(data=0)]},
    {"sources": [source(), source(data=0)]},
    {"sources": [source(channels=0)]},
    {"sources": [source(channels=-16)]},
    {"sources": [source(scale=place(9))]},
    {"sources": [source(shift=place(9))]},
    {"sources": [source(act=3)]},
    {"sources": [source(dtype=2)]},
    {"sources": [source(channels=BIG - 1), source(channels=BIG - 1)]},
    {"out": tensor(5) | {"data": 0}},
    {"unknown": 1},
)
bad("winograd", conv(1), CONV, {"packed": 0}, {"count": 0}, {"stride": 3, "out_height": 3, "out_width": 3})
bad("streamed", conv(3), CONV, {"weight": 0, "packed": 0}, {"count": 0}, {"kernel_w": 5})
bad("thin", conv(5), CONV, {}, {"out_channels": 3})
bad("algorithm", conv(len(ALGORITHMS)), CONV, {})
bad("algorithm", conv(-1), CONV, {})
bad(
    "transposed",
    conv(1),
    TRANSPOSED,
    *({"pad": 1}, {"pad_top": 4}, {"pad_left": 4}, {"out_width": 15}, {"out_height": 19}, {"out_width": 18}),
)
bad("pack", pack, CONV, {"packed": 0}, {"weight": 0})
for name, function, good, addresses in (
    ("statistics", _C.run_statistics, STATISTICS, ("partial", "count")),
    ("merge", _C.run_merge, MERGE, ("partial", "count", "scale", "shift")),
    ("apply", _C.run_apply, APPLY, ()),
    ("pool", _C.run_avg_pool, POOL, ()),
):
    bad(name, function, good, *({field: 0} for field in addresses))
    sizes = [
        k for k in ("images", "height", "width", "channels", "parts", "out_height", "kernel") if k in good
    ]
    bad(name, function, good, *({field: value} for field in sizes for value in (0, -1)))
    for key in ("source", "first"):
        if key in good:
            bad(
                name,
                function,
                good,
                {key: source(data=0)},
                {key: source(channels=0)},
                {key: source(channels=-1)},
            )
    if "out" in good:
        bad(name, function, good, {"out": tensor(5) | {"data": 0}})
bad("merge", _C.run_merge, MERGE, {"eps": -1.0})
bad("apply", _C.run_apply, APPLY, {"act": 8}, {"second": source(channels=8)})
bad("pool", _C.run_avg_pool, POOL, {"stride": 0}, {"out_height": 50}, {"pad": -1}, {"pad": 3})


def in_a_child(function: Callable[[dict[str, Any]], None], call: dict[str, Any]) -> int:
    """0 if it returned, 1 on the exceptions that bindings raise, else what the child ended with."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 3
        try:
            _C.set_num_threads(1)
            function(call)
            code = 0
        except (ValueError, TypeError, RuntimeError):  # RuntimeError: beyond 32 bits
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_good_arguments() -> None:
    for function, call in GOOD:
        assert in_a_child(function, call) == 0


def label(change: dict[str, Any]) -> str:
    """The change without addresses, which differ from run to run."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(v) for v in value]
        if isinstance(value, dict):
            kept = ("channels", "act", "dtype", "scale", "shift")
            return {
                k: v if v == 0 or k not in ("scale", "shift") else "set"
                for k, v in value.items()
                if k in kept or v == 0
            }
        return value

    return str({k: short(v) for k, v in change.items()})


@pytest.mark.parametrize(
    ("name", "function", "good", "change"), BAD, ids=[f"{b[0]} {label(b[3])}" for b in BAD]
)
def test_bad_arguments(
    name: str, function: Callable[[dict[str, Any]], None], good: dict[str, Any], change: dict[str, Any]
) -> None:
    assert in_a_child(function, good | change) == 1


@pytest.mark.parametrize(
    "field", ["images", "height", "out_channels", "kernel_h", "out", "weight_out_stride"]
)
def test_missing_fields(field: str) -> None:
    call = {key: value for key, value in CONV.items() if key != field}
    with pytest.raises(ValueError, match=f"the field '{field}' is missing"):
        _C.conv_info(0, call)


def program() -> Any:
    made = _C.Program()
    made.conv(0, CONV | {"workspace": _C.slot_address(1, 0)})
    made.apply(APPLY)
    return made


@pytest.mark.parametrize(("slots", "begin", "end"), [(2, 0, 3), (2, -1, 1), (2, 3, 4), (1, 0, 1), (0, 0, 2)])
def test_program_with_bad_ranges_or_slots(slots: int, begin: int, end: int) -> None:
    with pytest.raises((ValueError, IndexError)):
        program().run([place(8)] * slots, begin, end)


def test_program_keeps_no_bad_step() -> None:
    made = program()
    with pytest.raises(ValueError, match=f"algorithm is {len(ALGORITHMS)}"):
        made.conv(len(ALGORITHMS), CONV)
    with pytest.raises(ValueError, match="'source' is missing"):
        made.statistics(SIZE)
    assert len(made) == 2


def test_programs_refuse_ranges_and_slots_that_are_not_there() -> None:
    program = _C.Program()
    first = source(data=_C.slot_address(0, 0))
    program.apply(APPLY | {"first": first, "out": tensor(5) | {"data": _C.slot_address(1, 0)}})
    for begin, end in ((0, 2), (-1, 1)):
        with pytest.raises(IndexError, match="1 steps"):
            program.run([place(0), place(5)], begin, end)
    for slots in ([], [place(0)], [0, place(5)]):
        with pytest.raises(ValueError, match="not bound"):
            program.run(slots, 0, 1)
    program.run([place(0), place(5)], 0, 1)
    for slot, offset in ((-1, 0), (65535, 0), (0, 1 << 48)):
        with pytest.raises((ValueError, TypeError)):
            _C.slot_address(slot, offset)
