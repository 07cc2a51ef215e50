"""Mixing in Hugging Face's Trainer, by its `compute_loss`; evaluation sees clean images."""
import tempfile

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

ROOT = __file__.rsplit("examples", 1)[0]        # or "owner/mixup-zoo", source="github"
STEPS = 100


class MixTrainer(Trainer):
    """A Trainer whose training batches are mixed on the device."""

    mixer = torch.hub.load(ROOT, "mixer", source="local", method="resizemix", num_classes=10)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        images, targets = self.mixer(inputs["pixel_values"], inputs["labels"])
        outputs = model(pixel_values=images)
        loss = torch.nn.functional.cross_entropy(outputs.logits, targets)
        return (loss, outputs) if return_outputs else loss


net = ResNetForImageClassification(ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10))
data = [{"pixel_values": image, "labels": k % 10}                               # your data set
        for k, image in enumerate(torch.randn(64, 3, 32, 32))]
with tempfile.TemporaryDirectory() as folder:
    flags = TrainingArguments(folder, max_steps=STEPS, per_device_train_batch_size=16,
                              report_to=[], save_strategy="no", disable_tqdm=True)
    loss = MixTrainer(net, flags, train_dataset=data).train().training_loss
print(f"loss {loss:.4f}")
