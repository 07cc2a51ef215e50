"""Networks: build(name, …); families that share their blocks stand in one file."""
from torch import nn

from common.models import resnet, shake, transformer

FAMILIES = {                            # networks by name, and what builds them
    "preactresnet": (resnet.PREACT, resnet.preact), "wideresnet": (resnet.WIDE, resnet.wide),
    "resnet": (resnet.POSTACT, resnet.postact), "pyramidnet": (shake.PYRAMID, shake.pyramid),
    "shakeshake": (shake.SHAKE, shake.shake),
    "transformer": (transformer.SPECS, transformer.transformer)}
NAMES = {family: tuple(specs) for family, (specs, _) in FAMILIES.items()}
ALL = [name for names in NAMES.values() for name in names]


def build(name: str, num_classes: int, image_size: int = 32, *, initial_channels: int = 64,
          dropout: float = 0.0, **options) -> nn.Module:
    """Return the network `name`. Raises ValueError, RunError for sizes that it cannot have.
    image_size: chooses the stem's stride and, from 128 pixels on, ImageNet's ResNet; only deit_s
    takes no other size. initial_channels: 64 is the network as published, 16 a quarter of all its
    widths. dropout: probability before the classifier. Transformers also take drop_path."""
    for specs, family in FAMILIES.values():
        if name in specs:
            return family(name, num_classes, image_size, initial_channels, dropout, **options)
    raise ValueError(f"unknown network {name!r}; known: {', '.join(ALL)}")
