"""Cutout and AutoAugment, which ResizeMix is compared with, for whole batches."""
import torch
from torch import Tensor
from torchvision.transforms import v2


def draw_holes(n: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Centres (n, 2) of `cutout`'s squares, y and x, uniform over the pixels of images (H, W)."""
    return torch.stack([torch.randint(length, (n,), generator=generator)
                        for length in image_size], dim=1)


def cutout(images: Tensor, holes: Tensor, side: int) -> Tensor:
    """Cutout (DeVries & Taylor 2017): a square of every image becomes 0, the mean colour.

    `images` (B, C, H, W), normalised; `holes` (B, 2) centres y, x in pixels. Squares of `side`
    pixels (even: an odd one loses a pixel), cut off where they leave the image.
    """
    holes, inside = holes.to(images.device, non_blocking=True), []
    for axis, length in enumerate(images.shape[-2:]):
        away = torch.arange(length, device=images.device) - holes[:, axis, None]
        inside.append((-(side // 2) <= away) & (away < side // 2))
    return images.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0)


class AutoAugment(v2.AutoAugment):
    """torchvision's AutoAugment with a policy of its own for each image of a batch, seeded.

    (images (B, 3, H, W) uint8, generator) -> new uint8 images. Images that drew the same
    operation are changed together.
    """

    def __init__(self):
        super().__init__(v2.AutoAugmentPolicy.CIFAR10)

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, images = len(images), images.clone()
        policy = torch.randint(len(self._policies), (n,), generator=generator)
        applied, negative = torch.rand(2, n, 2, generator=generator)
        for number, operations in enumerate(self._policies):
            for place, (name, probability, index) in enumerate(operations):
                drawn = (policy == number) & (applied[:, place] <= probability)
                settings, signed = self._AUGMENTATION_SPACE[name]
                settings = settings(10, *images.shape[-2:])
                setting = 0.0 if settings is None else float(settings[index])
                minus = (negative[:, place] < 0.5) & signed
                for sign, rows in ((1, drawn & ~minus), (-1, drawn & minus)):
                    rows = rows.nonzero().flatten().to(images.device, non_blocking=True)
                    if len(rows):
                        images[rows] = self._apply_image_or_video_transform(
                            images[rows], name, sign * setting, self.interpolation, self._fill)
        return images
