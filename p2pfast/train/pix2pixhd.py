"""pix2pixHD (Wang et al. 2018, "High-Resolution Image Synthesis and Semantic Manipulation with Conditional
GANs").

As published, the losses of a step come from one pass through all networks, before any of them changes:
least squares over the discriminators' scales (halved for D), feature matching, an L1 loss if it is asked for,
and the VGG loss where its weights are given. An encoder, if there is one, learns with the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfast.data.classes import colorize
from p2pfast.data.datasets import Sample
from p2pfast.errors import UsageError, first_line
from p2pfast.labelmap import LabelMap
from p2pfast.models import CheckpointError, build, read_state_dict
from p2pfast.nn import PerceptualLoss
from p2pfast.train.config import Pix2PixHDConfig
from p2pfast.train.losses import Losses
from p2pfast.train.networks import draw_weights_hd, exchanging, frozen
from p2pfast.train.objective import Objective, Terms, picture
from p2pfast.train.parallel import Place
from p2pfast.train.pool import ImagePool


class Pix2PixHD(Objective):
    """Networks ``G``, ``D`` and, with features, ``E``; samples ``labels``, ``instances`` and ``image``, or
    ``A`` and ``B`` without labels."""

    averaged = ("G", "E")
    config: Pix2PixHDConfig

    def __init__(self, config: Pix2PixHDConfig, place: Place) -> None:
        super().__init__(config, place)
        c = config
        self.has_features = c.instance_feat or c.label_feat
        seen = (c.label_nc + (not c.no_instance)) if c.label_nc else 3
        options: dict[str, Any] = {"input_nc": seen + c.feat_num * self.has_features, "ngf": c.ngf}
        if c.netG == "local":
            options["n_downsample_global"] = c.n_downsample_global
            options["n_blocks_global"] = c.n_blocks_global
            options["n_local_enhancers"] = c.n_local_enhancers
            options["n_blocks_local"] = c.n_blocks_local
        else:
            options["n_downsampling"] = c.n_downsample_global
            options["n_blocks"] = c.n_blocks_global
        net_g = build(f"pix2pixhd-{c.netG}", norm=c.norm, **options)
        net_d = build(
            "pix2pixhd-multiscale-d",
            input_nc=seen + 3,
            ndf=c.ndf,
            n_layers=c.n_layers_D,
            num_D=c.num_D,
            norm=c.norm,
            getIntermFeat=not c.no_ganFeat_loss,
        )
        nets = {"G": net_g, "D": net_d}
        if self.has_features:
            nets["E"] = build(
                "pix2pixhd-encoder",
                output_nc=c.feat_num,
                ngf=c.nef,
                n_downsampling=c.n_downsample_E,
                norm=c.norm,
            )
        self.multiple = max(int(getattr(net, "size_multiple", 1)) for net in nets.values())
        self.least = max(2 * self.multiple, 16)  # the trunk reflects a pixel; VGG halves four times
        for name, network in nets.items():
            draw_weights_hd(network)
            self.add(name, network)
        self.generator, self.discriminator = self.networks["G"], self.networks["D"]
        self.drawing = [run for name, run in self.networks.items() if name != "D"]
        self.adam("G", self.drawing)
        self.adam("D", [self.discriminator])
        self.pools["fake"] = ImagePool(c.pool_size, c.seed + place.rank)
        losses = Losses(c.fused)
        self.adversarial = losses.gan("vanilla" if c.no_lsgan else "lsgan")
        self.match = None if c.no_ganFeat_loss else losses.features(c.lambda_feat, c.n_layers_D)
        self.l1 = losses.l1(c.lambda_L1) if c.lambda_L1 else None
        self.perceptual = self._perceptual()
        self.shown: dict[str, Tensor] = {}

    def _perceptual(self) -> PerceptualLoss | None:
        c = self.config
        if not c.vgg_weights:
            return None
        try:
            return PerceptualLoss(read_state_dict(c.vgg_weights), c.lambda_feat).to(self.place.device)
        except (CheckpointError, ValueError) as error:
            raise UsageError(f"--vgg-weights {c.vgg_weights}: {first_line(error)}") from error

    def notes(self) -> list[str]:
        if self.config.vgg_weights or self.config.no_vgg_loss:
            return []
        return [
            "no VGG loss: the published recipe has one, but its weights are yours to give: --vgg-weights "
            "vgg19.pth (torchvision's layout); --no-vgg-loss leaves this message out"
        ]

    def start_epoch(self, epoch: int) -> None:
        """Also, with ``niter_fix_global``, lets only the outermost enhancer learn at first."""
        super().start_epoch(epoch)
        if self.config.netG != "local":
            return
        everything = epoch > self.config.niter_fix_global
        changed = False
        for name, parameter in self.generator.network.named_parameters():
            learns = everything or name.startswith(f"model{self.config.n_local_enhancers}_")
            changed |= parameter.requires_grad != learns
            parameter.requires_grad_(learns)
        if changed:
            self.generator.share()

    def _inputs(self, batch: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """What G sees besides features and D beside the image; the photograph; regions of equal features."""
        if not self.config.label_nc:
            real = self.image(batch, "B")
            return self.image(batch, "A"), real, real[:, :1]
        instances = batch.get("instances")
        # Checked on the CPU, where that does not wait for anything.
        maps = LabelMap(batch["labels"], instances, num_classes=self.config.label_nc).to(self.place.device)
        regions = maps.labels if self.config.label_feat or maps.instances is None else maps.instances
        return maps.dense(), self.image(batch, "image"), regions

    def step(self, batches: Sequence[Sample]) -> Terms:
        terms = Terms(len(batches))
        for i, batch in enumerate(batches):
            with exchanging(i == len(batches) - 1, *self.networks.values()):
                self._pass(batch, terms)
        self.update("G")
        self.update("D")
        self.finish_step()
        return terms

    def _pass(self, batch: Sample, terms: Terms) -> None:
        given, real, regions = self._inputs(batch)
        with self.precision():
            seen = given
            if self.has_features:
                seen = torch.cat([given, self.networks["E"](real, regions)], 1)
            fake = self.generator(seen)
            shown = self.pools["fake"].query(torch.cat([given, fake.detach().float()], 1))
            of_shown = self.discriminator(shown)
            of_real = self.discriminator(torch.cat([given, real], 1))
            with frozen(self.discriminator):
                of_fake = self.discriminator(torch.cat([given, fake], 1))
        parts = {"G_GAN": self.adversarial(of_fake, True, for_discriminator=False)}
        if self.match is not None:
            parts["G_GAN_Feat"] = self.match(of_fake, [[f.detach() for f in scale] for scale in of_real])
        if self.l1 is not None:
            parts["G_L1"] = self.l1(fake, real)
        if self.perceptual is not None:
            with self.precision():
                parts["G_VGG"] = self.perceptual(fake, real)
        self.backward(torch.stack(list(parts.values())).sum(), terms)
        loss_fake, loss_real = self.adversarial(of_shown, False), self.adversarial(of_real, True)
        self.backward((loss_fake + loss_real) * 0.5, terms)
        terms.note(**parts, D_real=loss_real, D_fake=loss_fake)
        self.shown = {"fake_B": fake.detach(), "real": real}
        self.shown["input"] = batch["labels"] if self.config.label_nc else given

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        shown = dict(self.shown)
        given = shown.pop("input", None)
        pictures = {name: picture(image) for name, image in shown.items()}
        if given is None:
            return pictures
        if self.config.label_nc:
            colours = colorize(given[0, 0].cpu().numpy(), self.config.label_nc)
            return {"input": colours, **pictures}
        return {"input": picture(given), **pictures}
