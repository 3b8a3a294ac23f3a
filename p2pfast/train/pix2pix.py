"""pix2pix (Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks").

A step updates D on real and generated pairs, halved, and then G against the updated D and with the L1
distance to the target. Dropout in G is the noise, and stays on when the network is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfast.data.datasets import Sample
from p2pfast.nn import gradient_penalty
from p2pfast.train.config import Pix2PixConfig
from p2pfast.train.losses import Losses
from p2pfast.train.networks import (
    discriminator,
    draw_weights,
    exchanging,
    frozen,
    generator,
    least_side_of,
    unchanged_buffers,
)
from p2pfast.train.objective import Objective, Terms, picture
from p2pfast.train.parallel import Place
from p2pfast.train.pool import ImagePool


class Pix2Pix(Objective):
    """Networks ``G`` and ``D``; samples ``A`` (input) and ``B`` (target)."""

    averaged = ("G",)
    config: Pix2PixConfig

    def __init__(self, config: Pix2PixConfig, place: Place) -> None:
        super().__init__(config, place)
        c = config
        inputs, outputs = (c.input_nc, c.output_nc)
        net_g = generator(c.netG, inputs, outputs, c.ngf, c.norm, not c.no_dropout)
        net_d = discriminator(c.netD, inputs + outputs, c.ndf, c.n_layers_D, c.norm)
        for network in (net_g, net_d):
            draw_weights(network, c.init_type, c.init_gain)
        self.multiple = int(getattr(net_g, "size_multiple", 1))
        self.least = least_side_of(c.netD, c.n_layers_D)
        self.generator, self.discriminator = self.add("G", net_g), self.add("D", net_d)
        self.adam("G", [self.generator])
        self.adam("D", [self.discriminator])
        self.pools["fake_AB"] = ImagePool(c.pool_size, c.seed + place.rank)
        losses = Losses(c.fused)
        self.adversarial, self.l1 = losses.gan(c.gan_mode), losses.l1(c.lambda_L1)
        self.shown: dict[str, Tensor] = {}

    def step(self, batches: Sequence[Sample]) -> Terms:
        terms = Terms(len(batches))
        pairs = [(self.image(batch, "A"), self.image(batch, "B")) for batch in batches]
        # With several batches G runs twice, the second time with gradients: holding all of their activations
        # until D is updated would cost the memory that small batches are to save. Dropout repeats itself.
        again = len(pairs) > 1
        states: list[list[Tensor]] = []
        fakes: list[Tensor] = []
        for i, (real_a, real_b) in enumerate(pairs):
            states += [self.random_state()] if again else []
            with exchanging(i == len(pairs) - 1, self.generator, self.discriminator):
                counted_later = unchanged_buffers(self.generator) if again else nullcontext()
                with torch.set_grad_enabled(not again), self.precision(), counted_later:
                    fakes.append(self.generator(real_a))
                self._judge(real_a, real_b, fakes[i], terms)
        self.update("D")
        for i, (real_a, real_b) in enumerate(pairs):
            with exchanging(i == len(pairs) - 1, self.generator), frozen(self.discriminator):
                if again:
                    self.set_random_state(states[i])
                    with self.precision():
                        fakes[i] = self.generator(real_a)
                self._please(real_a, real_b, fakes[i], terms)
        self.update("G")
        self.finish_step()
        self.shown = {"real_A": pairs[-1][0], "fake_B": fakes[-1].detach(), "real_B": pairs[-1][1]}
        return terms

    def _judge(self, real_a: Tensor, real_b: Tensor, fake_b: Tensor, terms: Terms) -> None:
        fake_pair = self.pools["fake_AB"].query(torch.cat([real_a, fake_b.detach().float()], 1))
        with self.precision():
            of_fake = self.discriminator(fake_pair)
            of_real = self.discriminator(torch.cat([real_a, real_b], 1))
        loss_fake = self.adversarial(of_fake, False)
        loss_real = self.adversarial(of_real, True)
        loss = (loss_fake + loss_real) * 0.5
        if self.config.gan_mode == "wgangp":
            loss = loss + self._penalty(torch.cat([real_a, real_b], 1), fake_pair, terms)
        self.backward(loss, terms)
        terms.note(D_fake=loss_fake, D_real=loss_real)

    def _penalty(self, real_pair: Tensor, fake_pair: Tensor, terms: Terms) -> Tensor:
        # The gradient of a gradient: the plain network has that.
        penalty = gradient_penalty(
            self.discriminator.network, real_pair, fake_pair, weight=self.config.lambda_gp
        )
        terms.note(D_GP=penalty)
        return penalty

    def _please(self, real_a: Tensor, real_b: Tensor, fake_b: Tensor, terms: Terms) -> None:
        with self.precision():
            verdict = self.discriminator(torch.cat([real_a, fake_b], 1))
        loss_gan = self.adversarial(verdict, True, for_discriminator=False)
        loss_l1 = self.l1(fake_b, real_b)
        self.backward(loss_gan + loss_l1, terms)
        terms.note(G_GAN=loss_gan, G_L1=loss_l1)

    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        return {name: picture(image) for name, image in self.shown.items()}
