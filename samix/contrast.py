"""Self-supervised SAMix: MoCo v2 (Chen et al. 2020) with mixtures of two views (SAMix section 3.2).

Keys, queries and embeddings are (B, dim) of length 1. The momentum encoder is `momentum_copy` of
the encoder; of the MixBlock's second image, features and pixels are of the second view.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.precision import full_precision


class Encoder(nn.Module):
    """A backbone as `momentum.Branch` has, of `width` pooled features, and MoCo v2's projection
    through `neck` units: images -> (middle feature map, embedding (B, dim))."""

    def __init__(self, backbone: nn.Module, width: int, dim: int = 128, neck: int = 2048):
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Sequential(nn.Linear(width, neck), nn.ReLU(), nn.Linear(neck, dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        middle, pooled = self.backbone(images)
        return middle, F.normalize(self.projection(pooled).float())


class Queue(nn.Module):
    """The keys of past images, (size, dim), the negatives of all losses; the same on all ranks, so
    outside what DistributedDataParallel wraps, which would send it around at every step."""

    def __init__(self, size: int = 65536, dim: int = 128):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim)))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def enqueue(self, keys: Tensor):
        """Replaces the oldest keys by `keys` (B, dim) of every rank, after backward(); ValueError
        for more keys than the queue holds."""
        keys = distributed.gather_rows(keys).to(self.keys.dtype)
        if len(keys) > len(self.keys):
            raise ValueError(f"{len(keys)} keys do not fit into a queue of {len(self.keys)}")
        index = torch.arange(len(keys), device=keys.device) + self.position
        self.keys[index % len(self.keys)] = keys
        self.position.add_(len(keys)).remainder_(len(self.keys))


def shuffle(images: Tensor, order: Tensor) -> Tensor:
    """This rank's part of all ranks' images in `order`, a permutation drawn alike on every rank.

    Else the keys' and queries' common BatchNorm statistics would give a positive pair away (MoCo
    section 3.3). One process has nothing to shuffle.
    """
    if distributed.world() == 1:
        return images
    mine = order.view(distributed.world(), -1)[distributed.rank()]
    mine = mine.to(images.device, non_blocking=True)
    return distributed.gather_rows(images)[mine]


def unshuffle(outputs: Tensor, order: Tensor) -> Tensor:
    """Brings what was computed from `shuffle`d images back to this rank's own images."""
    return shuffle(outputs, order.argsort())


@torch.no_grad()
def encode_keys(encoder: nn.Module, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Features and keys of this rank's images by the momentum encoder, BatchNorm shuffled."""
    return tuple(unshuffle(output, order) for output in encoder(shuffle(images, order)))


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float = 0.2) -> Tensor:
    """MoCo's loss (equation 1), a scalar: find each query's key among `negatives` (size, dim)."""
    others = negatives_logsumexp(query, negatives, temperature)
    return F.softplus(others - similarity(query, key, temperature)).mean()


def mixed_nce(mixed: Tensor, first: Tensor, second: Tensor, lam: float | Tensor,
              negatives: Tensor, temperature: float = 0.2) -> Tensor:
    """lam·InfoNCE(mixed, first) + (1 - lam)·InfoNCE(mixed, second), a scalar, of a mixture and the
    keys of its two images: the encoder's loss and, through the momentum encoder, the MixBlock's."""
    others = negatives_logsumexp(mixed, negatives, temperature)
    one, two = (F.softplus(others - similarity(mixed, key, temperature)) for key in (first, second))
    return (lam * one + (1 - lam) * two).mean()


def mixed_pair(mixed: Tensor, first: Tensor, second: Tensor, lam: float | Tensor,
               temperature: float = 0.2) -> Tensor:
    """Binary cross entropy, a scalar, of which of its two images a mixture shows, at ratio lam: the
    local part of the mixing objective (section 3.2), without a queue."""
    difference = similarity(mixed, first, temperature) - similarity(mixed, second, temperature)
    return (lam * F.softplus(-difference) + (1 - lam) * F.softplus(difference)).mean()


def similarity(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Scalar product / temperature of each pair, (B,); `key` gets no gradient."""
    return (query * key.detach()).float().sum(1) / temperature


def negatives_logsumexp(query: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """logsumexp over the negatives of query·negative / temperature, (B,)."""
    with full_precision(query.device.type):                 # cosines near 1, divided by 0.2
        return (query.float() @ negatives.detach().T / temperature).logsumexp(1)


def draw_extension(shape, how: str, generator: torch.Generator) -> Tensor:
    """Weights of `extend`: Beta(2, 2) for each element ('inter'), one more to extrapolate
    ('extra'), or one of them with probability 1/2 ('either')."""
    extra = how == "extra" or how == "either" and torch.rand((), generator=generator) < 0.5
    pairs = torch.full((*shape, 2), 2.0, dtype=torch.float64)
    return torch._sample_dirichlet(pairs, generator)[..., 0].float() + float(extra)


def extend(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Keys of length 1 between the views' keys, or beyond the first, by `weight` (B, dim)."""
    weight = weight.to(first.device, non_blocking=True)
    return F.normalize(weight * first + (1 - weight) * second)
