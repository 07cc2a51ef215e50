"""Grad-CAM (Selvaraju et al. 2017): which pixels a network's decision rests on."""
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import RunError


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """Block M of stage N of a network, `layerN.M`: N from 1, M from 0, as torchvision names them.

    Raises RunError naming the last block when there is none, or for a transformer.
    """
    stages = getattr(net, "stages", None) or [
        getattr(net, f"layer{n}") for n in range(1, 5) if hasattr(net, f"layer{n}")]
    if not stages:
        raise RunError(f"--cam is for networks with stages of blocks, not for {type(net).__name__}")
    found = re.fullmatch(r"layer(\d+)\.(\d+)", name)
    stage, block = map(int, found.groups()) if found else (0, 0)
    if not 1 <= stage <= len(stages) or block >= len(stages[stage - 1]):
        raise RunError(f"--target_layer {name}: no such block; the network's last one is "
                       f"layer{len(stages)}.{len(stages[-1]) - 1}")
    return stages[stage - 1][block]


def grad_cam(net: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where `layer` finds the class that `net` (in eval mode) sees in images (B, 3, H, W).

    Returns maps (B, H, W) of at least 0, the largest value 1 (or all 0), and the classes'
    probabilities (B, num_classes).
    """
    kept = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = net(images)
    handle.remove()
    features, = kept
    grad, = torch.autograd.grad(logits.max(1).values.sum(), features)
    maps = (features * grad.mean((2, 3), keepdim=True)).mean(1).relu().detach()
    maps = (maps / maps.amax((1, 2), keepdim=True)).nan_to_num()
    maps = F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0]
    return maps, logits.detach().softmax(1)
