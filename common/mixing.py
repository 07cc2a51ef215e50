"""Mixup, CutMix, Cutout, soft targets and their losses; the random draws they share. Draws are
arguments: the same draws give the same result on every device, without host synchronisation. They
come from a CPU `torch.Generator`, by default torch's own; a seeded one, copied into a DataLoader's
workers, repeats itself each epoch."""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAGEABLE = 2**16                       # larger copies from pageable memory wait for the device
Draws = torch.Generator | None


def draw_perm(n: int, generator: Draws = None) -> Tensor:
    """Return the partners, a random permutation (n,): image i is mixed with image perm[i]."""
    return torch.randperm(n, generator=generator)


def draw_lambda(alpha: float, generator: Draws = None, n: int | None = None) -> Tensor:
    """Return shares of the first image, Beta(alpha, alpha), 1 for alpha <= 0: a scalar, or (n,)."""
    shape = (2,) if n is None else (2, n)
    if alpha <= 0:
        return torch.ones(shape[1:])
    # Gamma(alpha) = Gamma(alpha + 1)·U^(1/alpha), by logarithms: small ones underflow
    gamma = torch._standard_gamma(torch.full(shape, alpha + 1, dtype=torch.float64), generator)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    first, second = gamma.log() + uniform.log() / alpha
    return (first - second).sigmoid().float()


def draw_centre(height: int, width: int, generator: Draws = None, n: int | None = None) -> Tensor:
    """Return centres (y, x) of CutMix boxes, uniform over the image: (2,), or (n, 2)."""
    shape = (2,) if n is None else (n, 2)
    return torch.rand(shape, generator=generator) * torch.tensor([height, width])


def draw_pixels(n: int, size: tuple[int, int], generator: Draws = None) -> Tensor:
    """Return (n, 2) int64 pixels, y and x, uniform over images of `size` (H, W)."""
    return torch.stack([torch.randint(length, (n,), generator=generator) for length in size], 1)


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on the device, without host synchronisation whatever their size."""
    if device.type == "cpu" or values.nbytes <= PAGEABLE:
        return values.to(device, non_blocking=True)
    parts = values.flatten().split(PAGEABLE // values.element_size())
    return torch.cat([part.to(device, non_blocking=True) for part in parts]).view(values.shape)


def check_floats(images: Tensor):
    """Raise TypeError unless the images are floating point."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, not {images.dtype}")


def per_image(values: float | Tensor, images: Tensor) -> Tensor:
    """Return shares, a number, scalar tensor or (B,) tensor, as float32 (B,) on images' device."""
    values = torch.as_tensor(values)
    if values.device.type == "cpu" and not torch.compiler.is_compiling() \
            and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"shares must lie in [0, 1], not {values.tolist()}")
    if values.ndim:                # a CPU scalar multiplies device tensors without a copy
        values = values.to(images.device, non_blocking=True)
    return torch.ones(len(images), device=images.device) * values.float()


def box_mask(edges, size: tuple[int, int]) -> Tensor:
    """Return bool (B, H, W), true inside boxes; `edges`: first and end (B,) of rows, of columns."""
    inside = []
    for (low, end), length in zip(edges, size, strict=True):
        index = torch.arange(length, device=low.device)
        inside.append((low[:, None] <= index) & (index < end[:, None]))
    return inside[0][:, :, None] & inside[1][:, None]


def mixup(images: Tensor, perm: Tensor, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): lam·x + (1 - lam)·x[perm], and the first label's weight (B,);
    `images` (B, ...) floats, also hidden activations; `lam` in [0, 1], a scalar or (B,)."""
    check_floats(images)
    perm = perm.to(images.device, non_blocking=True)
    ratio = per_image(lam, images)
    weight = ratio.to(images.dtype).view(-1, *[1] * (images.ndim - 1))
    return images * weight + images[perm] * (1 - weight), ratio


def cutmix(images: Tensor, perm: Tensor, centre: Tensor, lam: float | Tensor
           ) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019): a box of x[perm], sqrt(1 - lam) of each side, is pasted into x;
    the second result is the exact share (B,) of pixels that stay. `centre` (y, x) in pixels, (2,)
    or (B, 2); `lam` in [0, 1], a scalar or (B,); edges are truncated to whole pixels."""
    centre = centre.to(images.device, non_blocking=True)
    cut = (1 - per_image(lam, images)).sqrt()                # share of each side
    halves = [cut * length / 2 for length in images.shape[-2:]]
    box = box_mask([((middle - half).clamp(min=0).floor(), (middle + half).floor())
                    for middle, half in zip(centre.unbind(-1), halves, strict=True)],
                   images.shape[-2:])
    mixed = torch.where(box[:, None], images[perm.to(images.device, non_blocking=True)], images)
    return mixed, 1 - box.float().mean((1, 2))


def cutout(images: Tensor, centres: Tensor, side: float) -> Tensor:
    """Cutout (DeVries & Taylor 2017): a square of every image becomes 0, the mean colour; it
    reaches from side // 2 before to side // 2 after `centres`, (B, 2) pixels y, x."""
    centres = centres.to(images.device, non_blocking=True)
    edges = zip((centres - side // 2).unbind(1), (centres + side // 2).unbind(1), strict=True)
    return images.masked_fill(box_mask(edges, images.shape[-2:])[:, None], 0)


def probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Return targets (B, num_classes) of class indices (B,); probabilities of that shape stay."""
    if labels.ndim == 1 and not labels.is_floating_point():
        return F.one_hot(labels.long(), num_classes).float()
    if labels.shape[1:] != (num_classes,):
        raise ValueError(f"probabilities {tuple(labels.shape)} are not of {num_classes} classes")
    return labels.float()


def soft_targets(labels: Tensor, perm: Tensor, ratio: Tensor, num_classes: int) -> Tensor:
    """Return targets (B, num_classes): `ratio` (B,) of the labels', the rest of `labels[perm]`'s;
    `labels`: class indices (B,), or probabilities (B, num_classes)."""
    return mixup(probabilities(labels, num_classes), perm, ratio)[0]


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, *,
                   loss: Callable | None = None, train: bool = False) -> Tensor:
    """Return the gradient (B, C, H, W) of `loss` of outputs and labels (by default the mean
    cross-entropy) with respect to the images, in evaluation mode or, with `train`, in training
    mode, where BatchNorm's statistics follow. The parameters' gradients and the modes stay."""
    check_floats(images)
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) \
            or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    modes = [(part, part.training) for part in model.modules()]
    images = images.detach().requires_grad_()
    try:
        model.train(train)
        with torch.enable_grad():
            outputs = model(images)
            value = loss(outputs, labels) if loss else F.cross_entropy(outputs.float(), labels)
        with torch.autocast(images.device.type, enabled=False):
            return torch.autograd.grad(value, images)[0]
    finally:
        for part, training in modes:
            part.training = training


def softmax_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross entropy of softmax probabilities (B, C), mean over all entries."""
    with torch.autocast(logits.device.type, enabled=False):
        share = logits.float().softmax(1)
        # a NaN would end the process here (on a GPU for good): pass it on to the caller instead
        return F.binary_cross_entropy(share.nan_to_num(), targets.float()) + 0 * share.mean()
