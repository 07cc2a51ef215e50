"""A mixer in the place of timm's `mixup_fn`: (images, labels) -> (images, soft targets).

timm's train.py calls it on the device, after its loader, and takes SoftTargetCrossEntropy.
"""
import argparse
from functools import partial
from pathlib import Path

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

ROOT = str(Path(__file__).resolve().parents[1])         # or "owner/mixup-zoo", source="github"


def main(argv=None):
    """Train for --steps; returns the last loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--method", default="puzzle")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = timm.create_model("resnet10t", num_classes=10).to(device)
    mean, std = net.default_cfg["mean"], net.default_cfg["std"]
    mixer = torch.hub.load(ROOT, "mixer", source="local", method=args.method, num_classes=10,
                           mean=mean, std=std, prob=0.5)
    mixup_fn = partial(mixer, model=net)
    loss_fn = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-3)
    loss = None
    for _ in range(args.steps):
        images = torch.randn(16, 3, 64, 64, device=device)                  # timm's loader
        labels = torch.randint(10, (16,), device=device)
        images, targets = mixup_fn(images, labels)
        loss = loss_fn(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
