"""Grad-CAM (Selvaraju et al. 2017): which pixels a network's decision rests on."""
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed, plots
from common.errors import RunError


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """Block M of stage N of a network for 'layerN.M' (N from 1, M from 0), or its module `name`.

    Raises RunError naming the last block when there is none, or for a transformer.
    """
    modules = dict(net.named_modules())
    if name in modules:
        return modules[name]
    owner = next((part for part in modules.values()
                  if hasattr(part, "stages") or hasattr(part, "layer1")), net)
    stages = getattr(owner, "stages", None) or [
        getattr(owner, f"layer{n}") for n in range(1, 5) if hasattr(owner, f"layer{n}")]
    if not stages:
        raise RunError(f"--target_layer {name} is for networks with stages of blocks, not for "
                       f"{type(net).__name__}; its modules: {', '.join([*modules][-4:])}")
    found = re.fullmatch(r"layer(\d+)\.(\d+)", name)
    stage, block = map(int, found.groups()) if found else (0, 0)
    if not 1 <= stage <= len(stages) or block >= len(stages[stage - 1]):
        raise RunError(f"--target_layer {name}: no such block; the network's last one is "
                       f"layer{len(stages)}.{len(stages[-1]) - 1}")
    return stages[stage - 1][block]


@torch.no_grad()
def last_layer(net: nn.Module, images: Tensor) -> nn.Module:
    """The last module that gives a feature map (B, C, h, w) of more than one position."""
    seen = []

    def note(module, inputs, output):
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[3] > 1:
            seen.append(module)

    handles = [module.register_forward_hook(note) for module in net.modules()]
    net(images[:1])
    for handle in handles:
        handle.remove()
    if len(seen) < 2:               # a ViT has its patches' embedding alone
        raise RunError(f"--cam: no feature maps in {type(net).__name__}")
    return seen[-1]


def grad_cam(net: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Where `layer` finds the class that `net` (in eval mode) sees in images (B, 3, H, W).

    Returns maps (B, H, W) of at least 0, the largest value 1 (or all 0), and logits (B, C).
    """
    kept = []
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = net(images.detach().requires_grad_())
    handle.remove()
    if len(kept) != 1 or not isinstance(kept[0], Tensor) or kept[0].ndim != 4:
        raise RunError(f"--target_layer: a {type(layer).__name__} gives no feature map")
    features, = kept
    grad, = torch.autograd.grad(logits.max(1).values.sum(), features)
    maps = (features * grad.mean((2, 3), keepdim=True)).mean(1).relu().detach()
    maps = (maps / maps.amax((1, 2), keepdim=True)).nan_to_num()
    maps = F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0]
    return maps, logits.detach()


def draw(path, net, test, args, info):
    """--cam: test images, their Grad-CAM, and both in one; predicted classes below."""
    if distributed.rank():
        return
    images = next(iter(test))[0][:8]
    layer = args.target_layer
    net.eval()
    maps, logits = grad_cam(net, find_layer(net, layer) if layer else last_layer(net, images),
                            images)
    rows = {"image": images, "Grad-CAM": maps, "seen": images * maps[:, None]}
    plots.preview(path, f"{args.arch} on {info.name}, {layer or 'last feature map'}", rows,
                  logits[:, :info.num_classes].softmax(1), info)
    distributed.log(f"Grad-CAM: {path}")
