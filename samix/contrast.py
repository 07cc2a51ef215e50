"""Encoder, queue and losses of MoCo v2 (Chen et al. 2020) with mixtures (SAMix section 3.2); keys,
queries and embeddings are (B, dim) of length 1."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.mixing import send
from common.precision import full_precision


class Encoder(nn.Module):
    """A backbone and MoCo v2's projection: images -> (middle feature map, embedding (B, dim))."""

    def __init__(self, backbone: nn.Module, width: int, dim: int = 128, neck: int = 2048):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Sequential(nn.Linear(width, neck), nn.ReLU(), nn.Linear(neck, dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        middle, pooled = self.backbone(images)
        return middle, F.normalize(self.projection(pooled).float())


class Queue(nn.Module):
    """The keys of past images, the negatives; alike on all ranks, so outside what DDP wraps."""

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor):
        """Replace the oldest keys by every rank's `keys` (B, dim), after backward()."""
        keys = distributed.gather_rows(keys).to(self.keys.dtype)
        index = torch.arange(len(keys), device=keys.device) + self.position
        self.keys[index % len(self.keys)] = keys
        self.position.add_(len(keys)).remainder_(len(self.keys))


def exchange(rows: Tensor, order: Tensor) -> Tensor:
    """Return this rank's part of all ranks' rows in `order`, a permutation alike on every rank."""
    if distributed.world() == 1:
        return rows
    mine = order.view(distributed.world(), -1)[distributed.rank()]
    return distributed.gather_rows(rows)[mine.to(rows.device, non_blocking=True)]


@torch.no_grad()
def encode_keys(encoder: nn.Module, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and keys of this rank's images. Ranks exchange images meanwhile: BatchNorm
    statistics that keys and queries share would give positive pairs away (MoCo section 3.3)."""
    outputs = encoder(exchange(images, order))
    return tuple(exchange(output, order.argsort()) for output in outputs)


def similarity(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Return scalar product / temperature of each pair, (B,); `key` gets no gradient."""
    return (query * key.detach()).float().sum(1) / temperature


def mixed_nce(mixed: Tensor, first: Tensor, second: Tensor, lam: float | Tensor,
              negatives: Tensor, temperature: float = 0.2) -> Tensor:
    """Return lam·InfoNCE(mixed, first) + (1 - lam)·InfoNCE(mixed, second) of mixtures and the keys
    of their two images, against `negatives` (size, dim). Of one key at lam 1 it is MoCo's loss."""
    with full_precision(mixed.device.type):                 # cosines near 1, divided by 0.2
        others = (mixed.float() @ negatives.detach().T / temperature).logsumexp(1)
    one, two = (F.softplus(others - similarity(mixed, key, temperature)) for key in (first, second))
    return (lam * one + (1 - lam) * two).mean()


def mixed_pair(mixed: Tensor, first: Tensor, second: Tensor, lam: float | Tensor,
               temperature: float = 0.2) -> Tensor:
    """Return the binary cross entropy of which image a mixture shows at ratio lam (section 3.2)."""
    difference = similarity(mixed, first, temperature) - similarity(mixed, second, temperature)
    return (lam * F.softplus(-difference) + (1 - lam) * F.softplus(difference)).mean()


def draw_extension(shape, generator: torch.Generator) -> Tensor:
    """Return weights of `extend`: Beta(2, 2) each, to interpolate, or one more, to extrapolate."""
    pairs = torch.full((*shape, 2), 2.0, dtype=torch.float64)
    extra = torch.rand((), generator=generator) < 0.5
    return torch._sample_dirichlet(pairs, generator)[..., 0].float() + extra


def extend(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Return keys of length 1 between the views' keys or beyond the first, by `weight` (B, dim)."""
    weight = send(weight, first.device)
    return F.normalize(weight * first + (1 - weight) * second)
