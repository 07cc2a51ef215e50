"""Pictures of superpixels: their borders, two images and their mixture."""
from pathlib import Path

import torch
from torch import Tensor

from common import plots

SIDE = 224                     # pixels at which borders are drawn


def borders(pixels: Tensor, labels: Tensor):
    """Return images (B, 3, H, W) in [0, 1] as enlarged arrays, superpixels' borders in yellow."""
    factor = max(1, SIDE // pixels.shape[-1])
    pixels, labels = (t.repeat_interleave(factor, -2).repeat_interleave(factor, -1).cpu()
                      for t in (pixels, labels))
    edge = torch.zeros_like(labels, dtype=torch.bool)
    edge[:, 1:] = labels[:, 1:] != labels[:, :-1]
    edge[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
    yellow = torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    return torch.where(edge[:, None], yellow, pixels).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw_mixed(path, title: str, images: Tensor, mixed: Tensor, perm: Tensor, labels: Tensor,
               mask: Tensor, names: list[str], shares: dict[str, Tensor]) -> Path:
    """Draw `images` (B, 3, H, W) in [0, 1], images[perm], and their mixture; return the path.

    `labels` (B, H, W) superpixels of the images; `mask` (B, H, W) where images[perm] was pasted;
    `names` of the images' classes; `shares`: name -> (B,) of the first image in the label.
    """
    fused = torch.where(mask, labels[perm] + labels.max() + 1, labels)
    rows = {"image a": borders(images, labels), "image b": borders(images[perm], labels[perm]),
            "mask": mask.cpu().numpy(), "fused": borders(mixed, fused)}
    percent = {name: (100 * share).round().int().tolist() for name, share in shares.items()}
    return plots.grid(path, title, rows, [
        "\n".join([f"{names[i]} : {names[j]}",
                   *(f"{name} {of[i]} : {100 - of[i]}" for name, of in percent.items())])
        for i, j in enumerate(perm.tolist())], side=1.5)
