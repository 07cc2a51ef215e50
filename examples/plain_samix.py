"""SAMix in a plain loop: the module holds the network, its moving average, the MixBlock and losses.

Any network serves that returns a middle feature map and the pooled features.
"""
import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18

ROOT = str(Path(__file__).resolve().parents[1])         # or "owner/mixup-zoo", source="github"


class Backbone(nn.Module):
    """torchvision's ResNet-18: features after its third stage, and those its classifier sees."""

    def __init__(self):
        super().__init__()
        net = resnet18()
        self.before = nn.Sequential(net.conv1, net.bn1, net.relu, net.layer1, net.layer2,
                                    net.layer3)
        self.after = net.layer4

    def forward(self, images):
        middle = self.before(images)
        return middle, self.after(middle).mean((2, 3))


def main(argv=None):
    """Train for --steps; returns the last loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = torch.hub.load(ROOT, "samix", source="local", backbone=Backbone().to(device),
                         num_classes=10, image_size=64, total_steps=args.steps)
    learning = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.01, momentum=0.9)
    loss = None
    for _ in range(args.steps):
        images = torch.randn(16, 3, 64, 64, device=device)                  # your loader
        labels = torch.randint(10, (16,), device=device)
        loss, _ = net(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.update()                                    # the moving average follows
    net.eval()                                          # from here on: images -> logits
    assert net(images).shape == (16, 10)
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
