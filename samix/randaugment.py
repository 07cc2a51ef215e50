"""RandAugment of a loaded batch, as the recipes of DeiT and Swin have it."""
import torch
from torch import Tensor
from torchvision.transforms import v2


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment with operations of its own for each image of a batch, seeded.

    (images (B, 3, H, W) uint8, generator) -> new uint8 images. The magnitude, normal around `level`
    of 10 with deviation `std`, is drawn for the batch and each of the two operations; images that
    drew the same operation and sign are changed together.
    """

    def __init__(self, level: float = 7.0, std: float = 0.5):
        super().__init__(num_ops=2)
        self.level, self.std = level, std

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, images, names = len(images), images.clone(), list(self._AUGMENTATION_SPACE)
        drawn = torch.randint(len(names), (self.num_ops, n), generator=generator)
        negative = torch.rand(self.num_ops, n, generator=generator) < 0.5
        levels = self.level + self.std * torch.randn(self.num_ops, generator=generator)
        for which, minus, level in zip(drawn, negative, levels.clamp(0, 10).tolist(), strict=True):
            index = round(level / 10 * (self.num_magnitude_bins - 1))
            for number, name in enumerate(names):
                settings, signed = self._AUGMENTATION_SPACE[name]
                settings = settings(self.num_magnitude_bins, *images.shape[-2:])
                setting = 0.0 if settings is None else float(settings[index])
                for sign, rows in ((1, (which == number) & ~(minus & signed)),
                                   (-1, (which == number) & minus & signed)):
                    rows = rows.nonzero().flatten().to(images.device, non_blocking=True)
                    if len(rows):
                        images[rows] = self._apply_image_or_video_transform(
                            images[rows], name, sign * setting, self.interpolation, self._fill)
        return images
