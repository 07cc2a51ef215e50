"""Evaluation, calibration and the sums of an epoch against hand-made cases."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import metrics
from common.errors import RunError
from common.run import StepSums

ALL = SimpleNamespace(amp="off", max_steps=None)


class Fixed(nn.Module):
    """Logits are the image's own numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1) * self.weight


def test_evaluate_counts_every_image_once():
    torch.manual_seed(0)
    labels = torch.randint(8, (23,))
    images = torch.randn(23, 1, 1, 8) + 2 * torch.eye(8)[labels].view(23, 1, 1, 8)
    batches = [(images[i:i + 5], labels[i:i + 5]) for i in range(0, 23, 5)]
    net = Fixed().train()
    result = metrics.evaluate(net, batches, ALL, keep_logits=True)
    logits = images.flatten(1)
    order = logits.argsort(1, descending=True)
    assert result["count"] == 23 and net.training
    assert result["top1"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert result["top5"] == pytest.approx(
        100 * (order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert torch.equal(result["labels"], labels) and torch.equal(result["logits"], logits)
    assert metrics.evaluate(net, batches, SimpleNamespace(amp="off", max_steps=2))["count"] == 10
    worse = metrics.evaluate(net, batches, ALL, attack=lambda images, labels: -images)
    assert worse["top1"] < result["top1"]


def test_calibration_error_by_hand():
    logits = torch.log(torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.85, 0.15], [0.5, 0.5]]))
    labels = torch.tensor([0, 1, 0, 0])
    confidence, accuracy, count = metrics.reliability_bins(logits, labels)
    assert count.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 2, 1]     # 0.5 belongs to (0.4, 0.5]
    assert accuracy[8] == 0.5 and confidence[8] == pytest.approx(0.85)
    expected = (2 * 0.35 + 0.05 + 0.5) / 4
    assert metrics.expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_epoch_sums_name_the_step_of_a_nan():
    sums = StepSums(6, torch.device("cpu"))
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    for step in range(4):
        sums.add(step, torch.tensor(2.0 + step), logits, labels)
    sums.check(epoch=7)
    assert sums.result() == {"train_loss": 3.5, "train_accuracy": 75.0}
    resumed = StepSums(6, torch.device("cpu"), sums.state())
    resumed.add(4, torch.tensor(np.nan), logits, labels)
    resumed.add(5, torch.tensor(1.0), logits, labels)
    with pytest.raises(RunError, match="nan at epoch 7, step 4"):
        resumed.check(epoch=7)
