from __future__ import annotations

import numpy as np
import pytest
import torch

from p2pfast.labelmap import LabelMap


def edges_by_definition(ids: np.ndarray) -> np.ndarray:
    """A pixel is an edge if any of its four neighbours inside the picture differs."""
    height, width = ids.shape
    edge = np.zeros(ids.shape, bool)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    edge[y, x] |= ids[y, x] != ids[y + dy, x + dx]
    return edge


def random_ids(*shape: int, high: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
)
def test_dense_is_one_hot_then_edge_then_features(dtype: torch.dtype) -> None:
    labels = random_ids(2, 1, 9, 13, high=7).to(dtype)
    instances = random_ids(2, 1, 9, 13, high=4, seed=1).to(dtype)
    features = torch.randn(2, 3, 9, 13)
    given = LabelMap(labels, instances, features, num_classes=7)
    dense = given.dense()
    assert dense.shape == given.shape == (2, 11, 9, 13) and given.num_channels == 11
    assert dense.dtype is torch.float32
    expected = torch.nn.functional.one_hot(labels.to(torch.int64)[:, 0], 7).permute(0, 3, 1, 2)
    assert torch.equal(dense[:, :7], expected.float())
    for image in range(2):
        edge = edges_by_definition(instances.to(torch.int64)[image, 0].numpy())
        assert np.array_equal(dense[image, 7].numpy(), edge.astype(np.float32))
    assert torch.equal(dense[:, 8:], features)


def test_shapes_without_batch_or_channel_are_accepted() -> None:
    labels = random_ids(2, 4, 6, high=3)
    assert LabelMap(labels, num_classes=3).shape == (2, 3, 4, 6)
    assert LabelMap(labels[0], labels[0], num_classes=3).shape == (1, 4, 4, 6)


def test_edges_can_be_left_out() -> None:
    labels = random_ids(1, 1, 4, 4, high=3)
    given = LabelMap(labels, labels, num_classes=3, edges=False)
    assert given.num_channels == 3 and not given.has_edges and given.dense().shape[1] == 3
    with pytest.raises(ValueError, match="instances were not given"):
        LabelMap(labels, num_classes=3).edge_map()


def test_ids_of_sixteen_bits_and_more_are_exact() -> None:
    # Neighbours that agree in their low bits, or in float16 and float32, still differ.
    for low, high, dtype in (
        (33000, 33001, torch.uint16),
        (0, 65535, torch.uint16),
        (26000, 26000 + 256, torch.int32),
        (2**24, 2**24 + 1, torch.int32),
        (2**40, 2**40 + 1, torch.int64),
    ):
        ids = torch.full((4, 6), low, dtype=torch.int64)
        ids[:, 3:] = high
        edge = LabelMap(torch.zeros(4, 6, dtype=torch.uint8), ids.to(dtype), num_classes=1).edge_map()
        assert edge[0, 0, 0].tolist() == [False, False, True, True, False, False]


def test_numpy_uint16_is_exact() -> None:
    ids = np.array([[32767, 32768], [65535, 33001]], np.uint16)
    kept = LabelMap(torch.zeros(2, 2, dtype=torch.uint8), torch.from_numpy(ids), num_classes=1).instances
    assert kept is not None and kept.dtype is torch.int32
    assert kept[0, 0].tolist() == [[32767, 32768], [65535, 33001]]


def test_dense_dtype_and_device() -> None:
    given = LabelMap(random_ids(1, 1, 4, 4, high=3), num_classes=3)
    assert given.dense(torch.bfloat16).dtype is torch.bfloat16
    moved = given.to("cpu")
    assert moved.device.type == "cpu" and torch.equal(moved.dense(), given.dense())
    assert "3 classes" in repr(given)


def test_label_out_of_range_names_value_and_place() -> None:
    labels = torch.zeros(2, 1, 5, 7, dtype=torch.uint8)
    labels[1, 0, 3, 4] = 35
    with pytest.raises(
        ValueError, match=r"labels must lie in \[0, 35\), but labels\[1, 0, 3, 4\] is 35 \(1 such"
    ):
        LabelMap(labels, num_classes=35)


def test_negative_values_are_refused() -> None:
    ids = torch.zeros(3, 3, dtype=torch.int32)
    ids[2, 1] = -1
    with pytest.raises(ValueError, match=r"labels must lie in .* labels\[0, 0, 2, 1\] is -1"):
        LabelMap(ids, num_classes=2)
    with pytest.raises(
        ValueError, match=r"instances must not be negative, but instances\[0, 0, 2, 1\] is -1"
    ):
        LabelMap(torch.zeros(3, 3, dtype=torch.uint8), ids, num_classes=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": torch.zeros(4, 4)}, TypeError, "labels must be an integer tensor, not torch.float32"),
        ({"labels": torch.zeros(4, 4, dtype=torch.bool)}, TypeError, "labels must be an integer tensor"),
        ({"labels": np.zeros((4, 4), np.uint8)}, TypeError, "labels must be a tensor, not ndarray"),
        ({"labels": torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, ValueError, r"not \(1, 3, 4, 4\)"),
        ({"labels": torch.zeros(0, 4, dtype=torch.uint8)}, ValueError, "labels is empty"),
        ({"instances": torch.zeros(4, 4)}, TypeError, "instances must be an integer tensor"),
        (
            {"instances": torch.zeros(4, 5, dtype=torch.int32)},
            ValueError,
            r"instances of shape \(1, 1, 4, 5\)",
        ),
        ({"features": torch.zeros(1, 2, 4, 4, dtype=torch.int32)}, TypeError, "features must be a floating"),
        ({"features": torch.zeros(2, 4, 4)}, ValueError, r"features must have shape \(N, F, H, W\)"),
        ({"features": torch.zeros(1, 2, 4, 5)}, ValueError, r"features of shape \(1, 2, 4, 5\) do not fit"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"num_classes": 3.0}, TypeError, "num_classes must be an int"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    complete = {"labels": torch.zeros(4, 4, dtype=torch.uint8), "num_classes": 3, **arguments}
    with pytest.raises(error, match=message):
        LabelMap(**complete)
