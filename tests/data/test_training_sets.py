from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from p2pfast.data.augment import MODES, Preprocess
from p2pfast.data.datasets import (
    AlignedPairs,
    DrawnMaps,
    DrawnPairs,
    DrawnPictures,
    LabelFolders,
    LabelledPhotos,
    PairFolders,
    Pictures,
    SideBySide,
    UnalignedPictures,
)
from p2pfast.data.loading import Order, load
from p2pfast.errors import InputError, UsageError

WHOLE = Preprocess("none", flip=False, multiple=1)


def ramp(height: int, width: int) -> np.ndarray:
    """Every pixel of another colour."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 7 * x + 3 * y], -1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """A label map, an instance map and a photograph whose pixels agree everywhere: x in the photograph's red
    channel, in the instance map plus 1000, and in the label map modulo 35."""
    for i in range(3):
        photo = ramp(40, 60)
        save(tmp_path / "train_img" / f"{i}_leftImg8bit.png", photo)
        save(tmp_path / "train_inst" / f"{i}_gtFine_instanceIds.png", photo[..., 0].astype(np.uint16) + 1000)
        save(tmp_path / "train_label" / f"{i}_gtFine_labelIds.png", photo[..., 0] % 35)
        save(tmp_path / "train_label" / f"{i}_gtFine_color.png", photo)
    return tmp_path


@pytest.mark.parametrize("mode", MODES)
def test_modes_give_the_published_sizes(mode: str) -> None:
    sizes = {
        "resize_and_crop": (32, 32),
        "crop": (32, 32),
        "scale_width": (20, 40),
        "scale_width_and_crop": (32, 32),
        "none": (48, 100),
    }
    preprocess = Preprocess(mode, load_size=40, crop_size=32, multiple=4)
    for seed in range(20):
        window = preprocess.window((50, 100), np.random.default_rng(seed))
        assert window.image(ramp(50, 100)).shape == (3, *sizes[mode])
        assert window.ids(ramp(50, 100)[..., 0]).shape == (1, *sizes[mode])


def test_windows_reach_every_place_and_mirror_half() -> None:
    preprocess = Preprocess("crop", crop_size=3)
    windows = [preprocess.window((5, 5), np.random.default_rng(seed)) for seed in range(300)]
    assert {(w.rows.start, w.columns.start) for w in windows} == {(y, x) for y in range(3) for x in range(3)}
    assert 0.4 < np.mean([w.flip for w in windows]) < 0.6
    assert not any(Preprocess(flip=False).window((5, 5), np.random.default_rng(s)).flip for s in range(20))


def test_label_instance_and_photograph_share_their_window(maps: Path) -> None:
    dataset = LabelledPhotos(LabelFolders(maps, "train", True), Preprocess("crop", crop_size=16), 0, 35)
    assert len(dataset) == 3
    starts = set()
    for epoch in range(8):
        sample = dataset[epoch, 1]
        assert isinstance(sample, dict)
        red = sample["image"][:1].int()
        assert torch.equal(sample["instances"].int(), red + 1000) and torch.equal(sample["labels"], red % 35)
        starts.add(tuple(red[0, 0, :2].tolist()))
        assert all(torch.equal(value, dataset[epoch, 1][key]) for key, value in sample.items())
    assert len(starts) > 2


def test_pairs_side_by_side(tmp_path: Path) -> None:
    both = ramp(8, 20)
    save(tmp_path / "train" / "b.png", both)
    save(tmp_path / "train" / "sub" / "a.png", both)
    source = SideBySide(tmp_path / "train", (3, 1))
    sample = AlignedPairs(source, WHOLE, 0)[1, 0]
    assert np.array_equal(sample["A"].permute(1, 2, 0), both[:, :10]) and sample["B"].shape == (1, 8, 10)
    swapped = AlignedPairs(SideBySide(tmp_path / "train"), WHOLE, 0, swap=True)[1, 0]
    assert np.array_equal(swapped["A"].permute(1, 2, 0), both[:, 10:])
    assert len(source) == 2 and len(SideBySide(tmp_path / "train", limit=1)) == 1


def test_unaligned_pictures_draw_their_partner(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "trainA" / f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    for i in range(5):
        save(tmp_path / "trainB" / f"{i}.jpg", np.full((8, 8, 3), 50 * i, np.uint8))
    first, second = Pictures(tmp_path / "trainA"), Pictures(tmp_path / "trainB")
    dataset = UnalignedPictures(first, second, WHOLE, 0)
    assert len(dataset) == 5 and int(dataset[1, 3]["A"][0, 0, 0]) == 1
    assert len({int(dataset[epoch, 0]["B"][0, 0, 0]) for epoch in range(40)}) == 5
    serial = UnalignedPictures(first, second, WHOLE, 0, serial=True)
    assert [int(serial[1, i]["B"][0, 0, 0]) // 50 for i in range(5)] == [0, 1, 2, 3, 4]


def test_mistakes_are_named(maps: Path) -> None:
    with pytest.raises(UsageError, match="valid_label: no such folder; .* holds the folders train_img"):
        LabelFolders(maps, "valid", True)
    (maps / "train_inst" / "2_gtFine_instanceIds.png").unlink()
    with pytest.raises(UsageError, match="2_gtFine_labelIds.png have no partner of the same name in .*_inst"):
        LabelFolders(maps, "train", True)
    assert len(LabelFolders(maps, "train", False)) == 3
    (maps / "train_A").mkdir()
    with pytest.raises(UsageError, match="train_A: no pictures in it"):
        PairFolders(maps, "train")
    save(maps / "train_img" / "0_leftImg8bit.jpg", ramp(4, 4))
    with pytest.raises(UsageError, match="same name up to the extension"):
        LabelFolders(maps, "train", False)


def test_unreadable_files_are_named_when_they_are_due(maps: Path) -> None:
    photo = maps / "train_img" / "1_leftImg8bit.png"
    good = photo.read_bytes()
    dataset = LabelledPhotos(LabelFolders(maps, "train", True), WHOLE, 0, 35)
    label = maps / "train_label" / "1_gtFine_labelIds.png"
    for damage, message in (
        (lambda: photo.write_bytes(good[:100]), "1_leftImg8bit.png: damaged or truncated"),
        (
            lambda: save(photo, ramp(40, 59)),
            "1_gtFine_labelIds.png: 60x40 pixels, but its photograph has 59x40",
        ),
        (
            lambda: (photo.write_bytes(good), save(label, np.full((40, 60), 35, np.uint8))),
            "label 35 at row 0",
        ),
        (lambda: save(label, ramp(40, 60)), "a RGB picture, not a label map"),
    ):
        damage()
        error = dataset[1, 1]
        assert isinstance(error, InputError) and message in str(error)
    with pytest.raises(InputError, match="1_gtFine_labelIds.png"):
        list(load(dataset, Order(3), 0, 1, workers=1))
    small = AlignedPairs(DrawnPairs(maps, 1, 64), Preprocess("crop", crop_size=64), 0)[1, 0]
    assert isinstance(small, InputError) and "64x32 pixels are less than the crop" in str(small)


def test_drawn_streets_are_kept(tmp_path: Path) -> None:
    maps = DrawnMaps(tmp_path, 2, 64, instances=True)
    labels, instances, photo = maps.maps(1)
    assert labels.shape == instances.shape == photo.shape[:2] == (32, 64)
    kept = next(tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["street_64_00001.npz"]
    kept.write_bytes(kept.read_bytes()[:50])
    assert np.array_equal(maps.maps(1)[2], photo)
    picture = DrawnPictures(tmp_path, 2, 64, labels=False).picture(1)
    assert np.array_equal(picture, photo) and DrawnPairs(tmp_path, 2, 64).pair(1)[0].shape == (32, 64, 3)


def test_order_goes_on_from_any_step_and_is_shared() -> None:
    order = Order(samples=10, batch_size=2, accumulate=2, seed=3)
    assert order.steps == 3
    run = list(order.batches(0, epochs=2))
    assert len(run) == 12 and sorted({index for batch in run[:6] for _, index in batch}) == list(range(10))
    assert run[:6] != run[6:] and all(
        epoch == 1 + (i >= 6) for i, batch in enumerate(run) for epoch, _ in batch
    )
    for step in range(7):
        assert list(order.batches(step, 2)) == run[2 * step :]
    shared = Order(samples=10, batch_size=1, accumulate=2, world=2, seed=3)
    ranks = [list(shared.batches(1, 2, rank)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == run[2:]
    assert list(Order(samples=1, batch_size=4).batches(0, 1)) == [[(1, 0)] * 4]


def test_workers_change_nothing(tmp_path: Path) -> None:
    streets = DrawnMaps(tmp_path, 3, 64, instances=True)
    dataset = LabelledPhotos(streets, Preprocess("crop", crop_size=32), 5, 35)
    before = torch.get_rng_state()
    alone, helped = (list(load(dataset, Order(3), 1, 2, workers=workers)) for workers in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert len(alone) == 5
    for first, second in zip(alone, helped, strict=True):
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_pictures_of_two_sizes_cannot_share_a_batch(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / f"{i}.png", np.zeros((8, 8 + 8 * i, 3), np.uint8))
    dataset = AlignedPairs(SideBySide(tmp_path), WHOLE, 0)
    with pytest.raises(InputError, match="4x8 and 8x8 pixels cannot share a batch"):
        list(load(dataset, Order(2, batch_size=2), 0, 1))
