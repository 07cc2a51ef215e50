"""SAGE (Ma et al., BMVC 2022): the second image is shifted to where its salient regions cover the
first one's least, then both are blended pixel by pixel by their shares of the saliency."""
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from common.errors import RunError
from common.mixing import Draws, check_floats, per_image, send
from sage.puzzlemix import shares

# Elements (candidates × images × pixels) compared at once: what a CPU's cache, a GPU's memory holds
CPU_CHUNK, GPU_CHUNK = 2 ** 19, 2 ** 26


def gradient_saliency(grad: Tensor, kernel_size: int = 5, sigma: float = 1.0) -> Tensor:
    """Return the mean (B, 1, H, W) over channels of |grad| (B, C, H, W), blurred by a Gaussian of
    `kernel_size` (odd) and standard deviation `sigma`, in pixels, over a reflected border."""
    if kernel_size // 2 >= min(grad.shape[-2:]):
        raise RunError(f"a saliency blur of {kernel_size} pixels is too wide for images of "
                       f"{min(grad.shape[-2:])} pixels")
    return gaussian_blur(grad.detach().abs().mean(1, keepdim=True), [kernel_size] * 2, [sigma] * 2)


def draw_offsets(height: int, width: int, fraction: float, generator: Draws = None) -> Tensor:
    """Return K candidate shifts (K, 2) of (dy, dx) in pixels, on the CPU, without repetition: a
    `fraction` of the (2·height - 1)(2·width - 1) that leave an overlap, at least 1."""
    rows, columns = 2 * height - 1, 2 * width - 1
    count = max(1, int(rows * columns * fraction))
    flat = torch.randperm(rows * columns, generator=generator)[:count]
    return torch.stack([flat % rows - (height - 1), flat // rows - (width - 1)], 1)


@torch.no_grad()
def best_offsets(first: Tensor, second: Tensor, offsets: Tensor) -> Tensor:
    """Return the shift (B, 2), of offsets (K, 2), of `second` at which the blend shows most
    saliency. `first`, `second` (B, H, W) >= 0 are the weighted saliencies g1 and g2. With t the
    shifted g2 (zero where it does not reach) and the blend's mask M = g1 / (g1 + t), a candidate
    scores sum(g1·M + t·(1 - M)) = sum(g1) + sum(t) - sum(2h), where h = 1 / (1/g1 + 1/t) is zero
    wherever either is. sum(g1) does not depend on the candidate."""
    batch, height, width = first.shape
    # Images last: gathering a window copies runs of B numbers, and sums run over outer dimensions
    inverse = first.permute(1, 2, 0).contiguous().reciprocal().view(-1, batch)
    padded = second.new_zeros(3 * height, 3 * width, batch)
    padded[height:2 * height, width:2 * width] = second.permute(1, 2, 0)
    padded = padded.view(-1, batch)
    y = torch.arange(height, 2 * height, device=first.device)[:, None]
    window = (y * 3 * width + torch.arange(width, 2 * width, device=first.device)).view(-1)

    limit = CPU_CHUNK if first.device.type == "cpu" else GPU_CHUNK
    scores = []
    for dy, dx in (chunk.T for chunk in offsets.split(max(1, limit // first.numel()))):
        index = window - (dy * 3 * width + dx)[:, None]
        t = padded.index_select(0, index.view(-1)).view(len(index), -1, batch)
        mass = t.sum(1)
        hidden = t.reciprocal_().add_(inverse).reciprocal_().sum(1)
        scores.append(mass - 2 * hidden)
    return offsets[torch.cat(scores).argmax(0)]


@torch.no_grad()
def sage_mix(images: Tensor, saliency: Tensor, perm: Tensor, offsets: Tensor,
             alpha: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return each image mixed with its shifted partner, and ratio (B,), the mean of the mask.
    `images` (B, C, H, W), normalised so that 0 is the mean colour, which fills what the shifted
    partner leaves free; `saliency` (B, 1, H, W) >= 0, all zero counts as uniform; `perm` (B,);
    `offsets` (K, 2) integer candidates (dy, dx), positive moves the partner down and right; `alpha`
    in [0, 1], a scalar or (B,), weighs the first image's saliency."""
    batch, _, height, width = images.shape
    check_floats(images)
    perm, offsets = send(perm, images.device), send(offsets, images.device)
    share = shares(saliency[:, 0].float())
    alpha = per_image(alpha, images)[:, None, None]
    first, second = share * alpha.clamp(min=1e-12), share[perm] * (1 - alpha).clamp(min=1e-12)

    dy, dx = best_offsets(first, second, offsets).T[..., None]
    y = torch.arange(height, device=images.device) - dy                  # (B, H): where each row
    x = torch.arange(width, device=images.device) - dx                   # of the result comes from
    covered = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    source = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    source = source.view(batch, 1, -1)                                   # flat pixel index
    shifted = second.view(batch, 1, -1).gather(2, source).view_as(second) * covered
    mask = first / (first + shifted).clamp(min=1e-16)
    partner = images[perm].flatten(2).gather(2, source.expand(-1, images.shape[1], -1))
    partner = partner.view(images.shape).mul_(((1 - mask) * covered).to(images.dtype)[:, None])
    return partner.addcmul_(mask.to(images.dtype)[:, None], images), mask.mean((1, 2))
