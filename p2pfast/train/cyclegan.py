"""CycleGAN (Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks").

A step updates both generators together against discriminators that stand still, then both discriminators on
real images and on images of a pool of earlier ones. ``G_A`` draws B from A and ``D_A`` judges B; ``G_B`` and
``D_B`` the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfast.data.datasets import Sample
from p2pfast.errors import UsageError
from p2pfast.nn import gradient_penalty
from p2pfast.train.config import CycleGANConfig
from p2pfast.train.losses import Losses
from p2pfast.train.networks import (
    Running,
    discriminator,
    draw_weights,
    exchanging,
    frozen,
    generator,
    least_side_of,
)
from p2pfast.train.objective import Objective, Terms, picture
from p2pfast.train.parallel import Place
from p2pfast.train.pool import ImagePool


class CycleGAN(Objective):
    """Networks ``G_A``, ``G_B``, ``D_A``, ``D_B``; samples ``A`` and ``B``."""

    averaged = ("G_A", "G_B")
    config: CycleGANConfig

    def __init__(self, config: CycleGANConfig, place: Place) -> None:
        super().__init__(config, place)
        c = config
        if c.lambda_identity > 0 and c.input_nc != c.output_nc:
            raise UsageError(
                f"--lambda-identity {c.lambda_identity:g} shows B to the network that draws B from A: with "
                f"--input-nc {c.input_nc} and --output-nc {c.output_nc} give --lambda-identity 0"
            )
        shared = (c.ngf, c.norm, not c.no_dropout)
        nets = {
            "G_A": generator(c.netG, c.input_nc, c.output_nc, *shared),
            "G_B": generator(c.netG, c.output_nc, c.input_nc, *shared),
            "D_A": discriminator(c.netD, c.output_nc, c.ndf, c.n_layers_D, c.norm),
            "D_B": discriminator(c.netD, c.input_nc, c.ndf, c.n_layers_D, c.norm),
        }
        self.multiple = int(getattr(nets["G_A"], "size_multiple", 1))
        self.least = least_side_of(c.netD, c.n_layers_D)
        for name, network in nets.items():
            draw_weights(network, c.init_type, c.init_gain)
            self.add(name, network)
        self.generators = self.networks["G_A"], self.networks["G_B"]
        self.discriminators = self.networks["D_A"], self.networks["D_B"]
        self.adam("G", self.generators)
        self.adam("D", self.discriminators)
        for i, name in enumerate(("fake_A", "fake_B")):
            self.pools[name] = ImagePool(c.pool_size, 2 * (c.seed + place.rank) + i)
        losses = Losses(c.fused)
        self.adversarial = losses.gan(c.gan_mode)
        self.cycle_a, self.cycle_b = losses.l1(c.lambda_A), losses.l1(c.lambda_B)
        self.identity_a = losses.l1(c.lambda_B * c.lambda_identity)
        self.identity_b = losses.l1(c.lambda_A * c.lambda_identity)
        self.shown: dict[str, Tensor] = {}

    def step(self, batches: Sequence[Sample]) -> Terms:
        terms = Terms(len(batches))
        drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for i, batch in enumerate(batches):
            with exchanging(i == len(batches) - 1, *self.generators), frozen(*self.discriminators):
                drawn.append(self._draw(self.image(batch, "A"), self.image(batch, "B"), terms))
        self.update("G")
        d_a, d_b = self.discriminators
        for i, (real_a, real_b, fake_a, fake_b) in enumerate(drawn):
            with exchanging(i == len(drawn) - 1, *self.discriminators):
                loss_a = self._judge(d_a, real_b, self.pools["fake_B"].query(fake_b), terms)
                loss_b = self._judge(d_b, real_a, self.pools["fake_A"].query(fake_a), terms)
                self.backward(loss_a + loss_b, terms)
            terms.note(D_A=loss_a, D_B=loss_b)
        self.update("D")
        self.finish_step()
        return terms

    def _draw(self, real_a: Tensor, real_b: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g_a, g_b = self.generators
        d_a, d_b = self.discriminators
        same: dict[str, Tensor] = {}
        with self.precision():
            fake_b, fake_a = g_a(real_a), g_b(real_b)
            rec_a, rec_b = g_b(fake_b), g_a(fake_a)
            if self.config.lambda_identity > 0:
                same = {"idt_A": g_a(real_b), "idt_B": g_b(real_a)}
            of_b, of_a = d_a(fake_b), d_b(fake_a)
        parts = {
            "G_A": self.adversarial(of_b, True, for_discriminator=False),
            "G_B": self.adversarial(of_a, True, for_discriminator=False),
            "cycle_A": self.cycle_a(rec_a, real_a),
            "cycle_B": self.cycle_b(rec_b, real_b),
        }
        if same:
            parts["idt_A"] = self.identity_a(same["idt_A"], real_b)
            parts["idt_B"] = self.identity_b(same["idt_B"], real_a)
        self.backward(torch.stack(list(parts.values())).sum(), terms)
        terms.note(**parts)
        there = {"real_A": real_a, "fake_B": fake_b, "rec_A": rec_a}
        back = {"real_B": real_b, "fake_A": fake_a, "rec_B": rec_b}
        self.shown = {name: image.detach() for name, image in {**there, **back, **same}.items()}
        return real_a, real_b, fake_a.detach().float(), fake_b.detach().float()

    def _judge(self, judge: Running, real: Tensor, fake: Tensor, terms: Terms) -> Tensor:
        with self.precision():
            of_real, of_fake = judge(real), judge(fake)
        loss = (self.adversarial(of_real, True) + self.adversarial(of_fake, False)) * 0.5
        if self.config.gan_mode == "wgangp":
            # The gradient of a gradient: the plain network has that.
            loss = loss + gradient_penalty(judge.network, real, fake, weight=self.config.lambda_gp)
        return loss

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        return {name: picture(image) for name, image in self.shown.items()}
