"""Sums of a training epoch, on the device."""
import torch

from common import distributed
from common.errors import NOT_SAVED, RunError


class StepSums:
    """Loss and hits of an epoch's training steps, summed without host synchronisation. saved: the
    `state` of a checkpoint inside the epoch."""

    def __init__(self, steps: int, device, saved=None):
        self.losses = torch.zeros(steps, device=device)
        self.hits = torch.zeros(2, dtype=torch.float64, device=device)      # right, seen
        self.more = {}                                                      # sums of other values
        self.steps = self.checked = 0
        if saved:                       # means and totals of all ranks
            first = distributed.rank() == 0
            self.steps = self.checked = len(saved["losses"])
            self.losses[:self.steps] = torch.tensor(saved["losses"])
            self.hits[:] = torch.tensor(saved["hits"]) * first
            self.more = {name: torch.tensor(value, device=device) * first
                         for name, value in saved.get("more", {}).items()}

    def add(self, step: int, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor,
            **more: torch.Tensor):
        """Add a step's loss and its hits on labels (B,) among logits (B, C). more: scalars whose
        means over the steps become columns of these names."""
        self.steps = step + 1
        self.losses[step] = loss.detach()
        self.hits[0] += (logits.detach().argmax(1) == labels).sum()
        self.hits[1] += len(labels)
        for name, value in more.items():
            self.more[name] = self.more.get(name, 0) + value.detach().double()

    def check(self, epoch: int):
        """Raise RunError naming the first step whose loss is not a finite number."""
        bad = (~torch.isfinite(self.losses[self.checked:self.steps])).nonzero()
        if len(bad):
            first = self.checked + int(bad[0])
            raise RunError(f"the loss became {self.losses[first].item()} at epoch {epoch + 1}, "
                           f"step {first + 1}; {NOT_SAVED}")
        self.checked = self.steps

    def state(self) -> dict:
        """Return what a checkpoint inside the epoch holds; every rank asks at the same step."""
        losses = distributed.total(self.losses[:self.steps]) / distributed.world()
        return {"losses": losses.tolist(), "hits": distributed.total(self.hits).tolist(),
                "more": self.totals()}

    def totals(self) -> dict:
        """Return the sums of other values over all ranks."""
        return {name: distributed.total(value).item() for name, value in self.more.items()}

    def result(self) -> dict:
        """Return mean loss, accuracy in % and means of other values over all ranks' steps."""
        sums = torch.cat([self.losses[:self.steps].double().sum()[None], self.hits])
        loss, right, seen = distributed.total(sums).tolist()
        steps = self.steps * distributed.world()
        return {"train_loss": loss / steps, "train_accuracy": 100 * right / max(seen, 1),
                **{name: value / steps for name, value in self.totals().items()}}
