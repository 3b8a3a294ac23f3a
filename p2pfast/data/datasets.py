"""Training sets: pairs of pictures, two sets of pictures, label maps with photographs.

A sample is asked for by (epoch, index), and all its random choices come from the seed and that pair. So a
sample does not depend on who loads it or what was loaded before, and a run can go on from any position.
Pictures stay uint8 and ids integers until they are on the device: a quarter of the traffic of floats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from p2pfast.data.augment import Preprocess
from p2pfast.data.classes import colorize
from p2pfast.data.drawn import DrawnStreets
from p2pfast.data.folders import matched, pictures
from p2pfast.data.images import read_ids, read_image
from p2pfast.errors import InputError, UsageError

#: (epoch, index of the sample).
Position = tuple[int, int]
Sample = dict[str, Tensor]
Pixels = NDArray[np.uint8]
Ids = NDArray[np.integer]


class PairSource(Protocol):
    """Pairs of pictures (H, W, C) uint8 of one size."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def pair(self, index: int) -> tuple[Pixels, Pixels]: ...


class PictureSource(Protocol):
    """Pictures (H, W, C) uint8."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def picture(self, index: int) -> Pixels: ...


class LabelSource(Protocol):
    """Label map (H, W), instance map (H, W) or None, and photograph (H, W, 3), of one size."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def maps(self, index: int) -> tuple[Ids, Ids | None, Pixels]: ...


def _read_image(path: Path, channels: int) -> Pixels:
    try:
        return read_image(path, channels)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_ids(path: Path, kind: str) -> Ids:
    try:
        ids = read_ids(path, kind)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if int(ids.min()) < 0:
        raise InputError(f"{path}: negative id {int(ids.min())} in the {kind}")
    return ids


class SideBySide:
    """Files that hold A on the left and B on the right, as pix2pix keeps pairs.

    Args:
        folder: the folder of the phase, such as DATA/train.
        channels: of A and of B; 1 reads grey.
        limit: take so many files at most.
    """

    def __init__(self, folder: Path, channels: tuple[int, int] = (3, 3), limit: int | None = None) -> None:
        self.files, self.channels = pictures(folder)[:limit], channels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def pair(self, index: int) -> tuple[Pixels, Pixels]:
        path = self.files[index]
        halves = []
        for side, channels in enumerate(self.channels):
            both = _read_image(path, channels)
            width = both.shape[1]
            if width % 2:
                raise InputError(f"{path}: {width} pixels wide; A and B side by side need an even width")
            halves.append(both[:, side * width // 2 : (side + 1) * width // 2])
        return halves[0], halves[1]


class PairFolders:
    """pix2pixHD's folders ``{phase}_A`` and ``{phase}_B`` (``--label-nc 0``), paired by name."""

    def __init__(self, data: Path, phase: str, channels: tuple[int, int] = (3, 3), limit: int | None = None):
        self.files = list(matched({data / f"{phase}_A": (), data / f"{phase}_B": ()}))[:limit]
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def pair(self, index: int) -> tuple[Pixels, Pixels]:
        first, second = (
            _read_image(path, channels)
            for path, channels in zip(self.files[index], self.channels, strict=True)
        )
        return first, second


class DrawnPairs(DrawnStreets):
    """Drawn streets as pairs: the coloured label map and the rendering."""

    def pair(self, index: int) -> tuple[Pixels, Pixels]:
        scene = self.scene(index)
        assert scene.photo is not None
        return colorize(scene.labels), scene.photo


class Pictures:
    """The pictures of one folder."""

    def __init__(self, folder: Path, channels: int = 3, limit: int | None = None) -> None:
        self.files, self.channels = pictures(folder)[:limit], channels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def picture(self, index: int) -> Pixels:
        return _read_image(self.files[index], self.channels)


class DrawnPictures(DrawnStreets):
    """Drawn streets as pictures of one kind: coloured label maps if ``labels``, else renderings."""

    def __init__(self, folder: Path, count: int, width: int, labels: bool) -> None:
        super().__init__(folder, count, width)
        self.labels = labels

    def picture(self, index: int) -> Pixels:
        scene = self.scene(index)
        assert scene.photo is not None
        return colorize(scene.labels) if self.labels else scene.photo


class LabelFolders:
    """pix2pixHD's folders ``{phase}_label``, ``{phase}_inst`` and ``{phase}_img``, paired by name."""

    def __init__(self, data: Path, phase: str, instances: bool, limit: int | None = None) -> None:
        folders: dict[Path, tuple[str, ...]] = {
            data / f"{phase}_label": ("_labelIds",),
            data / f"{phase}_img": (),
        }
        if instances:
            folders[data / f"{phase}_inst"] = ("_instanceIds",)
        self.files = list(matched(folders))[:limit]

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index][0])

    def maps(self, index: int) -> tuple[Ids, Ids | None, Pixels]:
        label, image, *instance = self.files[index]
        instances = _read_ids(instance[0], "instance map") if instance else None
        return _read_ids(label, "label map"), instances, _read_image(image, 3)


class DrawnMaps(DrawnStreets):
    """Drawn streets as label map, instance map and rendering."""

    def __init__(self, folder: Path, count: int, width: int, instances: bool) -> None:
        super().__init__(folder, count, width)
        self.instances = instances

    def maps(self, index: int) -> tuple[Ids, Ids | None, Pixels]:
        scene = self.scene(index)
        assert scene.photo is not None
        return scene.labels, scene.instances.astype(np.int32) if self.instances else None, scene.photo


class _Drawn(Dataset[Sample]):
    """Samples by (epoch, index).

    A sample that cannot be made comes back as the InputError that says why, since exceptions lose their shape
    on the way from a worker process.
    """

    def __init__(self, preprocess: Preprocess, seed: int) -> None:
        self.preprocess, self.seed = preprocess, seed

    def __getitem__(self, position: Position) -> Sample | InputError:  # type: ignore[override]
        epoch, index = position
        try:
            return self.sample(index, np.random.default_rng([self.seed, epoch, index]))
        except InputError as error:
            return error

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        raise NotImplementedError


def _same_size(name: str, first: NDArray, **others: NDArray) -> None:
    for what, other in others.items():
        if other.shape[:2] != first.shape[:2]:
            sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (first, other)]
            raise InputError(f"{name}: {sizes[0]} pixels, but its {what} has {sizes[1]}")


class AlignedPairs(_Drawn):
    """Samples ``A`` and ``B``, (C, h, w) uint8, cut by one window. ``swap`` exchanges them (BtoA)."""

    def __init__(self, source: PairSource, preprocess: Preprocess, seed: int, swap: bool = False) -> None:
        super().__init__(preprocess, seed)
        self.source, self.swap = source, swap

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        first, second = self.source.pair(index)
        name = self.source.name(index)
        _same_size(name, first, partner=second)
        window = self.preprocess.window(first.shape, rng, name)
        pair = [torch.from_numpy(window.image(pixels)) for pixels in (first, second)]
        return dict(zip("BA" if self.swap else "AB", pair, strict=True))


class UnalignedPictures(_Drawn):
    """Samples ``A`` and ``B``, (C, h, w) uint8 each with its own window; B is a random picture.

    ``serial`` takes B in order instead. An epoch is as long as the larger of the two sets.
    """

    def __init__(
        self,
        first: PictureSource,
        second: PictureSource,
        preprocess: Preprocess,
        seed: int,
        serial: bool = False,
    ) -> None:
        super().__init__(preprocess, seed)
        self.first, self.second, self.serial = first, second, serial

    def __len__(self) -> int:
        return max(len(self.first), len(self.second))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        drawn = int(rng.integers(len(self.second)))
        indices = index % len(self.first), index % len(self.second) if self.serial else drawn
        sample = {}
        for key, source, i in zip("AB", (self.first, self.second), indices, strict=True):
            pixels = source.picture(i)
            window = self.preprocess.window(pixels.shape, rng, source.name(i))
            sample[key] = torch.from_numpy(window.image(pixels))
        return sample


class LabelledPhotos(_Drawn):
    """Samples ``labels`` and, where there are any, ``instances`` (1, h, w), and ``image`` (3, h, w) uint8.

    Labels are uint8, int32 with more than 256 classes, and instances int32, whatever a file's numbers are: a
    batch takes the type of its first sample.
    Labels outside [0, num_classes) are an InputError that names the file and the pixel.
    """

    def __init__(self, source: LabelSource, preprocess: Preprocess, seed: int, num_classes: int) -> None:
        super().__init__(preprocess, seed)
        self.source, self.num_classes = source, num_classes

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        labels, instances, photo = self.source.maps(index)
        name = self.source.name(index)
        _same_size(name, labels, photograph=photo)
        if int(labels.max()) >= self.num_classes:
            row, column = (int(i[0]) for i in np.nonzero(labels >= self.num_classes))
            raise InputError(
                f"{name}: label {labels[row, column]} at row {row}, column {column}; --label-nc "
                f"{self.num_classes} knows 0 to {self.num_classes - 1}"
            )
        window = self.preprocess.window(labels.shape, rng, name)
        narrow = self.num_classes <= 256
        labels = labels.astype(np.uint8 if narrow else np.int32, copy=False)
        sample = {"labels": window.ids(labels), "image": window.image(photo)}
        if instances is not None:
            _same_size(name, labels, **{"instance map": instances})
            sample["instances"] = window.ids(instances.astype(np.int32, copy=False))
        return {key: torch.from_numpy(value) for key, value in sample.items()}


def check_exists(data: Path) -> None:
    """Raises UsageError if the data folder is not there."""
    if not data.is_dir():
        raise UsageError(f"--data {data}: no such folder; --data synthetic draws streets instead")
