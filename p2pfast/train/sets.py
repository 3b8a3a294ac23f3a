"""The training set of a configuration."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Dataset

from p2pfast.data.augment import Preprocess
from p2pfast.data.datasets import (
    AlignedPairs,
    DrawnMaps,
    DrawnPairs,
    DrawnPictures,
    LabelFolders,
    LabelledPhotos,
    LabelSource,
    PairFolders,
    PairSource,
    Pictures,
    PictureSource,
    Sample,
    SideBySide,
    UnalignedPictures,
    check_exists,
)
from p2pfast.errors import UsageError
from p2pfast.train.config import Config, CycleGANConfig, Pix2PixConfig, Pix2PixHDConfig

SYNTHETIC = "synthetic"


def training_set(config: Config, multiple: int) -> Dataset[Sample]:
    """The data of a run, in the folders the published tools expect; `synthetic` draws streets.

    Args:
        multiple: sizes the networks take are multiples of this.

    Raises:
        UsageError: a missing folder, unpaired files, a crop size that the networks do not take.
    """
    preprocess = Preprocess(
        config.preprocess, config.load_size, config.crop_size, not config.no_flip, multiple
    )
    if "crop" in config.preprocess and config.crop_size % multiple:
        raise UsageError(f"--crop-size {config.crop_size}: the generator takes multiples of {multiple}")
    if config.preprocess == "resize_and_crop" and config.load_size < config.crop_size:
        raise UsageError(f"--load-size {config.load_size} is less than --crop-size {config.crop_size}")
    data, limit = Path(config.data), config.max_dataset_size or None
    drawn = config.data == SYNTHETIC
    if not drawn:
        check_exists(data)
    # Beside the runs, so that runs share them.
    streets = Path(config.checkpoints_dir) / "synthetic_streets"
    count = min(config.scenes, limit or config.scenes)
    width = config.scene_width
    match config:
        case Pix2PixConfig():
            channels = (config.input_nc, config.output_nc)
            swap = config.direction == "BtoA"
            sides = (channels[1], channels[0]) if swap else channels
            pairs: PairSource
            if drawn:
                _check_colour(channels)
                pairs = DrawnPairs(streets, count, width)
            else:
                pairs = SideBySide(data / config.phase, sides, limit)
            return AlignedPairs(pairs, preprocess, config.seed, swap)
        case CycleGANConfig():
            sets: list[PictureSource] = []
            swap = config.direction == "BtoA"
            channels = (config.input_nc, config.output_nc)
            for side, nc in zip("BA" if swap else "AB", channels, strict=True):
                if drawn:
                    _check_colour(channels)
                    sets.append(DrawnPictures(streets, count, width, labels=side == "A"))
                else:
                    sets.append(Pictures(data / f"{config.phase}{side}", nc, limit))
            return UnalignedPictures(sets[0], sets[1], preprocess, config.seed, config.serial_batches)
        case Pix2PixHDConfig() if config.label_nc == 0:
            folders = (
                DrawnPairs(streets, count, width) if drawn else PairFolders(data, config.phase, limit=limit)
            )
            return AlignedPairs(folders, preprocess, config.seed)
        case Pix2PixHDConfig():
            instances = not config.no_instance
            maps: LabelSource
            if drawn:
                maps = DrawnMaps(streets, count, width, instances)
            else:
                maps = LabelFolders(data, config.phase, instances, limit)
            return LabelledPhotos(maps, preprocess, config.seed, config.label_nc)
        case _:
            raise TypeError(f"no training set is known for {type(config).__name__}")


def _check_colour(channels: tuple[int, int]) -> None:
    if channels != (3, 3):
        raise UsageError("--data synthetic draws in colour: leave --input-nc and --output-nc at 3")
