"""Networks: build(name, …); families that share their blocks stand in one file."""
from torch import nn

from common.models import resnet, shake, transformer

FAMILIES = {                            # what builds a family, and its networks
    resnet.preact: resnet.PREACT, resnet.wide: resnet.WIDE, resnet.postact: resnet.POSTACT,
    shake.pyramid: shake.PYRAMID, shake.shake: shake.SHAKE,
    transformer.transformer: transformer.SPECS}
ALL = [name for specs in FAMILIES.values() for name in specs]


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0, **options) -> nn.Module:
    """Return the network `name`. Raises ValueError, RunError for sizes that it cannot have.
    image_size: chooses the stem's stride and, from 128 pixels on, ImageNet's ResNet; only deit_s
    takes no other size. initial_channels: 64 is the network as published, 16 a quarter of all its
    widths. dropout: probability before the classifier. Transformers also take drop_path."""
    for family, specs in FAMILIES.items():
        if name in specs:
            return family(name, num_classes, image_size, initial_channels, dropout, **options)
    raise ValueError(f"unknown network {name!r}; known: {', '.join(ALL)}")
