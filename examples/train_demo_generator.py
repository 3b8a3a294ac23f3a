"""Train the small generator that ``p2pfast demo`` ships, on streets that p2pfast draws itself.

A LocalEnhancer with 8 filters, pix2pixHD's recipe with an L1 loss in the place of the VGG loss: first on
squares of full height (in a crop of bare road instance normalisation would divide by almost nothing), then on
whole streets, so that instance statistics are those of the demo. Shipped is the moving average of the
weights, in half precision.

    python examples/train_demo_generator.py --output demo_generator.safetensors

A step on a square takes about 1.3 seconds of two cores (Zen 3, AVX2), and there are 1680 of them by default,
then 120 on whole streets, twice as long. The same command goes on where it was stopped. Either stage is what
``p2pfast train pix2pixhd`` does with the options below.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from p2pfast.train.config import Pix2PixHDConfig
from p2pfast.train.trainer import Outcome, Quiet, train

#: Of both stages. The streets of a thousand seeds on; the demo draws others.
SHARED: dict[str, Any] = {
    "netG": "local",
    "ngf": 8,
    "n_downsample_global": 4,
    "n_blocks_global": 2,
    "n_blocks_local": 2,
    "ndf": 20,
    "num_D": 2,
    "scenes": 120,
    "scene_width": 1024,
    "no_flip": True,  # the sun stands on one side
    "no_vgg_loss": True,
    "lambda_L1": 50.0,  # critics alone leave their grid in the pictures of so small a network
    "ema": 0.99,
    "continue_train": True,
    "save_epoch_freq": 1000,
}


class Printer(Quiet):
    def stepped(self, epoch: int, step: int, losses: Mapping[str, float], seconds: float) -> None:
        if step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"epoch {epoch} step {step}: {seconds:.2f} s {shown}", flush=True)

    def noted(self, message: str) -> None:
        print(message, flush=True)


def stages(folder: Path, epochs: int, seed: int) -> tuple[Pix2PixHDConfig, Pix2PixHDConfig]:
    """Squares for so many epochs, then whole streets for a fifteenth of them."""
    shared = {**SHARED, "checkpoints_dir": str(folder), "seed": seed}
    squares = Pix2PixHDConfig(
        name="demo-squares",
        preprocess="crop",
        crop_size=512,
        lr=5e-4,
        n_epochs=epochs // 2,
        n_epochs_decay=epochs - epochs // 2,
        **shared,
    )
    end = max(1, epochs // 15)
    whole = dataclasses.replace(
        squares,
        name="demo-whole",
        preprocess="none",
        load_pretrain=str(squares.run_folder),
        lr=1e-4,
        n_epochs=0,
        n_epochs_decay=end,
    )
    return squares, whole


def export(folder: Path, output: Path, steps: int) -> None:
    """Half precision halves the file; the weights are widened again when they are loaded."""
    weights = torch.load(folder / "latest_net_G_ema.pth", weights_only=True)
    shape = ("ngf", "n_downsample_global", "n_blocks_global", "n_blocks_local")
    metadata = {
        "description": "p2pfast demo generator: street label map to picture, 1024x512",
        "architecture": "LocalEnhancer, instance norm, 36 inputs: "
        + ", ".join(f"{name}={SHARED[name]}" for name in shape),
        "made_by": "examples/train_demo_generator.py " + " ".join(sys.argv[1:]),
        "data": "procedural scenes of p2pfast.data.draw_scene; no photographs",
        "steps": str(steps),
        "torch": torch.__version__,
    }
    save_file({key: value.half().contiguous() for key, value in weights.items()}, output, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=14, help="of 120 squares each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="for the two runs")
    parser.add_argument("--output", type=Path, default=Path("demo_generator.safetensors"))
    args = parser.parse_args()
    steps = 0
    outcome: Outcome | None = None
    for config in stages(args.folder, args.epochs, args.seed):
        outcome = train(config, Printer())
        if outcome.interrupted:
            sys.exit(130)
        steps += outcome.step
    assert outcome is not None
    export(outcome.folder, args.output, steps)
    print(f"{args.output}: {steps} steps")


if __name__ == "__main__":
    main()
