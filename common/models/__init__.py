"""Networks: build(name, …); one file a family."""
from torch import nn

from common.models import preactresnet, pyramidnet, resnet, shakeshake, transformer, wideresnet

FAMILIES = {"preactresnet": preactresnet, "wideresnet": wideresnet, "resnet": resnet,
            "pyramidnet": pyramidnet, "shakeshake": shakeshake, "transformer": transformer}
NAMES = {family: tuple(module.SPECS) for family, module in FAMILIES.items()}
ALL = [name for names in NAMES.values() for name in names]


def build(name: str, num_classes: int, image_size: int = 32, **options) -> nn.Module:
    """The network `name` for square RGB images of about `image_size` pixels a side.

    Any size runs, since all pool globally (but deit_s takes `image_size` alone); `image_size`
    chooses the stem's stride and, for ResNets, ImageNet's form from 128 pixels on. Options of every
    network: `initial_channels` (64 is the network as published; 16 has a quarter of all its
    widths), `dropout` (probability before the last layer); of the transformers: `drop_path`.
    Raises ValueError for a name that is not in NAMES, RunError for sizes that it cannot have.
    """
    for module in FAMILIES.values():
        if name in module.SPECS:
            return module.build(name, num_classes, image_size, **options)
    raise ValueError(f"unknown network {name!r}; known: {', '.join(ALL)}")
