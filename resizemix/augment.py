"""AutoAugment, which ResizeMix is compared with, for whole batches."""
import torch
from torch import Tensor
from torchvision.transforms import v2


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
