from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from p2pfast import models
from p2pfast.data import images
from p2pfast.data.images import resize_ids
from p2pfast.errors import InputError, UsageError
from p2pfast.functional import image_to_uint8
from p2pfast.pipeline import measure, network
from p2pfast.pipeline.files import find_items
from p2pfast.pipeline.sizes import Fit, SizePolicy, network_fit, pad


def test_sixteen_bit_maps_are_exact(tmp_path: Path) -> None:
    ids = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("a.png", "a.tif"):
        Image.fromarray(ids).save(tmp_path / name)
        assert np.array_equal(images.read_ids(tmp_path / name, "instance map"), ids)


def test_palette_files_give_indices(tmp_path: Path) -> None:
    ids = np.arange(35, dtype=np.uint8).reshape(5, 7)
    image = Image.fromarray(ids)
    image.putpalette(list(range(255, -1, -1)) * 3)
    assert image.mode == "P"
    for bits in (8, None):
        image.save(tmp_path / "a.png", **({} if bits else {"bits": 8}))
        assert np.array_equal(images.read_ids(tmp_path / "a.png", "label map"), ids)


def grey_png(path: Path, ids: np.ndarray, bits: int) -> None:
    """A grey PNG of less than 8 bits, which Pillow reads but does not write."""
    import struct
    import zlib

    per_byte = 8 // bits
    rows = b""
    for row in ids:
        padded = np.concatenate([row, np.zeros(-len(row) % per_byte, np.uint8)]).reshape(-1, per_byte)
        rows += b"\0" + bytes(
            sum(int(v) << (8 - bits * (k + 1)) for k, v in enumerate(group)) for group in padded
        )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_levels_below_eight_bits_are_not_widened(tmp_path: Path, bits: int) -> None:
    ids = (np.arange(35, dtype=np.uint8) % (1 << bits)).reshape(5, 7)
    grey_png(tmp_path / "a.png", ids, bits)
    assert np.array_equal(images.read_ids(tmp_path / "a.png", "label map"), ids)


def test_unusable_maps_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "rgb.png")
    Image.new("L", (8, 8)).save(tmp_path / "lossy.jpg")
    (tmp_path / "empty.png").touch()
    for name, message in (
        ("rgb.png", "a RGB picture"),
        ("lossy.jpg", "JPEG changes the numbers"),
        ("empty.png", "not an image"),
        ("absent.png", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            images.read_ids(tmp_path / name, "label map")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 35, (32, 32)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    for length in range(0, len(data) - 40, 37):
        (tmp_path / "part.png").write_bytes(data[:length])
        with pytest.raises(InputError):
            images.read_ids(tmp_path / "part.png", "label map")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    images.write_image(target, np.zeros((4, 4, 3), np.uint8))
    old = target.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        images.write_image(target, np.ones((4, 4, 3), np.uint8))
    assert target.read_bytes() == old and list(tmp_path.iterdir()) == [target]


def test_parallel_writers_do_not_meet(tmp_path: Path) -> None:
    """Writers of one name each finish; the file is one of theirs."""
    pictures = [np.full((64, 64, 3), value, np.uint8) for value in range(8)]
    threads = [threading.Thread(target=images.write_image, args=(tmp_path / "a.png", p)) for p in pictures]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(np.unique(np.array(Image.open(tmp_path / "a.png")))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_grey_results_are_written_as_grey(tmp_path: Path) -> None:
    images.write_image(tmp_path / "a.png", np.zeros((4, 5, 1), np.uint8))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "L" and image.size == (5, 4)


@pytest.mark.parametrize(
    ("name", "options", "multiple", "minimum"),
    [
        ("pix2pixhd-local", {"ngf": 2}, 32, 64),
        ("pix2pixhd-local", {"ngf": 2, "n_local_enhancers": 2}, 64, 128),
        ("pix2pixhd-global", {"ngf": 2}, 16, 32),
        ("pix2pixhd-global", {"ngf": 2, "n_downsampling": 2}, 4, 8),
        ("unet_256", {"ngf": 2}, 256, 256),
        ("unet_128", {"ngf": 2}, 128, 128),
        ("resnet_9blocks", {"ngf": 2}, 4, 8),
    ],
)
def test_the_multiple_is_read_off_the_network(name: str, options: dict, multiple: int, minimum: int) -> None:
    model = models.build(name, **options)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    channels = network.input_channels(model)
    assert network_fit(model, channels) == Fit(multiple, minimum)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        assert model(torch.zeros(1, channels, minimum, minimum + multiple)).shape[2:] == (
            minimum,
            minimum + multiple,
        )


def test_size_policies() -> None:
    fit = Fit(32, 64)
    assert (fit.up(64), fit.up(65), fit.up(3)) == (64, 96, 64)
    assert (fit.nearest(1000), fit.nearest(1010), fit.nearest(10)) == (992, 1024, 64)
    assert SizePolicy.parse("original").target(30, 40, fit) == (30, 40)
    assert SizePolicy.parse("multiple").target(1000, 1010, fit) == (992, 1024)
    assert SizePolicy.parse("640x480").target(1, 1, fit) == (480, 640)
    for wrong in ("", "640", "0x5", "640x480x3", "-1x5", "640X480", "999999x1"):
        with pytest.raises(UsageError, match="WIDTHxHEIGHT"):
            SizePolicy.parse(wrong)


def test_padding_repeats_the_border() -> None:
    padded = pad(np.array([[1, 2], [3, 4]], np.int32), Fit(4, 4))
    assert padded.tolist() == [[1, 2, 2, 2], [3, 4, 4, 4], [3, 4, 4, 4], [3, 4, 4, 4]]


@pytest.mark.parametrize(("height", "width"), [(33, 20), (100, 7), (16, 16), (1, 1)])
def test_nearest_is_pillows(height: int, width: int) -> None:
    ids = np.random.default_rng(0).integers(0, 255, (37, 41)).astype(np.uint8)
    pillow = np.array(Image.fromarray(ids).resize((width, height), Image.Resampling.NEAREST))
    assert np.array_equal(resize_ids(ids, height, width), pillow)


def test_uint8_is_truncated_like_the_published_scripts() -> None:
    values = torch.linspace(-1.2, 1.2, 3 * 40 * 50).reshape(1, 3, 40, 50)
    published = np.clip((values.numpy() + 1) / 2.0 * 255.0, 0, 255).astype(np.uint8)
    assert np.array_equal(image_to_uint8(values).numpy(), published.transpose(0, 2, 3, 1))


def test_classes_are_inferred() -> None:
    assert network.count_classes(36, True, None) == 35
    assert network.count_classes(35, False, None) == 35
    assert network.count_classes(36, True, 35) == 35
    with pytest.raises(UsageError, match="35 classes without instances make 35; give --instances"):
        network.count_classes(36, False, 35)


def test_same_names_and_missing_partners(tmp_path: Path) -> None:
    labels, instances = tmp_path / "labels", tmp_path / "instances"
    for folder in (labels / "sub", instances / "sub"):
        folder.mkdir(parents=True)
    for path in (
        labels / "a.png",
        labels / "a.bmp",
        labels / "sub" / "a.png",
        labels / "b.png",
        labels / "notes.txt",
        instances / "a.png",
        instances / "sub" / "a.tif",
    ):
        path.touch()
    items, failures = find_items(labels, instances, tmp_path / "out", "png", labels=True)
    assert [item.name for item in items] == ["a", "sub/a"]
    assert (
        items[1].instances == instances / "sub" / "a.tif"
        and items[1].output == tmp_path / "out" / "sub" / "a.png"
    )
    assert sorted(failure.reason.split(";")[0].split(" named")[0] for failure in failures) == [
        "has the same name as a.bmp",
        "no instance map",
    ]


def test_results_below_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "out" / "b.png").touch()
    items, _ = find_items(tmp_path, None, tmp_path / "out", "png", labels=True)
    assert [item.name for item in items] == ["a"]


def test_measurements_report_failures() -> None:
    result = measure.measure(measure.Task("reference", "no-such-network", 64, 64))
    assert "no-such-network" in result.error and not result.seconds


def test_a_long_first_run_stays_the_only_one() -> None:
    options = {"ngf": 4, "n_downsampling": 2, "n_blocks": 1}
    task = measure.Task("reference", "pix2pixhd-global", 64, 64, options=options, patience=0.0, runs=3)
    result = measure.run_task(task)
    assert len(result.seconds) == 1 and not result.warm
    result = measure.run_task(dataclasses.replace(task, patience=1e9))
    assert len(result.seconds) == 3 and result.warm


def test_statistics_of_runs() -> None:
    assert measure.Result([1.0, 2.0, 3.0, 4.0, 100.0]).median == 3.0
    assert measure.Result([1.0, 2.0, 3.0, 4.0, 5.0]).spread == 2.0
    assert measure.Result([1.0]).spread == 0.0


def test_outputs_are_spread_over_the_range() -> None:
    torch.manual_seed(0)
    model = models.build("pix2pixhd-global", ngf=4, n_downsampling=2, n_blocks=1).eval()
    measure.spread_output(model)
    with torch.inference_mode():
        output = model(measure.scene_input(36, 128, 64, 0).dense())
    assert 0.2 < float(output.std()) < 0.8 and float(output.abs().max()) > 0.9
