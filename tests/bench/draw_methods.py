#!/usr/bin/env python3
"""Draw the picture at the top of the README: two photographs mixed by every method.

    python tests/bench/draw_methods.py methods.jpg [--epochs 30] [--runs DIR]
        [--sage sage/mixed.png] [--resizemix resizemix/mixed.png]

Saliency, attention and SAMix's masks come from a network that learned to tell random crops of these
photographs apart (ResNet-18 with 16 channels, trained by samix/main.py in about ten minutes; with
--runs it is kept, and an interrupted training goes on). LGCOAMix pastes as SAFuse does, AutoMix
learns masks as SAMix does; --sage and --resizemix draw the pictures of these READMEs. Manifold
Mixup mixes activations, of which there is no picture.
"""
import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from common import mixing, plots
from common.plots import INK, new_figure, save_figure
from resizemix.mixing import resize_mix
from safuse import superpixels
from safuse.mixing import attentive_superpixels, superpixel_mix
from safuse.network import activation_maps
from sage import comixup, puzzlemix, saliencymix
from sage.rearrange import draw_offsets, gradient_saliency, sage_mix
from samix import main as samix
from samix.mixblock import mix
from soft_aug.softcrop import confidence, soft_crop

PHOTOS = {"astronaut": "astronaut", "cat": "chelsea", "coffee": "coffee", "rocket": "rocket"}
SIDE = 128                              # pixels of the photographs that are mixed
MEAN, STD = (0.5,) * 3, (0.25,) * 3
FIRST, PERM = 0, (1, 2, 3, 0)             # the pair that is shown: a photograph and its partner


def photographs() -> torch.Tensor:
    """(4, 3, SIDE, SIDE) uint8: the middle squares."""
    square = v2.Compose([v2.ToImage(), v2.Lambda(lambda x: v2.functional.center_crop(
        x, min(x.shape[-2:]))), v2.Resize(SIDE, antialias=True)])
    return torch.stack([square(getattr(skimage.data, name)()) for name in PHOTOS.values()])


def train(photos: torch.Tensor, epochs: int, runs: Path):
    """Return SAMix's module, trained to tell crops of the photographs apart."""
    crop = v2.RandomResizedCrop(64, (0.3, 1.0), (0.8, 1.25), antialias=True)
    torch.manual_seed(0)
    for part, number in (("train", 120), ("test", 12)):
        for name, photo in zip(PHOTOS, photos, strict=True):
            folder = runs / "photographs" / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(number):
                Image.fromarray(crop(photo).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return samix.main(
        f"--method samix --dataset folder --data_dir {runs}/photographs --root_dir {runs} "
        f"--resume auto --initial_channels 16 --epochs {epochs} --batch_size 48 --lr 0.05 "
        "--min_lr 0 --block_lr 0.05 --block_min_lr 0 --ema_base 0.95 --ema_end 0.99 --seed 1"
        .split())


def mixtures(images, net) -> dict:
    """Method -> (images, soft targets)."""
    generator = torch.Generator().manual_seed(4)
    n, half = len(images), torch.tensor(0.5)
    labels, perm = torch.arange(n), torch.tensor(PERM)
    one_hot = torch.eye(n)
    net.eval()
    leaf = images.clone().requires_grad_()
    grad, = torch.autograd.grad(F.cross_entropy(net.q(leaf, "one"), labels), leaf)
    centres = torch.tensor([[64, 40], [70, 90], [40, 60], [90, 64]])
    found = {"Mixup": mixing.mixup(images, perm, half),
             "CutMix": mixing.cutmix(images, perm, centres, torch.tensor(0.7))}

    pixels = (images * 0.25 + 0.5).mul(255).round().to(torch.uint8)
    saliency = saliencymix.fine_grained_saliency(pixels)
    boxes = [saliencymix.saliency_mix(images[i:i + 1], torch.zeros(1, dtype=torch.long),
                                      torch.tensor(0.7), saliency[perm[i]])[1] for i in range(n)]
    pasted = [saliencymix.saliency_mix(images[[i, int(perm[i])]], torch.tensor([1, 0]),
                                       torch.tensor(0.7), saliency[perm[i]])[0][0]
              for i in range(n)]
    found["SaliencyMix"] = torch.stack(pasted), torch.cat(boxes)

    magnitude = puzzlemix.gradient_magnitude(grad)
    found["Puzzle Mix"] = puzzlemix.puzzle_mix(images, magnitude, perm, half, 16, mean=MEAN,
                                               std=STD, solver="gco")
    offsets = draw_offsets(SIDE, SIDE, 0.01, generator)
    found["SAGE"] = sage_mix(images, gradient_saliency(grad, 9, 3.0), perm, offsets, 0.5)
    found["ResizeMix"] = resize_mix(images, perm, torch.tensor(0.55),
                                    torch.tensor([[50, 5], [8, 50], [50, 50], [5, 8]]))
    wanted = torch.full((n,), 40)
    segments = superpixels.slic(images * 0.25 + 0.5, wanted, 10.0)
    chosen = torch.rand(n, int(segments.max()) + 1, generator=generator) < 0.5
    with torch.no_grad():
        backbone = net.q.backbone
        maps = activation_maps(backbone.after(backbone.before(images)), net.q.one.weight)
        attention = maps.amax(1)
    attentive = attentive_superpixels(attention[perm], segments[perm], 24)
    for name, which in (("SAFuse", chosen), ("OcCaMix", attentive)):
        mixed, fused, from_b = superpixel_mix(images, perm, segments, segments[perm], which)
        found[name] = mixed, 1 - from_b.gather(1, fused.flatten(1)).float().mean(1)
    with torch.no_grad():
        features, _ = net.k.backbone(images)
        masks = net.block(features, half, perm, SIDE // features.shape[-1], mode="bilinear")
    found["SAMix"] = mix(images, masks, perm), torch.full((n,), 0.5)

    results = {title: (mixed, mixing.soft_targets(labels, perm, ratio.expand(n), n))
               for title, (mixed, ratio) in found.items()}
    draws = comixup.draw_comix(n, generator, m_part=n, block_num=16, mixup_alpha=2.0)
    results["Co-Mixup"] = comixup.co_mix_batch(images, one_hot, magnitude, draws, m_part=n,
                                               solver="gco")
    crops, visible = soft_crop(images, torch.tensor([[40, 30], [-30, 50], [10, -60], [-50, -20]]),
                               torch.zeros(n, 3))
    sure = confidence(visible, n, power=2.0)[:, None]
    results["Soft Augmentation"] = crops, sure * one_hot + (1 - sure) * (1 - one_hot) / (n - 1)
    order = list(results)               # Co-Mixup beside Puzzle Mix
    order.insert(4, order.pop(order.index("Co-Mixup")))
    return {title: results[title] for title in order}


def caption(target, names) -> str:
    """Shares of a soft target (classes,) in %, the largest first; equal rests as one."""
    shares, index = target.sort(descending=True)
    lines = [f"{names[c]} {100 * share:.0f} %" for share, c in
             zip(shares.tolist(), index.tolist(), strict=True) if share >= 0.005]
    if len(lines) == len(names) and shares[1] - shares[-1] < 1e-3:
        lines[1:] = [f"others {100 * float(shares[1:].sum()):.0f} %"]
    return "\n".join(lines[:2])


def draw(path, images, names, results):
    """Write six columns by two rows: the two photographs, then one mixture a method."""
    figure = new_figure(8.8, 4.2)      # 880 pixels in the README
    axes = figure.subplots(2, 6).flatten()
    shown = (images * 0.25 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    pair = torch.cat([shown[FIRST], shown[PERM[FIRST]]], 1)
    cells = {"photographs": (pair, f"{names[FIRST]} and {names[PERM[FIRST]]}")} | {
        title: ((batch * 0.25 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)[one],
                caption(targets[one], names))
        for title, (batch, targets) in results.items()
        for one in [int(targets[:, FIRST].argmax()) if title == "Co-Mixup" else FIRST]}
    for axis, (title, (picture, shares)) in zip(axes, cells.items(), strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=10, color=INK)
        axis.set_xlabel(shares, fontsize=9, color=INK, labelpad=2)
    with tempfile.TemporaryDirectory() as folder:           # a JPEG is a fifth of the PNG
        save_figure(figure, Path(folder, "methods.png"))
        Image.open(Path(folder, "methods.png")).convert("RGB").save(path, quality=90)


def draw_sage(path, images, names, net):
    """Write SAGE's picture: photographs, partners, saliency, and what SAGE makes of them."""
    perm, labels = torch.tensor(PERM), torch.arange(len(images))
    saliency = gradient_saliency(mixing.input_gradient(net.q, images, labels), 9, 3.0)
    offsets = draw_offsets(SIDE, SIDE, 0.02, torch.Generator().manual_seed(4))
    draw_rows(path, "SAGE shifts the partner to where most saliency of both is seen", images, names,
              *sage_mix(images, saliency, perm, offsets, 0.5), saliency=saliency[:, 0].numpy())


def draw_resizemix(path, images, names):
    """Write ResizeMix's picture: photographs, partners, and their mixtures."""
    corners = torch.tensor([[50, 5], [8, 50], [50, 50], [5, 8]])
    draw_rows(path, "ResizeMix pastes the whole partner, smaller", images, names,
              *resize_mix(images, torch.tensor(PERM), torch.tensor(0.55), corners))


def draw_rows(path, title, images, names, mixed, ratio, **between):
    """Write photographs above their partners, rows `between`, and the mixtures with labels."""
    perm = torch.tensor(PERM)
    shown, partner, both = ((t * 0.25 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
                            for t in (images, images[perm], mixed))
    targets = mixing.soft_targets(torch.arange(len(images)), perm, ratio, len(images))
    plots.grid(path, title, {"image": shown, "partner": partner, **between, "mixed": both},
               [caption(target, names) for target in targets], side=1.5)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--runs", type=Path, help="folder that keeps the trained network")
    parser.add_argument("--sage", type=Path, help="draw SAGE's own picture, too")
    parser.add_argument("--resizemix", type=Path, help="likewise, ResizeMix's")
    args = parser.parse_args()
    photos = photographs()
    with tempfile.TemporaryDirectory() as folder:
        net = train(photos, args.epochs, args.runs or Path(folder))
    images = (photos.float() / 255 - 0.5) / 0.25
    draw(args.path, images, list(PHOTOS), mixtures(images, net))
    if args.sage:
        draw_sage(args.sage, images, list(PHOTOS), net)
    if args.resizemix:
        draw_resizemix(args.resizemix, images, list(PHOTOS))


if __name__ == "__main__":
    main()
