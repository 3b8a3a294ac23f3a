"""Putting checkpoints of the published implementations into networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from p2pfast.models.checkpoint_file import CheckpointError, listed, read_content

M = TypeVar("M", bound=nn.Module)

_WRAPPER_SEGMENTS = ("module", "_orig_mod")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _candidates(value: object, name: str, depth: int) -> Iterable[tuple[str, Mapping[str, Tensor]]]:
    if not isinstance(value, Mapping) or not value:
        return
    if all(isinstance(item, Tensor) for item in value.values()):
        yield name, value
    elif depth:
        for key, item in value.items():
            if not isinstance(key, str):  # an optimizer's state is keyed by number
                continue
            yield from _candidates(item, f"{name}.{key}" if name else key, depth - 1)


def _unwrapped(path: Path, content: object, key: str | None) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    found = dict(_candidates(content, "", depth=3))
    if key is not None:
        if key not in found:
            names = listed([repr(name) for name in found])
            raise CheckpointError(f"{path}: no dictionary of tensors under key={key!r}; there are: {names}")
        return found[key]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CheckpointError(
            f"{path}: holds {len(found)} dictionaries of tensors ({listed(list(found))}); choose by key="
        )
    others = [f"{k!r} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, Tensor)]
    raise CheckpointError(f"{path}: not a dictionary of tensors; it holds {listed(others) or 'nothing'}")


def canonical(key: str) -> str:
    """The key without the `module` and `_orig_mod` that DataParallel and torch.compile put into it."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_SEGMENTS)


def _why_unusable(tensor: Tensor) -> str | None:
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    if tensor.device.type != "cpu" or not dense:
        return "not a plain dense tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "claims more values than the file holds"
    return None


def read_state_dict(path: str | os.PathLike[str], *, key: str | None = None) -> dict[str, Tensor]:
    """Reads the tensors of a .pth or .safetensors checkpoint, with wrapper prefixes removed from the keys.

    Nothing in the file is ever run: pickles go through `torch.load(weights_only=True)`. Zip checkpoints and
    .safetensors are mapped into memory, not copied: keep the file in place while the tensors are in use.

    Args:
        path: the file.
        key: which dictionary of tensors to take, when the file holds several ("G", "checkpoint.state_dict").

    Raises:
        CheckpointError: no such file, not a file, empty, damaged, would run code, not a dictionary of
            tensors, several dictionaries of tensors, two keys that become one.
    """
    path = Path(path)
    state = _unwrapped(path, read_content(path), key)
    strange = [repr(name) for name in state if not isinstance(name, str)]
    if strange:
        raise CheckpointError(f"{path}: not a checkpoint; these keys are not text: {listed(strange)}")
    unusable = [f"{name}: {why}" for name, tensor in state.items() if (why := _why_unusable(tensor))]
    if unusable:
        raise CheckpointError(f"{path}: unusable tensors: {listed(unusable)}", misshapen=unusable)
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if canonical(name) in plain:
            raise CheckpointError(
                f"{path}: {canonical(name)} is there twice, with different prefixes (module., _orig_mod.)"
            )
        plain[canonical(name)] = tensor
    return plain


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating point" if dtype.is_floating_point else "integer"


def fitted(model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Pairs tensors as `read_state_dict` returns them with the keys of `model`, which may be on the meta
    device.

    Returns:
        A tensor of the right shape for every key of `model`, to be given to its `load_state_dict`.

    Raises:
        CheckpointError: keys or shapes differ; see `load_checkpoint`.
        ValueError: keys of `model` differ in wrapper prefixes alone.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = {canonical(name): name for name in own}
    if len(names) < len(own):
        raise ValueError(
            "model has keys that differ in 'module' or '_orig_mod' alone; use its load_state_dict instead"
        )
    instance_norms = {
        canonical(name)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _InstanceNorm)
    }
    taken: dict[str, Tensor] = {}
    unexpected: list[str] = []
    misshapen: list[str] = []
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if name in names:
            target = own[names[name]]
            if tensor.shape != target.shape:
                misshapen.append(f"{name}: {tuple(tensor.shape)} instead of {tuple(target.shape)}")
            elif _kind(tensor.dtype) != _kind(target.dtype) and last != "num_batches_tracked":
                misshapen.append(f"{name}: {tensor.dtype} instead of {target.dtype}")
            taken[names[name]] = tensor
        elif not (last in _STATISTICS and owner in instance_norms):
            unexpected.append(name)
    missing: list[str] = []
    for plain, actual in names.items():
        if actual in taken:
            continue
        if plain.endswith("num_batches_tracked"):
            # Files from before PyTorch 0.4.1 lack it, and only a momentum of None reads it.
            taken[actual] = torch.zeros(own[actual].shape, dtype=own[actual].dtype)
        else:
            missing.append(plain)
    if missing or unexpected or misshapen:
        lines = [
            f"  {title} ({len(items)}): {listed(items)}"
            for title, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if items
        ]
        raise CheckpointError(
            "\n".join([f"{path}: does not fit {type(model).__name__}; nothing was loaded", *lines]),
            missing=missing,
            unexpected=unexpected,
            misshapen=misshapen,
        )
    return taken


def load_checkpoint(model: M, path: str | os.PathLike[str], *, key: str | None = None) -> M:
    """Loads a published or own checkpoint into `model`, all of it or nothing.

    The file is a .pth (zip or older pickle) or .safetensors; it is never allowed to run code. Taken care of:

    - `module.` and `_orig_mod.` anywhere in the keys, of the file and of the model;
    - one dictionary of tensors wrapped in others, as under "state_dict", "model" or "G";
    - running statistics of InstanceNorm layers, which old files carry and which mean nothing;
    - a missing `num_batches_tracked`, which old files lack;
    - other floating-point types: values are converted to the model's dtype and device.

    Args:
        model: any module; changed in place.
        path: the file.
        key: which dictionary to take when the file holds several.

    Returns:
        `model`.

    Raises:
        CheckpointError: the file cannot be read (see `read_state_dict`) or does not fit. The message lists
            missing, unexpected and misshapen keys, with their numbers; the exception has them all. The model
            is unchanged.
        ValueError: `model` is on the meta device.
    """
    if any(isinstance(value, Tensor) and value.is_meta for value in model.state_dict().values()):
        raise ValueError("model is on the meta device; give it memory with model.to_empty(device=...) first")
    # strict=False: `fitted` has compared the keys, by their canonical names.
    model.load_state_dict(fitted(model, read_state_dict(path, key=key), path), strict=False)
    return model
