"""AutoAugment (Cubuk et al. 2019), which ResizeMix is compared with, for whole batches."""
import functools

import torch
from torch import Tensor
from torchvision.transforms import v2

from common.randaugment import Operation, apply_operations, both_signs


class AutoAugment(v2.AutoAugment):
    """torchvision's policies, one drawn for each image: (images, generator) -> images.

    Images (B, 3, H, W) uint8; a CPU generator.
    """

    def __init__(self, policy: v2.AutoAugmentPolicy = v2.AutoAugmentPolicy.CIFAR10):
        super().__init__(policy)
        self.table = functools.cache(self.table)

    def table(self, height: int, width: int) -> tuple[Operation, ...]:
        """Return all operations: of policy p and step q at 4p + 2q, with negative sign one further;
        the last one does nothing."""
        pairs = [both_signs(name, self._AUGMENTATION_SPACE[name], level, 10, height, width)
                 for policy in self._policies for name, _, level in policy]
        return (*sum(pairs, ()), Operation("Identity"))

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        table = self.table(*images.shape[2:])
        policy = torch.randint(len(self._policies), (len(images),), generator=generator)
        applied, negative = torch.rand(2, len(images), 2, generator=generator)
        probability = torch.tensor([[share for _, share, _ in pair] for pair in self._policies])
        chosen = 4 * policy[:, None] + torch.tensor([0, 2]) + (negative < 0.5)
        chosen = chosen.where(applied <= probability[policy], len(table) - 1)
        return apply_operations(images, [table] * 2, chosen.T)
