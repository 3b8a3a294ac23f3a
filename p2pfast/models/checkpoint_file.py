"""Checkpoint files: opened without ever running what is in them, and why they cannot be."""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

_LISTED = 8
# What torch's restricted unpickler says when a file asks for a function or class that is not plain data.
_FORBIDDEN = re.compile(r"GLOBAL|unrecognized function|Can only (create|build)|must be imported|TorchScript")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not fit.

    Attributes:
        missing: keys that the network has and the checkpoint lacks.
        unexpected: keys that the checkpoint has and the network lacks.
        misshapen: lines "key: why" for tensors of a wrong shape or kind.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshapen = tuple(misshapen)


def _shortened(value: object, limit: int = 160) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(items: Sequence[str]) -> str:
    """The first few of `items`, and how many more there are."""
    shown = ", ".join(_shortened(item) for item in items[:_LISTED])
    more = len(items) - _LISTED
    return f"{shown}, … and {more} more" if more > 0 else shown


def _names_in_pickle(path: Path) -> list[str]:
    """Functions and classes that a pickle asks for, whether bare or inside a torch archive.

    The pickle is listed, never run. It serves error messages alone: what is refused was refused before.
    """
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            inner = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            stream: IO[bytes] = stack.enter_context(archive.open(inner))
        else:
            stream = stack.enter_context(path.open("rb"))
        names: list[str] = []
        strings: list[str] = []
        memo: dict[Any, str | None] = {}
        top: str | None = None
        with contextlib.suppress(Exception):  # a damaged end leaves the names before it
            for opcode, operand, _ in pickletools.genops(stream):
                if opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                    memo[len(memo) if operand is None else operand] = top
                    continue
                top = memo.get(operand) if opcode.name in ("BINGET", "LONG_BINGET") else operand
                top = top if isinstance(top, str) else None
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(operand).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif top is not None:
                    strings.append(top)
        return names


def _refusal(path: Path, error: Exception) -> CheckpointError:
    text = str(error)
    what = ""
    # Messages of the unpickler mean little and advise to switch the protection off.
    reason = "not a pickle of plain tensors"
    forbidden = isinstance(error, (pickle.UnpicklingError, RuntimeError)) and bool(_FORBIDDEN.search(text))
    if forbidden:
        asked = re.search(r"GLOBAL (\S+)", text)
        what = asked.group(1) if asked else ""
    elif isinstance(error, pickle.UnpicklingError) and "operand" in text:
        # Pickle protocols above 3, where torch stops before it sees what is asked for.
        names: list[str] = []
        with contextlib.suppress(Exception):
            names = _names_in_pickle(path)
        what = next((n for n in names if not n.startswith(("torch.", "collections.OrderedDict"))), "")
        if names:
            reason = "a pickle of a newer protocol; save it again with torch.save's default protocol"
    elif isinstance(error, (RuntimeError, OSError)) or type(error).__name__ == "SafetensorError":
        reason = _shortened(re.sub(r"^\[enforce fail[^]]*\] \. ", "", text).split(". ")[0])
    if forbidden or what:
        return CheckpointError(
            f"{path}: refused, because reading it would run code from the file"
            f"{f' ({_shortened(what)})' if what else ''}. Only files of plain tensors are read. "
            "If you made this file yourself, save the network's state_dict() alone."
        )
    return CheckpointError(
        f"{path}: not a checkpoint, or damaged ({reason}). Expected a .pth file of "
        "torch.save(network.state_dict()) or a .safetensors file; if it was downloaded, fetch it again."
    )


def read_content(path: Path) -> Any:
    """What a .pth or .safetensors file holds, without running anything that it asks for.

    Raises:
        CheckpointError: no such file, not a file, empty, damaged, not a checkpoint, or it would run code.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file; give the .pth or .safetensors file itself")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{path}: the file is empty")
    # A .safetensors of another name shows by the JSON after its length; a .pth is a zip archive or a pickle.
    try:
        if start[8:] == b"{" or path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise CheckpointError(
                    f"{path}: reading .safetensors needs the package: pip install safetensors"
                ) from error
            return load_file(path)
        with warnings.catch_warnings():  # on files that are refused below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start[:2] == b"PK")
    except CheckpointError:
        raise
    except Exception as error:  # a broken or hostile file may raise anything
        raise _refusal(path, error) from None
