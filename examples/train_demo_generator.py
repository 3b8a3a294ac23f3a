"""Train the small generator that ``p2pfast demo`` ships, on streets that p2pfast draws itself.

A LocalEnhancer with 8 filters (pix2pixHD's coarse-to-fine layout: a global network at half resolution and
a local one at full) learns label map -> rendering with an L1 loss, one conditional PatchGAN (least squares)
and feature matching. Everything is plain PyTorch on one core. The shipped weights come from two runs, the
second with a weaker critic to remove what the first had put in the wrong places:

    export OMP_NUM_THREADS=1
    python examples/train_demo_generator.py --minutes 30 --output first.safetensors
    python examples/train_demo_generator.py --minutes 25 --seed 1 --critic-weight 0.25 \\
        --start first.safetensors --output demo_generator.safetensors
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from p2pfast.data import NUM_CLASSES, draw_scene
from p2pfast.labelmap import LabelMap
from p2pfast.models import build, load_checkpoint

WIDTH, HEIGHT = 1024, 512
# Strips of full height: every one has sky, houses and road. In a crop of bare road instance normalisation
# would divide by almost nothing and blow up the gradients.
CROP_WIDTH, CROP_HEIGHT = 128, 512
LATTICE = 32  # crops keep to it, so that the windows of houses keep their phase

#: Shares of the time: colours come first and need no critic, which costs as much as the generator; the end
#: sees whole streets, so that instance statistics are those of the demo.
CRITIC_FROM, WHOLE_FROM = 0.4, 0.95
LEARNING_RATE = 1e-3

#: Arguments of the generator; recorded in the file's metadata.
SHAPE: dict[str, Any] = {
    "input_nc": NUM_CLASSES + 1,
    "output_nc": 3,
    "ngf": 8,
    "n_downsample_global": 4,
    "n_blocks_global": 2,
    "n_local_enhancers": 1,
    "n_blocks_local": 2,
}


def make_generator() -> nn.Module:
    return build("pix2pixhd-local", **SHAPE)


class Critic(nn.Module):
    """A small conditional PatchGAN that returns the features of every layer, the verdict last."""

    def __init__(self, channels: int, width: int = 20) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList()
        for index, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
            norm = nn.InstanceNorm2d(after) if index else nn.Identity()
            self.layers.append(nn.Sequential(nn.Conv2d(before, after, 4, 2, 1), norm, nn.LeakyReLU(0.2)))
        self.layers.append(nn.Conv2d(sizes[-1], 1, 3, 1, 1))

    def forward(self, condition: Tensor, image: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        x = torch.cat([condition, image], 1)
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features


class Streets:
    """A growing pool of drawn streets; every draw returns a random aligned window of one of them."""

    def __init__(self, seed: int, pool: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.first, self.pool = 1000 * (seed + 1), pool
        self.scenes: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, whole: bool) -> tuple[Tensor, Tensor]:
        if len(self.scenes) < self.pool:
            scene = draw_scene(self.first + len(self.scenes), WIDTH, HEIGHT)
            assert scene.photo is not None
            self.scenes.append(
                (
                    torch.from_numpy(scene.labels),
                    torch.from_numpy(scene.instances.astype(np.int32)),
                    torch.from_numpy(scene.photo),
                )
            )
            labels, instances, photo = self.scenes[-1]
        else:
            labels, instances, photo = self.scenes[int(self.rng.integers(self.pool))]
        height, width = (HEIGHT, WIDTH) if whole else (CROP_HEIGHT, CROP_WIDTH)
        y = LATTICE * int(self.rng.integers((HEIGHT - height) // LATTICE + 1))
        x = LATTICE * int(self.rng.integers((WIDTH - width) // LATTICE + 1))
        window = slice(y, y + height), slice(x, x + width)
        condition = LabelMap(labels[window], instances[window], num_classes=NUM_CLASSES).dense()
        return condition, photo[window].permute(2, 0, 1)[None].float() / 127.5 - 1


def least_squares(verdict: Tensor, target: float) -> Tensor:
    return (verdict - target).square().mean()


def preview(generator: nn.Module, path: Path) -> None:
    """Translate a street that is never trained on."""
    scene = draw_scene(7, WIDTH, HEIGHT)
    labels = LabelMap(
        torch.from_numpy(scene.labels),
        torch.from_numpy(scene.instances.astype(np.int32)),
        num_classes=NUM_CLASSES,
    )
    with torch.inference_mode():
        image = generator(labels.dense())[0]
    Image.fromarray(((image + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path)


def train(
    minutes: float, seed: int, pool: int, critic_weight: float, start: Path | None, previews: Path | None
) -> tuple[nn.Module, int]:
    """Train for so many minutes; return the running average of the weights and the number of steps.

    ``start`` holds weights to go on from, which know their colours already: the critic judges at once.
    """
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    generator, average, critic = make_generator(), make_generator(), Critic(SHAPE["input_nc"] + 3)
    critic_from, rate = CRITIC_FROM, LEARNING_RATE
    if start is not None:
        load_checkpoint(generator, start)
        critic_from, rate = 0.0, LEARNING_RATE / 2
    average.load_state_dict(generator.state_dict())
    fast = torch.optim.Adam(generator.parameters(), lr=rate, betas=(0.5, 0.99))
    slow = torch.optim.Adam(critic.parameters(), lr=3e-4, betas=(0.5, 0.99))
    streets, began, step, reported = Streets(seed, pool), time.monotonic(), 0, 0.0
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in fast.param_groups:
            group["lr"] = rate * min(1.0, 1.7 * (1 - progress) + 0.02)
        condition, real = streets(whole=progress > WHOLE_FROM)
        fake = generator(condition)
        loss = 20 * F.l1_loss(fake, real)
        if progress > critic_from:
            seen, kept = critic(condition, fake.detach()), critic(condition, real)
            verdict = least_squares(seen[-1], 0.0) + least_squares(kept[-1], 1.0)
            slow.zero_grad(set_to_none=True)
            verdict.backward()
            slow.step()
            judged = critic(condition, fake)
            alike = sum(F.l1_loss(a, b.detach()) for a, b in zip(judged[:-1], kept, strict=False))
            loss = loss + critic_weight * (least_squares(judged[-1], 1.0) + 10 / 3 * alike)
        fast.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 5.0)
        fast.step()
        step += 1
        with torch.no_grad():
            decay = 0.95 if progress < 0.6 else 0.99
            for mean, value in zip(average.parameters(), generator.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if time.monotonic() - reported > 60:
            reported = time.monotonic()
            print(f"{progress:6.1%}  step {step}  loss {float(loss.detach()):.3f}", flush=True)
            if previews is not None:
                preview(average, previews / f"{round(progress * 1000):04d}.png")
                save(average, previews / "latest.safetensors", {"steps": str(step)})
    return average, step


def _made_by(path: Path) -> str:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return f"{metadata.get('steps', 'unknown')} steps of {metadata.get('made_by', 'unknown')}"


def save(generator: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Half precision halves the file; the weights are widened again when they are loaded."""
    save_file(
        {key: value.half().contiguous() for key, value in generator.state_dict().items()}, path, metadata
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=45, help="how long to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=120, help="number of streets drawn")
    parser.add_argument("--critic-weight", type=float, default=1.0, help="of critic and feature matching")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--previews", type=Path, help="folder for a picture a minute")
    parser.add_argument("--output", type=Path, default=Path("demo_generator.safetensors"))
    args = parser.parse_args()
    if args.previews is not None:
        args.previews.mkdir(parents=True, exist_ok=True)
    generator, steps = train(
        args.minutes, args.seed, args.pool, args.critic_weight, args.start, args.previews
    )
    save(
        generator,
        args.output,
        {
            "description": "p2pfast demo generator: street label map to picture, 1024x512",
            "architecture": "LocalEnhancer, instance norm: "
            + ", ".join(f"{key}={value}" for key, value in SHAPE.items()),
            "made_by": "examples/train_demo_generator.py " + " ".join(sys.argv[1:]),
            "continues": _made_by(args.start) if args.start else "random weights",
            "data": "procedural scenes of p2pfast.data.draw_scene; no photographs",
            "steps": str(steps),
            "torch": torch.__version__,
        },
    )


if __name__ == "__main__":
    main()
