from __future__ import annotations

import numpy as np
import pytest

from p2pfast.data import CLASS_NAMES, INSTANCE_CLASSES, NUM_CLASSES, Scene, colorize, draw_scene
from p2pfast.data.classes import ID, palette


@pytest.fixture(scope="module")
def scene() -> Scene:
    return draw_scene(3, 512, 256)


def test_types_and_ranges(scene: Scene) -> None:
    assert scene.labels.shape == scene.instances.shape == (256, 512)
    assert scene.labels.dtype == np.uint8 and scene.instances.dtype == np.uint16
    assert scene.photo is not None and scene.photo.shape == (256, 512, 3) and scene.photo.dtype == np.uint8
    assert scene.labels.max() < NUM_CLASSES == len(CLASS_NAMES) == 35


def test_same_seed_same_scene(scene: Scene) -> None:
    again, other = draw_scene(3, 512, 256), draw_scene(4, 512, 256)
    assert np.array_equal(scene.labels, again.labels) and np.array_equal(scene.instances, again.instances)
    assert scene.photo is not None and again.photo is not None and np.array_equal(scene.photo, again.photo)
    assert not np.array_equal(scene.labels, other.labels)


def test_labels_do_not_depend_on_the_photo(scene: Scene) -> None:
    bare = draw_scene(3, 512, 256, photo=False)
    assert bare.photo is None
    assert np.array_equal(scene.labels, bare.labels) and np.array_equal(scene.instances, bare.instances)


def test_what_belongs_to_a_street_is_there() -> None:
    found = set()
    for seed in range(6):
        labels = draw_scene(seed, 512, 256, photo=False).labels
        found |= set(np.unique(labels).tolist())
        assert labels[100:140, 250:260].size and (labels == ID["road"]).mean() > 0.1
    wanted = (
        "road",
        "sidewalk",
        "building",
        "sky",
        "vegetation",
        "car",
        "person",
        "pole",
        "traffic sign",
        "bicycle",
    )
    assert {ID[name] for name in wanted} <= found


def test_instance_ids_follow_their_class(scene: Scene) -> None:
    counted = np.isin(scene.labels, list(INSTANCE_CLASSES))
    assert np.array_equal(scene.instances[counted] // 1000, scene.labels[counted])
    assert np.array_equal(scene.instances[~counted], scene.labels[~counted])


def test_instance_ids_need_sixteen_bits() -> None:
    assert max(int(draw_scene(seed, 512, 256, photo=False).instances.max()) for seed in range(4)) > 32767


def uniform_windows(ids: np.ndarray, size: int = 7) -> float:
    """Share of windows without an instance edge, which then hold one label as well."""
    edge = np.zeros(ids.shape, np.int64)
    for axis in (0, 1):
        step = (np.diff(ids.astype(np.int64), axis=axis) != 0).astype(np.int64)
        first, last = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        first[axis], last[axis] = (0, 1), (1, 0)
        edge |= np.pad(step, first) | np.pad(step, last)
    total = np.pad(edge.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    return float((inside == 0).mean())


def test_windows_are_as_uniform_as_in_real_streets() -> None:
    """Label maps of real streets at this size have 84 to 92 % of 7x7 windows of one label without an edge."""
    shares = [uniform_windows(draw_scene(seed, 2048, 1024, photo=False).instances) for seed in range(6)]
    assert all(0.84 < share < 0.92 for share in shares), shares
    assert 0.86 < float(np.mean(shares)) < 0.90, shares


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 37), (333, 512)])
def test_odd_sizes(width: int, height: int) -> None:
    assert draw_scene(1, width, height).labels.shape == (height, width)


def test_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32, not 64x16"):
        draw_scene(0, 64, 16)


def test_palette_has_a_colour_for_every_class() -> None:
    assert len(np.unique(palette(), axis=0)) == NUM_CLASSES
    assert len(np.unique(palette(182), axis=0)) == 182
    assert colorize(np.array([[7, 23]], np.uint8)).tolist() == [[[128, 64, 128], [70, 130, 180]]]
