"""Mixing in a DataLoader's collate_fn, by torchvision's RandomChoice of a method for each batch.

A generator seeded once and copied into workers repeats its draws in each epoch; the mixers make
another one for each rank, worker and epoch from their `seed`. Where workers are not forked (macOS,
Windows) take num_workers=0."""
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.models import resnet18
from torchvision.transforms import v2

STEPS = 100
ROOT = __file__.rsplit("examples", 1)[0]        # or "owner/mixup-zoo", source="github"


def main():
    """Train; return the last loss."""
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10      # your data set
    mixers = [torch.hub.load(ROOT, "mixer", source="local", method=method, num_classes=10, seed=1)
              for method in ("cutmix", "resizemix")]
    choice = v2.RandomChoice([*mixers, v2.MixUp(num_classes=10, alpha=0.2)])
    loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True, num_workers=2,
                        collate_fn=lambda items: choice(*default_collate(items)))
    net = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(-(-STEPS // len(loader))):
        for mixed, targets in loader:
            loss = torch.nn.functional.cross_entropy(net(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
