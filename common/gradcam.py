"""Grad-CAM (Selvaraju et al. 2017): which pixels a network's decision rests on."""
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed, plots
from common.errors import RunError


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """Return block M of stage N for 'layerN.M' (N from 1, M from 0), or the module `name`.

    Raises RunError naming the last block when there is none, or for a transformer.
    """
    modules = dict(net.named_modules())
    ours = re.sub(r"^layer(\d+)", lambda n: f"stages.{int(n[1]) - 1}", name)
    for path, module in modules.items():
        if path in (name, ours) or path.endswith((f".{name}", f".{ours}")):
            return module
    blocks = [path for path in modules if re.search(r"(stages\.|layer)\d+\.\d+$", path)]
    if not blocks:
        raise RunError(f"--target_layer {name} is for networks with stages of blocks, not for "
                       f"{type(net).__name__}; its modules: {', '.join([*modules][-4:])}")
    stage, block = re.findall(r"\d+", blocks[-1])[-2:]
    raise RunError(f"--target_layer {name}: no such block; the network's last one is "
                   f"layer{int(stage) + ('stages' in blocks[-1])}.{block}")


@torch.no_grad()
def last_layer(net: nn.Module, images: Tensor) -> nn.Module:
    """Return the last module that gives a feature map (B, C, h, w) of more than one position."""
    seen = []

    def note(module, inputs, output):
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[3] > 1:
            seen.append(module)

    with nn.modules.module.register_module_forward_hook(note):
        net(images[:1])
    if len(seen) < 2:               # a ViT has its patches' embedding alone
        raise RunError(f"--cam: no feature maps in {type(net).__name__}")
    return seen[-1]


def grad_cam(net: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps (B, H, W) of where `layer` finds the predicted class, in [0, 1], and the logits.

    `net` in evaluation mode; images (B, 3, H, W).
    """
    outputs = []
    with layer.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits = net(images.detach().requires_grad_())
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].ndim != 4:
        raise RunError(f"--target_layer: a {type(layer).__name__} gives no feature map")
    features, = outputs
    grad, = torch.autograd.grad(logits.max(1).values.sum(), features)
    maps = (features * grad.mean((2, 3), keepdim=True)).mean(1).relu().detach()
    maps = (maps / maps.amax((1, 2), keepdim=True)).nan_to_num()
    return F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0], logits.detach()


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
