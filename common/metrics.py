"""Accuracy, calibration, and the evaluation of a loader over all ranks."""
import torch
import torch.nn.functional as F

from common import distributed, runtime


def topk_hits(logits: torch.Tensor, labels: torch.Tensor, ks=(1, 5)) -> torch.Tensor:
    """(len(ks),) counts of samples whose label is among the k largest of logits (B, C)."""
    largest = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = largest == labels[:, None]
    return torch.stack([hits[:, :k].sum() for k in ks])


def tally(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of logits (B, C): summed cross-entropy, hits at 1 and at 5, and B; (4,), for `averages`."""
    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
    return torch.cat([loss[None], topk_hits(logits, labels), labels.new_tensor([len(labels)])])


def averages(sums: list[float]) -> dict:
    """loss (mean cross-entropy), top1 and top5 in %, count; of the sum of all `tally`."""
    loss, top1, top5, count = sums
    return {"loss": loss / max(count, 1), "top1": 100 * top1 / max(count, 1),
            "top5": 100 * top5 / max(count, 1), "count": int(count)}


def evaluate(net, loader, args, *, attack=None, keep_logits=False):
    """Loss and accuracy of `net` on every image of `loader`, counted once over all ranks.

    args: --amp's precision of the forward pass, --max_steps batches at most; attack: changes the
    images first (images, labels) -> images. Returns `averages`' dict, with keep_logits also this
    rank's logits (N, C) float32 and labels (N,). The network's mode is restored.
    """
    training = net.training
    net.eval()
    device = next(net.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kept = []
    for step, (images, labels) in enumerate(loader):
        if args.max_steps and step >= args.max_steps:
            break
        if attack:
            images = attack(images, labels)
        with torch.no_grad(), runtime.autocast(args, device):
            logits = net(images)
        logits = logits.float()
        sums += tally(logits, labels)
        if keep_logits:
            kept.append((logits, labels))
    net.train(training)
    result = averages(distributed.total(sums).tolist())
    if keep_logits:                     # a rank may have had no image
        empty = torch.empty(0, 1, device=device), torch.empty(0, dtype=torch.long, device=device)
        result["logits"], result["labels"] = (
            torch.cat(part) for part in zip(*(kept or [empty]), strict=True))
    return result


def sentence(result: dict) -> str:
    """What `evaluate` found, in words."""
    return (f"accuracy {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, "
            f"loss {result['loss']:.4f} on {result['count']} images")


def columns(result: dict, part: str = "test") -> dict:
    """What `evaluate` found on the images of `part`, by the names of log.csv's columns."""
    return {f"{part}_loss": result["loss"], f"{part}_accuracy": result["top1"],
            f"{part}_top5": result["top5"]}


def reliability_bins(logits: torch.Tensor, labels: torch.Tensor, bins: int = 10):
    """Mean confidence, accuracy and count of each confidence bin, edges to the right.

    logits (N, C), labels (N,); bin i holds confidences in (i/bins, (i+1)/bins]. Returns three
    float64 tensors of length bins; empty bins are 0. Guo et al. 2017, section 2.
    """
    confidence, predicted = logits.float().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, device=logits.device, dtype=torch.float64)
    index = torch.bucketize(confidence.double(), edges[1:-1], right=False)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=logits.device)
    right = (predicted == labels).double()
    sums.index_add_(1, index, torch.stack([confidence.double(), right, torch.ones_like(right)]))
    count = sums[2]
    return sums[0] / count.clamp(min=1), sums[1] / count.clamp(min=1), count


def expected_calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = 10) -> float:
    """ECE as a fraction in [0, 1]: the bins' |accuracy - confidence| weighed by their counts."""
    confidence, accuracy, count = reliability_bins(logits, labels, bins)
    return float(((accuracy - confidence).abs() * count).sum() / count.sum())
