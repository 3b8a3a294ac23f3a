"""What a training run is: every option of every objective, with its default, help and bounds.

The command line, the saved ``config.json`` and the trainers all read these classes. Names, defaults and
meanings are those of the published training scripts where those have the option.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

from p2pfast.errors import UsageError

RUN, DATA, NETWORKS, LOSSES = "The run", "Data", "Networks", "Losses"
SCHEDULE, SPEED, OUTPUT = "Schedule", "Speed and memory", "What is written"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Meta:
    """What the command line shows of an option. ``flags`` is empty where the name says it."""

    group: str
    help: str
    flags: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    least: float | None = None
    metavar: str | None = None


def option(
    default: Any,
    group: str,
    help: str,
    *flags: str,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    metavar: str | None = None,
) -> Any:
    return field(default=default, metadata={"option": Meta(group, help, flags, choices, least, metavar)})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that all objectives share."""

    kind: ClassVar[str]

    data: str = option(
        "synthetic",
        RUN,
        "Folder with the training pictures, or synthetic: streets that p2pfast draws itself.",
        metavar="DIR|synthetic",
    )
    name: str = option("", RUN, "Name of the run: the folder under --checkpoints-dir.")
    checkpoints_dir: str = option("checkpoints", RUN, "Where the folders of runs are.", metavar="DIR")
    continue_train: bool = option(
        False,
        RUN,
        "Go on with the run of this name. Options that are not given are those it was started with.",
    )
    load_pretrain: str = option(
        "", RUN, "Folder of another run: take its latest networks as far as they fit.", metavar="DIR"
    )
    device: str = option(
        "auto", RUN, "auto takes a GPU if PyTorch finds one.", choices=("auto", "cpu", "cuda")
    )
    seed: int = option(0, RUN, "Seed of weights, order, crops and dropout.", least=0)
    max_steps: int = option(0, RUN, "Stop after so many steps in all; 0 trains all epochs.", least=0)

    phase: str = option("train", DATA, "Which part of the data: the folder, or the start of folders' names.")
    preprocess: str = option(
        "resize_and_crop",
        DATA,
        "Resize, then cut squares.",
        "--preprocess",
        "--resize-or-crop",
        choices=("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"),
    )
    load_size: int = option(286, DATA, "Size (or width, with scale_width) to resize to.", least=1)
    crop_size: int = option(256, DATA, "Side of the squares to cut.", "--crop-size", "--fine-size", least=1)
    no_flip: bool = option(False, DATA, "Do not mirror half of the pictures.")
    max_dataset_size: int = option(0, DATA, "Take so many pictures at most; 0 takes all.", least=0)
    serial_batches: bool = option(False, DATA, "Take pictures in order, not shuffled.")
    num_threads: int = option(
        2,
        DATA,
        "Processes that load pictures ahead; 0 loads between steps.",
        "--num-threads",
        "--nThreads",
        least=0,
    )
    scenes: int = option(200, DATA, "Number of streets of --data synthetic.", least=1)
    scene_width: int = option(512, DATA, "Their width; they are half as high.", least=64)

    batch_size: int = option(1, SCHEDULE, "Pictures in a batch, per process.", least=1)
    accumulate: int = option(
        1,
        SCHEDULE,
        "Batches whose gradients are added up for one step: larger batches in the same memory.",
        least=1,
    )
    lr: float = option(2e-4, SCHEDULE, "Learning rate of Adam.", least=0)
    beta1: float = option(0.5, SCHEDULE, "Adam's first beta; the second is 0.999.", least=0)
    n_epochs: int = option(
        100, SCHEDULE, "Epochs with the full learning rate.", "--n-epochs", "--niter", least=0
    )
    n_epochs_decay: int = option(
        100, SCHEDULE, "Epochs in which it then goes to zero.", "--n-epochs-decay", "--niter-decay", least=0
    )
    ema: float = option(
        0.0,
        SCHEDULE,
        "Decay of a moving average of the generator, saved as net_G_ema; 0 keeps none.",
        least=0,
    )

    amp: str = option(
        "none",
        SPEED,
        "Mixed precision; float16 scales losses. Losses and statistics stay float32.",
        choices=("none", "bfloat16", "float16"),
    )
    fused: bool = option(
        True, SPEED, "p2pfast's kernels for networks and losses, or plain PyTorch.", "--fused/--no-fused"
    )
    compile: bool = option(
        False, SPEED, "torch.compile the networks (then without p2pfast's kernels in them)."
    )
    deterministic: bool = option(
        False, SPEED, "Only deterministic algorithms, where PyTorch has them; it warns where it has none."
    )
    threads: int = option(
        0, SPEED, "Processor threads of the main process; 0 takes PyTorch's choice.", least=0
    )

    print_freq: int = option(100, OUTPUT, "Write losses every so many pictures.", least=1)
    display_freq: int = option(400, OUTPUT, "Write example pictures every so many pictures.", least=1)
    save_latest_freq: int = option(5000, OUTPUT, "Save the latest state every so many pictures.", least=1)
    save_epoch_freq: int = option(5, OUTPUT, "Keep the networks of every so many epochs.", least=1)
    no_html: bool = option(False, OUTPUT, "No page of example pictures.")
    no_tensorboard: bool = option(False, OUTPUT, "No TensorBoard files, even if it is installed.")

    @property
    def epochs(self) -> int:
        return self.n_epochs + self.n_epochs_decay

    @property
    def run_folder(self) -> Path:
        return Path(self.checkpoints_dir) / self.name

    def learning_rate(self, epoch: int) -> float:
        """In epoch 1, 2, …: constant for n_epochs, then a line that reaches zero right after the end."""
        return self.lr * (1 - max(0, epoch - self.n_epochs) / (self.n_epochs_decay + 1))

    def check(self) -> None:
        """Raises UsageError for values that make no run."""
        hints = get_type_hints(type(self))
        for entry in dataclasses.fields(self):
            meta, value = entry.metadata["option"], getattr(self, entry.name)
            flag, hint = flag_of(entry), hints[entry.name]
            if type(value) is not hint and not (hint is float and type(value) is int):
                raise UsageError(f"{flag} {value!r}: {_EXPECTED[hint]} is expected")
            if meta.choices and value not in meta.choices:
                raise UsageError(f"{flag} {value}: use {', '.join(meta.choices)}")
            if hint is float and not math.isfinite(value):
                raise UsageError(f"{flag} {value}: must be a finite number")
            if meta.least is not None and value < meta.least:
                raise UsageError(f"{flag} {value}: must be at least {meta.least:g}")
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise UsageError(f"--name {self.name!r}: give the run a plain name, such as street1")
        if len(os.fsencode(self.name)) > _LONGEST_NAME:
            raise UsageError(f"--name of {len(self.name)} characters: {_LONGEST_NAME} bytes are the most")
        for flag, number, most in (("--seed", self.seed, 2**32 - 1), ("--threads", self.threads, 1024)):
            if number > most:
                raise UsageError(f"{flag} {number}: must be at most {most}")
        for flag, share in (("--ema", self.ema), ("--beta1", self.beta1)):
            if share >= 1:
                raise UsageError(f"{flag} {share}: must be below 1, such as 0.999")
        if self.epochs < 1:
            raise UsageError("--n-epochs and --n-epochs-decay are both 0: nothing to train")


_EXPECTED: dict[type, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
}
_LONGEST_NAME = 200  # bytes; file systems take 255

_INIT = ("normal", "xavier", "kaiming", "orthogonal")
_GAN_MODES = ("vanilla", "lsgan", "hinge", "wgangp")


@dataclass(frozen=True, kw_only=True)
class _PairedNets(Config):
    """Networks of pytorch-CycleGAN-and-pix2pix."""

    direction: str = option("AtoB", DATA, "Which side is the input.", choices=("AtoB", "BtoA"))
    input_nc: int = option(3, NETWORKS, "Channels of A: 3 colour, 1 grey.", least=1)
    output_nc: int = option(3, NETWORKS, "Channels of B.", least=1)
    ngf: int = option(64, NETWORKS, "Channels of the generator's first layer.", least=1)
    ndf: int = option(64, NETWORKS, "Channels of the discriminator's first layer.", least=1)
    netG: str = option(
        "resnet_9blocks", NETWORKS, "Generator: resnet_Nblocks, or unet_S for sizes that are multiples of S."
    )
    netD: str = option(
        "basic",
        NETWORKS,
        "Discriminator: 70x70 patches, --n-layers-D layers, or single pixels.",
        choices=("basic", "n_layers", "pixel"),
    )
    n_layers_D: int = option(3, NETWORKS, "Layers of --netD n_layers.", least=1)
    norm: str = option("instance", NETWORKS, "Normalisation.", choices=("instance", "batch", "none"))
    no_dropout: bool = option(True, NETWORKS, "No dropout in the generator.", "--no-dropout/--dropout")
    init_type: str = option("normal", NETWORKS, "How weights are drawn.", choices=_INIT)
    init_gain: float = option(0.02, NETWORKS, "Their deviation, or gain.", least=0)
    gan_mode: str = option("lsgan", LOSSES, "Adversarial loss.", choices=_GAN_MODES)
    lambda_gp: float = option(10.0, LOSSES, "Weight of the gradient penalty of wgangp.", least=0)
    pool_size: int = option(50, LOSSES, "Earlier images the discriminator is also shown.", least=0)

    def check(self) -> None:
        super().check()
        for flag, channels in (("--input-nc", self.input_nc), ("--output-nc", self.output_nc)):
            if channels not in (1, 3):
                raise UsageError(f"{flag} {channels}: pictures are read in colour, 3, or in grey, 1")
        mixes = self.kind == "cyclegan" or self.pool_size > 0
        if self.gan_mode == "wgangp" and mixes and "crop" not in self.preprocess:
            raise UsageError(
                "--gan-mode wgangp mixes real and drawn pictures, which may differ in size with --preprocess "
                f"{self.preprocess}; use one that crops"
            )


@dataclass(frozen=True, kw_only=True)
class Pix2PixConfig(_PairedNets):
    """pix2pix (Isola et al. 2017): U-Net and conditional PatchGAN on aligned pairs."""

    kind = "pix2pix"

    netG: str = option(
        "unet_256", NETWORKS, "Generator: unet_S for sizes that are multiples of S, or resnet_Nblocks."
    )
    norm: str = option("batch", NETWORKS, "Normalisation.", choices=("instance", "batch", "none"))
    no_dropout: bool = option(False, NETWORKS, "No dropout in the generator.", "--no-dropout/--dropout")
    gan_mode: str = option("vanilla", LOSSES, "Adversarial loss.", choices=_GAN_MODES)
    lambda_L1: float = option(100.0, LOSSES, "Weight of the L1 loss.", least=0)
    pool_size: int = option(0, LOSSES, "Earlier images the discriminator is also shown.", least=0)


@dataclass(frozen=True, kw_only=True)
class CycleGANConfig(_PairedNets):
    """CycleGAN (Zhu et al. 2017): two generators and two discriminators on unpaired pictures."""

    kind = "cyclegan"

    lambda_A: float = option(10.0, LOSSES, "Weight of the cycle A, B, A.", least=0)
    lambda_B: float = option(10.0, LOSSES, "Weight of the cycle B, A, B.", least=0)
    lambda_identity: float = option(
        0.5, LOSSES, "Weight of the identity loss, relative to the cycles'; 0 leaves it out.", least=0
    )


@dataclass(frozen=True, kw_only=True)
class Pix2PixHDConfig(Config):
    """pix2pixHD (Wang et al. 2018): label maps to photographs, coarse to fine, several discriminators."""

    kind = "pix2pixhd"

    preprocess: str = option(
        "scale_width",
        DATA,
        "Resize to --load-size wide, and cut squares if it says so.",
        "--preprocess",
        "--resize-or-crop",
        choices=("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none"),
    )
    load_size: int = option(1024, DATA, "Size (or width, with scale_width) to resize to.", least=1)
    crop_size: int = option(512, DATA, "Side of the squares to cut.", "--crop-size", "--fine-size", least=1)
    scene_width: int = option(1024, DATA, "Their width; they are half as high.", least=64)
    label_nc: int = option(
        35, DATA, "Classes of the label maps; 0 trains from pictures in {phase}_A to {phase}_B.", least=0
    )
    no_instance: bool = option(False, DATA, "No instance maps, so no edges between instances in the input.")

    netG: str = option(
        "global", NETWORKS, "The coarse network, or with its enhancer.", choices=("global", "local")
    )
    ngf: int = option(64, NETWORKS, "Channels of the generator's first layer (32 with local).", least=1)
    n_downsample_global: int = option(4, NETWORKS, "Downsamplings of the coarse network.", least=0)
    n_blocks_global: int = option(9, NETWORKS, "Its residual blocks.", least=0)
    n_blocks_local: int = option(3, NETWORKS, "Residual blocks of the enhancer.", least=0)
    n_local_enhancers: int = option(1, NETWORKS, "Enhancers.", least=1)
    norm: str = option("instance", NETWORKS, "Normalisation.", choices=("instance", "batch", "none"))
    num_D: int = option(2, NETWORKS, "Discriminators, each at half the size of the one before.", least=1)
    n_layers_D: int = option(3, NETWORKS, "Layers of each.", least=1)
    ndf: int = option(64, NETWORKS, "Channels of their first layer.", least=1)
    instance_feat: bool = option(
        False, NETWORKS, "Train an encoder of instances; its features join the input."
    )
    label_feat: bool = option(False, NETWORKS, "The same with one feature per class.")
    feat_num: int = option(3, NETWORKS, "Channels of the features.", least=1)
    n_downsample_E: int = option(4, NETWORKS, "Downsamplings of the encoder.", least=0)
    nef: int = option(16, NETWORKS, "Channels of its first layer.", least=1)
    niter_fix_global: int = option(
        0,
        SCHEDULE,
        "Epochs in which only the enhancer of --netG local learns; all of it after that.",
        least=0,
    )

    no_lsgan: bool = option(False, LOSSES, "Cross entropy instead of least squares.")
    no_ganFeat_loss: bool = option(False, LOSSES, "No feature matching.", "--no-ganFeat-loss")
    lambda_feat: float = option(10.0, LOSSES, "Weight of feature matching and of the VGG loss.", least=0)
    lambda_L1: float = option(
        0.0, LOSSES, "Weight of an L1 loss to the photograph, which the published recipe has not.", least=0
    )
    vgg_weights: str = option(
        "",
        LOSSES,
        "VGG19's weights in torchvision's layout. Without them there is no VGG loss: none are downloaded.",
        metavar="FILE",
    )
    no_vgg_loss: bool = option(False, LOSSES, "No VGG loss, said so.")
    pool_size: int = option(0, LOSSES, "Earlier images the discriminator is also shown.", least=0)
    save_latest_freq: int = option(1000, OUTPUT, "Save the latest state every so many pictures.", least=1)
    save_epoch_freq: int = option(10, OUTPUT, "Keep the networks of every so many epochs.", least=1)

    def learning_rate(self, epoch: int) -> float:
        """In epoch 1, 2, …: as published, the first decay follows the first epoch after niter."""
        return self.lr * (1 - max(0, epoch - self.n_epochs - 1) / max(1, self.n_epochs_decay))

    def check(self) -> None:
        super().check()
        if self.label_nc == 0 and (self.instance_feat or self.label_feat):
            raise UsageError("--instance-feat and --label-feat need label maps, but --label-nc is 0")
        if self.instance_feat and self.no_instance:
            raise UsageError(
                "--instance-feat needs instance maps; leave out --no-instance or use --label-feat"
            )
        if self.niter_fix_global and self.netG != "local":
            raise UsageError("--niter-fix-global belongs to --netG local: a global network has nothing else")
        if self.vgg_weights and self.no_vgg_loss:
            raise UsageError("--vgg-weights and --no-vgg-loss contradict each other")


def reaches(pictures: int, step: int, size: int) -> bool:
    """Whether a step of ``size`` pictures brings a run past a multiple of so many."""
    return step * size // pictures > (step - 1) * size // pictures


CONFIGS: dict[str, type[Config]] = {
    config.kind: config for config in (Pix2PixConfig, Pix2PixHDConfig, CycleGANConfig)
}


def flag_of(entry: dataclasses.Field[Any]) -> str:
    """The option of a field on the command line."""
    flags = entry.metadata["option"].flags
    return flags[0].split("/")[0] if flags else "--" + entry.name.replace("_", "-")


def save_config(config: Config, path: Path) -> None:
    """Write the configuration as JSON, whole or not at all."""
    from p2pfast.data.images import write_text

    content = {"kind": config.kind, **dataclasses.asdict(config)}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_config(path: Path) -> Config:
    """The configuration that `save_config` wrote. Raises UsageError if it cannot be read or is of no run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = CONFIGS[content.pop("kind")]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UsageError(f"{path}: not a configuration of a training run") from None
    known = [entry.name for entry in dataclasses.fields(kind)]
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"{path}: {kind.kind} has no option {name}{hint}")
    return kind(**content)
