"""Mixing inside a DataLoader's collate_fn, one method drawn for each batch by torchvision.

Batches are mixed in the workers, on the CPU, so these are methods that need no network. A
generator that is seeded once and copied into workers would repeat its draws in each epoch: the
mixers take another one for each worker and epoch (and rank) from their `seed`.
"""
import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.models import resnet18
from torchvision.transforms import v2

ROOT = str(Path(__file__).resolve().parents[1])         # or "owner/mixup-zoo", source="github"


class Mix(torch.nn.Module):
    """A mixer as one of torchvision's transforms, for RandomChoice."""

    def __init__(self, method, num_classes, **options):
        super().__init__()
        self.mixer = torch.hub.load(ROOT, "mixer", source="local", method=method,
                                    num_classes=num_classes, **options)

    def forward(self, images, labels):
        return self.mixer(images, labels)


def main(argv=None):
    """Train for --steps; returns the last loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10      # your data set
    choice = v2.RandomChoice([Mix("cutmix", 10, seed=1), Mix("resizemix", 10, seed=2),
                              v2.MixUp(num_classes=10, alpha=0.2)])
    loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True, num_workers=2,
                        collate_fn=lambda items: choice(*default_collate(items)))
    net = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    step, loss = 0, None
    while step < args.steps:
        for mixed, targets in loader:
            loss = torch.nn.functional.cross_entropy(net(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == args.steps:
                break
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
