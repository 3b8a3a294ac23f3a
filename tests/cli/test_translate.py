from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from p2pfast import models
from p2pfast.functional import image_to_uint8
from p2pfast.labelmap import LabelMap
from tests.cli.conftest import Street, leftovers, read

Run = Callable[..., Result]


def expected(checkpoint: Path, labels: np.ndarray, instances: np.ndarray) -> np.ndarray:
    """What plain PyTorch makes of a label map."""
    given = LabelMap(torch.from_numpy(labels), torch.from_numpy(instances.astype(np.int64)), num_classes=35)
    with torch.inference_mode():
        return image_to_uint8(models.from_checkpoint(checkpoint)(given.dense()))[0].numpy()


def close(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal to a step of 8 bits: truncation turns the smallest difference into one."""
    return int(np.abs(first.astype(int) - second.astype(int)).max()) <= 1


def test_translates_a_folder(run: Run, street: Street, label_checkpoint: Path) -> None:
    done = run(*street.arguments(label_checkpoint))
    assert done.exit_code == 0, done.output
    assert street.results() == {"s0.png": (128, 64), "s1.png": (128, 64), "s2.png": (128, 64)}
    assert "3 translated" in done.output and not leftovers(street.output)
    labels, instances = read(street.labels / "s1.png"), read(street.instances / "s1.png")
    assert close(read(street.output / "s1.png"), expected(label_checkpoint, labels, instances))


def test_cityscapes_names_in_one_folder(run: Run, tmp_path: Path, label_checkpoint: Path) -> None:
    street = Street(tmp_path, count=2, cityscapes=True)
    town = tmp_path / "gtFine" / "aachen"
    town.mkdir(parents=True)
    for path in [*street.labels.iterdir(), *street.instances.iterdir()]:
        shutil.move(path, town)
    Image.new("RGB", (128, 64)).save(town / "s0_gtFine_color.png")
    done = run(
        "translate",
        label_checkpoint,
        "--labels",
        town.parent,
        "--instances",
        town.parent,
        "-o",
        street.output,
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (street.output / "aachen").iterdir()) == ["s0.png", "s1.png"]


def test_two_files_need_not_share_a_name(run: Run, street: Street, label_checkpoint: Path) -> None:
    done = run(
        "translate",
        label_checkpoint,
        "--labels",
        street.labels / "s0.png",
        "--instances",
        shutil.copy(street.instances / "s0.png", street.instances / "ids.png"),
        "-o",
        street.output,
    )
    assert done.exit_code == 0, done.output
    assert list(street.results()) == ["s0.png"]


def test_existing_results_are_skipped_unless_overwritten(
    run: Run, street: Street, label_checkpoint: Path
) -> None:
    street.output.mkdir()
    (street.output / "s1.png").write_bytes(b"kept")
    done = run(*street.arguments(label_checkpoint))
    assert done.exit_code == 0 and "2 translated" in done.output and "1 existed" in done.output
    assert (street.output / "s1.png").read_bytes() == b"kept"
    assert "0 translated, 3 existed" in run(*street.arguments(label_checkpoint)).output
    done = run(*street.arguments(label_checkpoint, "--overwrite"))
    assert "3 translated" in done.output and len(street.results()) == 3


def test_bad_inputs_are_named_and_the_others_done(run: Run, tmp_path: Path, label_checkpoint: Path) -> None:
    street = Street(tmp_path, count=8)
    damaged = street.labels / "s0.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (street.labels / "s1.png").write_bytes(b"no image")
    Image.new("RGB", (128, 64)).save(street.labels / "s2.png")
    Image.new("L", (64, 64)).save(street.labels / "s3.png")
    labels = read(street.labels / "s4.png").copy()
    labels[5, 9] = 35
    Image.fromarray(labels).save(street.labels / "s4.png")
    (street.instances / "s5.png").unlink()
    instance = street.instances / "s6.png"
    instance.write_bytes(instance.read_bytes()[:100])
    done = run(*street.arguments(label_checkpoint))
    assert done.exit_code == 1
    assert list(street.results()) == ["s7.png"] and not leftovers(street.output)
    reasons = {line.split(": ")[1]: line for line in done.output.splitlines() if line.startswith("failed: ")}
    assert len(reasons) == 7 and "1 translated" in done.output and "7 failed" in done.output
    for name, reason in {
        "s0": "damaged or truncated",
        "s1": "not an image",
        "s2": "a RGB picture, not a label map",
        "s3": "64x64 pixels, but its instance map",
        "s4": "label 35 at row 5, column 9",
        "s5": "no instance map named s5",
        "s6": "instance map",
    }.items():
        assert reason in reasons[str(street.labels / f"{name}.png")]


def test_sixteen_bit_instances_reach_the_network(run: Run, street: Street, label_checkpoint: Path) -> None:
    labels = np.full((64, 128), 26, np.uint8)
    instances = np.full((64, 128), 33000, np.uint16)
    instances[:, 64:] = 33000 + 256  # the same low byte
    for path in [*street.labels.iterdir(), *street.instances.iterdir()]:
        path.unlink()
    Image.fromarray(labels).save(street.labels / "a.png")
    Image.fromarray(instances).save(street.instances / "a.png")
    assert run(*street.arguments(label_checkpoint)).exit_code == 0
    assert close(read(street.output / "a.png"), expected(label_checkpoint, labels, instances))
    assert not close(
        read(street.output / "a.png"), expected(label_checkpoint, labels, np.zeros_like(instances))
    )


@pytest.mark.parametrize(
    ("size", "result"),
    [("original", (131, 67)), ("multiple", (132, 68)), ("96x40", (96, 40)), ("97x41", (97, 41))],
)
def test_sizes(run: Run, tmp_path: Path, label_checkpoint: Path, size: str, result: tuple[int, int]) -> None:
    street = Street(tmp_path, count=1, width=131, height=67)
    done = run(*street.arguments(label_checkpoint, "--size", size))
    assert done.exit_code == 0, done.output
    assert street.results() == {"s0.png": result}


def test_sizes_may_differ_within_batches(run: Run, tmp_path: Path, label_checkpoint: Path) -> None:
    street = Street(tmp_path, count=5)
    for folder, mode in ((street.labels, np.uint8), (street.instances, np.uint16)):
        Image.fromarray(np.zeros((40, 48), mode)).save(folder / "s2.png")
    one_by_one = street.output.with_name("single")
    assert run(*street.arguments(label_checkpoint, "--batch-size", "2")).exit_code == 0
    first = street.results()
    assert first["s2.png"] == (48, 40) and len(first) == 5
    street.output = one_by_one
    assert run(*street.arguments(label_checkpoint)).exit_code == 0
    for name in first:
        assert close(read(one_by_one / name), read(one_by_one.with_name("out") / name))


def test_jpg_bfloat16_and_gallery(run: Run, street: Street, label_checkpoint: Path) -> None:
    (street.labels / "s2.png").rename(street.labels / "a&b <c>.png")
    (street.instances / "s2.png").rename(street.instances / "a&b <c>.png")
    done = run(*street.arguments(label_checkpoint, "--format", "jpg", "--dtype", "bfloat16", "--gallery"))
    assert done.exit_code == 0, done.output
    assert sorted(street.results()) == ["a&b <c>.jpg", "s0.jpg", "s1.jpg"]
    assert read(street.output / "gallery" / "s0.jpg").shape == (64, 128, 3)
    page = (street.output / "index.html").read_text()
    assert 'src="gallery/s0.jpg"' in page and 'src="s0.jpg"' in page
    assert "a&amp;b &lt;c&gt;" in page and 'src="a%26b%20%3Cc%3E.jpg"' in page and "<c>" not in page


def test_gallery_shows_results_of_earlier_runs(run: Run, street: Street, label_checkpoint: Path) -> None:
    assert run(*street.arguments(label_checkpoint)).exit_code == 0
    assert run(*street.arguments(label_checkpoint, "--gallery")).exit_code == 0
    assert len(list((street.output / "gallery").iterdir())) == 3


def test_images(run: Run, tmp_path: Path, image_checkpoint: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(picture).save(photos / "a.png")
    Image.fromarray(picture).save(photos / "b.jpg")
    Image.fromarray(picture).convert("RGBA").save(photos / "c.png")
    done = run(
        "translate", image_checkpoint, "--images", photos, "-o", tmp_path / "out", "--size", "multiple"
    )
    assert done.exit_code == 0, done.output
    with torch.inference_mode():
        resized = np.array(Image.fromarray(picture).resize((72, 48), Image.Resampling.BICUBIC))
        given = torch.from_numpy(resized).permute(2, 0, 1)[None] / 127.5 - 1
        want = image_to_uint8(models.from_checkpoint(image_checkpoint)(given))[0].numpy()
    assert close(read(tmp_path / "out" / "a.png"), want)
    assert np.array_equal(read(tmp_path / "out" / "a.png"), read(tmp_path / "out" / "c.png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--size", "huge"], "use original, multiple or WIDTHxHEIGHT"),
        (["--format", "bmp"], "use png or jpg"),
        (["--dtype", "float8"], "use float32, bfloat16, float16"),
        (["--device", "tpu"], "use auto, cpu or cuda"),
        (["--num-classes", "40"], "40 classes and an instance edge make 41"),
        (["--images", "."], "give either --labels"),
        (["--labels", "nowhere"], "no such file or folder"),
    ],
)
def test_mistakes_get_one_line(
    run: Run, street: Street, label_checkpoint: Path, change: list[str], message: str
) -> None:
    done = run(*street.arguments(label_checkpoint, *change))
    assert done.exit_code == 2
    assert message in done.output and len(done.output.strip().splitlines()) == 1


def test_other_mistakes(
    run: Run, street: Street, label_checkpoint: Path, image_checkpoint: Path, tmp_path: Path
) -> None:
    labels = ("--labels", street.labels, "-o")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(label_checkpoint.read_bytes()[:500])
    for arguments, message in (
        (("translate", tmp_path / "absent.pth", *labels, street.output), "no such file"),
        (("translate", broken, *labels, street.output), "broken.pth"),
        (("translate", label_checkpoint, *labels, street.labels), "choose another for the results"),
        (("translate", label_checkpoint, "--images", street.labels, "-o", street.output), "use --labels"),
        (("translate", label_checkpoint, *labels, broken), "cannot make the folder"),
        (
            ("translate", image_checkpoint, *labels, street.output, "--num-classes", 35),
            "takes 3 input channels",
        ),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and message in done.output, done.output
        assert len(done.output.strip().splitlines()) == 1 and "Traceback" not in done.output
    if not torch.cuda.is_available():
        assert run(*street.arguments(label_checkpoint, "--device", "cuda")).exit_code == 2


def test_an_unexpected_error_is_reported_as_a_bug(
    run: Run, street: Street, label_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("p2pfast.cli.translate.find_items", broken)
    monkeypatch.setattr("p2pfast.cli.translate._inputs", broken)
    done = run(*street.arguments(label_checkpoint))
    assert done.exit_code == 70 and "internal error: KeyError: 'surprise'" in done.output


def test_a_full_disk_stops_the_job(
    run: Run, street: Street, label_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("p2pfast.data.atomic.os.replace", full)
    done = run(*street.arguments(label_checkpoint))
    assert done.exit_code == 2 and "No space left on device" in done.output
    assert not leftovers(street.output)


def test_batch_statistics_keep_pictures_apart(run: Run, tmp_path: Path) -> None:
    """A network with live BatchNorm gives each picture the result that it gets alone, and --eval another."""
    torch.manual_seed(0)
    model = models.build("unet_128", ngf=4)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (100, 128, 3)).astype(np.uint8)
        Image.fromarray(noise).save(photos / f"{index}.png")
    command = ("translate", tmp_path / "g.pth", "--images", photos, "--device", "cpu", "-o")
    together = run(*command, tmp_path / "both", "--batch-size", 2)
    assert together.exit_code == 0 and "batches of 1" in together.output, together.output
    run("translate", tmp_path / "g.pth", "--images", photos / "1.png", "-o", tmp_path / "alone")
    assert close(read(tmp_path / "both" / "1.png"), read(tmp_path / "alone" / "1.png"))
    assert run(*command, tmp_path / "eval", "--eval").exit_code == 0
    assert not close(read(tmp_path / "both" / "1.png"), read(tmp_path / "eval" / "1.png"))


def test_interruption_leaves_whole_files_and_says_how_to_go_on(
    run: Run, tmp_path: Path, label_checkpoint: Path
) -> None:
    street = Street(tmp_path, count=30)
    arguments = street.arguments(label_checkpoint, "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "p2pfast", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(street.output.glob("s*.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the job was done before the signal came")
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors and "Traceback" not in errors
    before = street.results()  # reads every file completely
    assert 0 < len(before) < 30 and not leftovers(street.output)
    resumed = run(*arguments)
    assert resumed.exit_code == 0, resumed.output
    assert f"{len(before)} existed" in resumed.output and len(street.results()) == 30
