"""Grad-CAM (Selvaraju et al. 2017): which pixels a network's decision rests on."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed, plots
from common.errors import RunError


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """Return block M of stage N for 'layerN.M' (N from 1, M from 0), or the module `name`."""
    modules = dict(net.named_modules())
    for part in [*modules.values()]:
        for number, stage in enumerate(getattr(part, "stages", ()), 1):
            modules |= {f"layer{number}.{path}".rstrip("."): module
                        for path, module in stage.named_modules()}
    for path, module in modules.items():
        if f".{path}".endswith(f".{name}"):
            return module
    raise RunError(f"--target_layer {name}: {type(net).__name__} has no such block or module; its "
                   f"last ones: {', '.join([*modules][-8:])}")


def is_map(output, images: Tensor) -> bool:
    """Return whether this is a feature map (B, C, h, w): of square images (B, h, h, C) is none."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        return False
    _, first, second, third = output.shape
    return not (images.shape[2] == images.shape[3] and first == second != third)


@torch.no_grad()
def last_layer(net: nn.Module, images: Tensor) -> nn.Module:
    """Return the last module that gives a feature map (B, C, h, w) of more than one position."""
    seen = []

    def note(module, inputs, output):
        if is_map(output, images) and output.shape[3] > 1:
            seen.append(module)

    with nn.modules.module.register_module_forward_hook(note):
        net(images[:1])
    if len(seen) < 2:               # a ViT has its patches' embedding alone
        raise RunError(f"--cam: no feature maps in {type(net).__name__}")
    return seen[-1]


def grad_cam(net: nn.Module, layer: nn.Module, images: Tensor, num_classes: int | None = None
             ) -> tuple[Tensor, Tensor]:
    """Return maps (B, H, W) in [0, 1] of where `layer` sees the predicted class, and the logits, of
    all outputs or the first `num_classes`. RunError: NaN, or no feature map (B, C, h, w)."""
    outputs = []
    with layer.register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        logits = net(images.detach().requires_grad_())[:, :num_classes]
    features = outputs[-1] if outputs else None
    if not is_map(features, images):
        raise RunError(f"--target_layer: a {type(layer).__name__} gives no feature map here")
    if not logits.isfinite().all():
        raise RunError("the network's outputs are not finite; another checkpoint may be sound")
    grad, = torch.autograd.grad(logits.max(1).values.sum(), features)
    maps = (features * grad.mean((2, 3), keepdim=True)).mean(1).relu().detach()
    maps = (maps / maps.amax((1, 2), keepdim=True)).nan_to_num()
    return F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0], logits.detach()


def draw(path, net, test, args, info):
    """--cam: test images, their Grad-CAM, and both in one; predicted classes below."""
    if distributed.rank():
        return
    images, layer = next(iter(test))[0][:8], args.target_layer
    net.eval()
    part = find_layer(net, layer) if layer else last_layer(net, images)
    maps, logits = grad_cam(net, part, images, info.num_classes)
    rows = {"image": images, "Grad-CAM": maps, "seen": images * maps[:, None]}
    plots.preview(path, f"{args.arch} on {info.name}, {layer or 'last feature map'}", rows,
                  logits.softmax(1), info)
    distributed.log(f"Grad-CAM: {path}")
