"""The speed that layers are compared with."""

from __future__ import annotations

import pytest

from p2pfast import _C
from p2pfast.runtime.peak import peak_gigaflops


@pytest.mark.parametrize("pairs", [False, True])
def test_multiplications_are_counted(pairs: bool, cpu_level: str) -> None:
    once, more = (_C.run_peak(pairs, rounds) for rounds in (1, 5))
    assert once > 0 and more == 5 * once


def test_it_is_measured_once() -> None:
    assert peak_gigaflops() > 0.1 and peak_gigaflops() == peak_gigaflops()
