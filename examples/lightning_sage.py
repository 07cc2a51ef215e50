"""SAGE in the training_step of a LightningModule.

The saliency pass goes through the network itself: it costs one pass more, and leaves BatchNorm's
statistics, the gradients and the mode as they were. Each rank draws for itself.
"""
import argparse
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

ROOT = str(Path(__file__).resolve().parents[1])         # or "owner/mixup-zoo", source="github"


class Classifier(lightning.LightningModule):
    """A ResNet-18 that learns from SAGE's mixtures."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = resnet18(num_classes=num_classes)
        self.mixer = torch.hub.load(ROOT, "mixer", source="local", method="sage",
                                    num_classes=num_classes, rand_pos=0.1)

    def training_step(self, batch, batch_idx):
        mixed, targets = self.mixer(*batch, self.net)
        loss = torch.nn.functional.cross_entropy(self.net(mixed), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main(argv=None):
    """Train for --steps; returns the last loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10      # your data set
    trainer = lightning.Trainer(max_steps=args.steps, logger=False, enable_checkpointing=False,
                                enable_progress_bar=False)
    trainer.fit(Classifier(10), DataLoader(TensorDataset(images, labels), 16, shuffle=True))
    return trainer.callback_metrics["loss"].item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
