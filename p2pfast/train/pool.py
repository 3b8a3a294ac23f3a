"""The pool of earlier images that a discriminator is shown among new ones (Shrivastava et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor


class ImagePool:
    """Keeps up to ``size`` images. Once full, every second image is swapped for an older one, at random.

    ``size`` 0 hands images through. The random choices are the pool's own, so that its state is complete.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.images: list[Tensor] = []
        self.random = torch.Generator().manual_seed(seed)

    def query(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) for the discriminator in place of new ones of that shape; no gradients."""
        images = images.detach()
        if self.size == 0:
            return images
        chosen = []
        for image in images:
            if len(self.images) < self.size:
                self.images.append(image.clone())
                chosen.append(image)
            elif torch.rand((), generator=self.random) > 0.5:
                place = int(torch.randint(self.size, (), generator=self.random))
                older = self.images[place]
                # Of another size it cannot share a batch.
                chosen.append(older if len(images) == 1 or older.shape == image.shape else image)
                self.images[place] = image.clone()
            else:
                chosen.append(image)
        return torch.stack(chosen)

    def state(self) -> dict[str, object]:
        return {"images": [image.cpu() for image in self.images], "random": self.random.get_state()}

    def load(self, state: dict[str, object], device: torch.device) -> None:
        images, random = state["images"], state["random"]
        assert isinstance(images, list) and isinstance(random, Tensor)
        self.images = [image.to(device) for image in images]
        self.random.set_state(random)
