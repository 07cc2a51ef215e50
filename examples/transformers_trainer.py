"""Mixing in Hugging Face's Trainer, by its `compute_loss`; evaluation sees clean images."""
import argparse
import tempfile
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

ROOT = str(Path(__file__).resolve().parents[1])         # or "owner/mixup-zoo", source="github"


class MixTrainer(Trainer):
    """A Trainer whose training batches are mixed on the device."""

    def __init__(self, *args, mixer, **options):
        super().__init__(*args, **options)
        self.mixer = mixer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images, labels = inputs["pixel_values"], inputs["labels"]
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        images, targets = self.mixer(images, labels)
        outputs = model(pixel_values=images)
        loss = torch.nn.functional.cross_entropy(outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss


def main(argv=None):
    """Train for --steps; returns the mean loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--method", default="resizemix")
    args = parser.parse_args(argv)
    net = ResNetForImageClassification(ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10))
    images = torch.randn(64, 3, 32, 32)                                     # your data set
    data = [{"pixel_values": image, "labels": k % 10} for k, image in enumerate(images)]
    mixer = torch.hub.load(ROOT, "mixer", source="local", method=args.method, num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MixTrainer(net, TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=16, report_to=[],
            save_strategy="no", disable_tqdm=True), train_dataset=data, mixer=mixer)
        return trainer.train().training_loss


if __name__ == "__main__":
    print(f"loss {main():.4f}")
