"""AutoAugment (Cubuk et al. 2019), which ResizeMix is compared with, for whole batches."""
import functools

import torch
from torch import Tensor
from torchvision.transforms import v2

from common.randaugment import Operation, apply_operations, both_signs


class AutoAugment(v2.AutoAugment):
    """torchvision's CIFAR-10 policies, one drawn for each image of a batch.

    Call it with images (B, 3, H, W) uint8 and a CPU generator; it returns new uint8 images.
    """

    def __init__(self):
        super().__init__(v2.AutoAugmentPolicy.CIFAR10)
        self.table = functools.cache(self.table)

    def table(self, height: int, width: int) -> tuple[Operation, ...]:
        """4·policy + 2·place (+ 1: the other sign) → the operation; last: none."""
        operations = [both_signs(name, self._AUGMENTATION_SPACE[name], level, 10, height, width)
                      for policy in self._policies for name, _, level in policy]
        return (*sum(operations, ()), Operation("Identity"))

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        table = self.table(*images.shape[2:])
        policy = torch.randint(len(self._policies), (len(images),), generator=generator)
        applied, negative = torch.rand(2, len(images), 2, generator=generator)
        chosen = 4 * policy[:, None] + torch.tensor([0, 2]) + (negative < 0.5)
        probability = torch.tensor([[share for _, share, _ in pair] for pair in self._policies])
        chosen = chosen.where(applied <= probability[policy], len(table) - 1)
        return apply_operations(images, [table] * 2, chosen.T)
