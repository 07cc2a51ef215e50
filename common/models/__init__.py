"""Networks: build(name, …); one file a family."""
import torch
import torchvision
from torch import nn

from common.models import (
    preactresnet,
    pyramidnet,
    resnet,
    resnext29,
    shakeshake,
    transformer,
    wideresnet,
)

FAMILIES = {"preactresnet": preactresnet, "wideresnet": wideresnet, "resnext29": resnext29,
            "resnet": resnet, "pyramidnet": pyramidnet, "shakeshake": shakeshake,
            "transformer": transformer}
NAMES = {family: tuple(module.SPECS) for family, module in FAMILIES.items()}


def build(name: str, num_classes: int, image_size: int = 32, **options) -> nn.Module:
    """The network `name` for square RGB images of about `image_size` pixels a side.

    Any size runs, since all pool globally (but deit_s takes `image_size` alone); `image_size`
    chooses the stem's stride and, for ResNets, ImageNet's form from 128 pixels on. Options of every
    network: `initial_channels` (64 is the network as published; 16 has a quarter of all its
    widths), `dropout` (probability before the last layer); of the transformers: `drop_path`.
    Raises ValueError for a name that is not in NAMES.
    """
    for module in FAMILIES.values():
        if name in module.SPECS:
            return module.build(name, num_classes, image_size, **options)
    known = ", ".join(name for names in NAMES.values() for name in names)
    raise ValueError(f"unknown network {name!r}; known: {known}")


def load_pretrained(network: nn.Module, name: str, file: str = ""):
    """Puts ImageNet weights into the network `name`, into all but its classifier.

    They are torchvision's, downloaded, or a state_dict in `file`. Raises ValueError when there are
    none or they do not fit, OSError when they cannot be read.
    """
    if file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    else:
        name = {"convnext_t": "convnext_tiny"}.get(name, name)
        weights = torchvision.models.get_model_weights(name)
        state = weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    classifier = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    own = network.state_dict(keep_vars=True)
    for key, value in own.items():
        if value is classifier.weight or value is classifier.bias:
            state[key] = value
        elif key not in state or state[key].shape != value.shape:
            raise ValueError(f"the weights do not fit {name}: {key}")
    network.load_state_dict({key: state[key] for key in own})
