"""Label maps: what a label-to-image network sees, kept as integers instead of a one-hot tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_UNSIGNED)


class LabelMap:
    """Class labels, optional instance ids and optional feature channels of a batch of pictures.

    ``labels`` holds class ids in ``[0, num_classes)``; ``instances`` holds ids of any integer type, of which
    only equality with the neighbour matters; both are (N, 1, H, W), and (N, H, W) and (H, W) are accepted.
    ``features`` are floating (N, F, H, W). ``edges=False`` leaves out the channel of instance borders
    although instances are given. The dense form has pix2pixHD's channel order: one-hot labels, instance
    edge, features. A 2048x1024 picture of 35 classes is 302 MB dense and 2 to 18 MB here.

    Tensors are checked once, here. ``labels`` keeps its type if PyTorch computes with it and becomes a signed
    type that holds every value exactly otherwise (uint16 -> int32); so does ``instances``.

    Raises TypeError for things that are not tensors of integers (floats for ``features``), and ValueError for
    shapes that do not agree, for a label outside ``[0, num_classes)`` and for a negative instance id, naming
    the argument, the value and its position.
    """

    labels: Tensor
    instances: Tensor | None
    features: Tensor | None
    num_classes: int
    edges: bool

    def __init__(
        self,
        labels: Tensor,
        instances: Tensor | None = None,
        features: Tensor | None = None,
        *,
        num_classes: int,
        edges: bool = True,
    ) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an int, not {type(num_classes).__name__}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        self.labels = _integers("labels", labels)
        self.num_classes = num_classes
        self.edges = bool(edges)
        _check_range("labels", self.labels, num_classes)
        self.instances = None
        if instances is not None:
            self.instances = _integers("instances", instances)
            _check_agreement("instances", self.instances, self.labels)
            _check_range("instances", self.instances, None)
        self.features = None
        if features is not None:
            if not isinstance(features, Tensor):
                raise TypeError(f"features must be a tensor, not {type(features).__name__}")
            if not features.is_floating_point():
                raise TypeError(f"features must be a floating-point tensor, not {features.dtype}")
            if features.dim() != 4:
                raise ValueError(f"features must have shape (N, F, H, W), not {tuple(features.shape)}")
            _check_agreement("features", features, self.labels)
            self.features = features

    @property
    def has_edges(self) -> bool:
        """Whether the dense form has an instance-edge channel."""
        return self.edges and self.instances is not None

    @property
    def num_channels(self) -> int:
        """Channels of the dense form: classes, one for the edges if there is one, features."""
        features = 0 if self.features is None else self.features.shape[1]
        return self.num_classes + int(self.has_edges) + features

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense form, (N, num_channels, H, W)."""
        count, _, height, width = self.labels.shape
        return torch.Size((count, self.num_channels, height, width))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.labels.device

    def to(self, device: torch.device | str) -> LabelMap:
        """The same maps on another device. Values are not checked again."""
        return self.changed(lambda tensor: tensor.to(device))

    def changed(self, move: Callable[[Tensor], Tensor]) -> LabelMap:
        """The same maps with every tensor replaced by ``move`` of it, which must keep values, shape and type:
        they are not checked again."""
        moved = object.__new__(LabelMap)
        moved.num_classes = self.num_classes
        moved.edges = self.edges
        moved.labels = move(self.labels)
        moved.instances = None if self.instances is None else move(self.instances)
        moved.features = None if self.features is None else move(self.features)
        return moved

    def edge_map(self) -> Tensor:
        """Borders between instances, (N, 1, H, W) bool.

        A pixel is on a border if it is unlike its left, right, upper or lower neighbour, as in pix2pixHD's
        ``get_edges``. Raises ValueError without instances.
        """
        if self.instances is None:
            raise ValueError("instances were not given, so there are no instance edges")
        ids = self.instances
        edge = torch.zeros_like(ids, dtype=torch.bool)
        across = ids[..., 1:] != ids[..., :-1]
        edge[..., 1:] |= across
        edge[..., :-1] |= across
        down = ids[..., 1:, :] != ids[..., :-1, :]
        edge[..., 1:, :] |= down
        edge[..., :-1, :] |= down
        return edge

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that published networks take, (N, num_channels, H, W) of ``dtype``."""
        dense = torch.zeros(self.shape, dtype=dtype, device=self.device)
        dense.scatter_(1, self.labels.long(), 1.0)
        if self.has_edges:
            dense[:, self.num_classes] = self.edge_map()[:, 0]
        if self.features is not None:
            dense[:, self.num_classes + int(self.has_edges) :] = self.features
        return dense

    def __repr__(self) -> str:
        count, channels, height, width = self.shape
        return (
            f"LabelMap({count} of {width}x{height}, {self.num_classes} classes, edges={self.has_edges}, "
            f"{channels} channels, {self.device})"
        )


def _integers(name: str, value: Tensor) -> Tensor:
    """Check that ``value`` is an integer map and return it as (N, 1, H, W) of a type with full support."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}; torch.from_numpy makes one")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be an integer tensor, not {value.dtype}")
    if value.dim() == 2:
        value = value[None, None]
    elif value.dim() == 3:
        value = value[:, None]
    if value.dim() != 4 or value.shape[1] != 1:
        raise ValueError(
            f"{name} must have shape (N, 1, H, W), (N, H, W) or (H, W), not {tuple(value.shape)}"
        )
    if value.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(value.shape)}")
    if value.dtype is torch.uint16:
        return value.to(torch.int32)
    if value.dtype in _UNSIGNED:
        # Ids of 2**63 and above wrap to negative numbers here and are reported as out of range below.
        return value.to(torch.int64)
    return value


def _check_agreement(name: str, value: Tensor, labels: Tensor) -> None:
    if value.shape[0] != labels.shape[0] or value.shape[2:] != labels.shape[2:]:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} do not fit labels of shape {tuple(labels.shape)}"
        )
    if value.device != labels.device:
        raise ValueError(f"{name} are on {value.device} but labels on {labels.device}; move them together")


def _check_range(name: str, value: Tensor, limit: int | None) -> None:
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low >= 0 and (limit is None or high < limit):
        return
    wrong = value < 0 if limit is None else (value < 0) | (value >= limit)
    image, _, row, column = (int(index) for index in wrong.nonzero()[0])
    found = int(value[image, 0, row, column])
    expected = "must not be negative" if limit is None else f"must lie in [0, {limit})"
    hint = "" if limit is None or found < 0 else f"; the picture needs num_classes > {high}"
    raise ValueError(
        f"{name} {expected}, but {name}[{image}, 0, {row}, {column}] is {found} "
        f"({int(wrong.sum())} such pixels){hint}"
    )
