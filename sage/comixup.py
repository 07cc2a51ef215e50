"""Co-Mixup (Kim et al., ICLR 2021): each output is put together from several images of its part.

A batch is cut into parts of `m_part` images. Within a part N outputs are labelled over N inputs on
an n × n grid of blocks: blocks prefer salient inputs and their neighbours' input (beta), outputs
prefer inputs that the other outputs leave alone (gamma: the supermodular diversity term, through
the compatibility matrix A, once an input has more than tau blocks elsewhere). A block holds one
input, or half and half of two; labels are therefore pairs of inputs, equal ones for a whole block.
"""
import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import gco.cgco
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HALF_BONUS = 5e-4                    # what a half-and-half block is cheaper than its parents' mean
# gco works on integers: its wrapper scales unary terms, edge weights and the label table so
UNARY_SCALE, EDGE_SCALE, TABLE_SCALE = 100_000, 1000, 100
MAX_TERM = 10_000_000                # gco ends the process at terms above this


# ---- draws and preparation

class CoMixDraws(NamedTuple):
    """Random draws of a batch: blocks a side n, prior (B,), initial labels (B, n, n) in a part."""
    block_num: int
    prior: Tensor
    labels0: Tensor


def part_sizes(batch: int, m_part: int) -> list[int]:
    """Sizes of the parts of a batch: m_part each, the last one what is left."""
    return [m_part] * (batch // m_part) + [batch % m_part] * (batch % m_part > 0)


def draw_comix(batch: int, generator: torch.Generator, *, m_part: int = 20, block_num: int = 4,
               mixup_alpha: float = 2.0) -> CoMixDraws:
    """Dirichlet(mixup_alpha) prior and uniform initial labels for each part, on the CPU.

    `block_num` -1 draws 2, 4, 8 or 16.
    """
    if block_num == -1:
        block_num = 2 ** int(torch.randint(1, 5, (), generator=generator))
    priors, labels = [], []
    for n in part_sizes(batch, m_part):
        concentration = torch.full((n,), float(mixup_alpha), dtype=torch.float64)
        priors.append(torch._sample_dirichlet(concentration, generator).float())
        labels.append(torch.randint(n, (n, block_num, block_num), generator=generator))
    return CoMixDraws(block_num, torch.cat(priors), torch.cat(labels))


@torch.no_grad()
def cost_and_compatibility(saliency: Tensor, block_num: int, omega: float = 0.001
                           ) -> tuple[Tensor, Tensor]:
    """Cost (..., N, n, n) and compatibility A (..., N, N) of parts of N images each.

    `saliency` (..., N, H, W) >= 0; all zero, or not finite, counts as uniform. A block costs
    minus its share of the image's saliency; A = (1 - omega)·I + omega·N·D / sum(D) with D the L1
    distances, in pixels, between the images' most salient 8 × 8 windows (sum(D) = 0: A lacks D).
    """
    *parts, height, width = saliency.shape
    maps = saliency.float().reshape(-1, 1, height, width)
    blocks = F.adaptive_avg_pool2d(maps, block_num).view(*parts, block_num, block_num)
    total = blocks.sum((-2, -1), keepdim=True)
    usable = (total > 0) & total.isfinite()
    cost = -torch.where(usable, blocks / total, 1 / block_num ** 2)

    windows = F.avg_pool2d(maps, (min(8, height), 1), stride=1)
    windows = F.avg_pool2d(windows, (1, min(8, width)), stride=1)
    top = windows.flatten(1).argmax(1).view(parts)
    positions = torch.stack([top // windows.shape[-1], top % windows.shape[-1]], -1).float()
    distance = (positions[..., :, None, :] - positions[..., None, :, :]).abs().sum(-1)
    n = parts[-1]
    share = distance * n / distance.sum((-2, -1), keepdim=True).clamp(min=1)
    return cost, (1 - omega) * torch.eye(n, device=saliency.device) + omega * share


def prior_cost(cost: Tensor, prior: Tensor, eta: float) -> Tensor:
    """Cost (..., n, n) of inputs less what the prior (...) gives them: eta/n²·log(prior)."""
    return cost.float() - eta / cost.shape[-1] ** 2 * (prior + 1e-8).log()[..., None, None]


# ---- the labelling's value

def block_masks(labels: Tensor, inputs: int) -> Tensor:
    """Masks (..., N, n, n, inputs), 0, 0.5 or 1, of labels (..., N, n, n, 2)."""
    one_hot = torch.zeros(*labels.shape[:-1], inputs, device=labels.device)
    return one_hot.scatter_add_(-1, labels, torch.full_like(labels, 0.5, dtype=one_hot.dtype))


def _resolve(counts: Tensor) -> Tensor:
    """Extra cost (P, N, N), 0 or 1, that parts outputs made of the same two or more inputs.

    The first of such a pair pays for their first common input, the second for the next one.
    """
    used = (counts > 0).int()
    same = (used[:, :, None] == used[:, None]).all(-1) & (used.sum(-1) > 1)[..., None]
    first = used.argmax(-1, keepdim=True)
    second = used.scatter(-1, first, 0).argmax(-1, keepdim=True)
    pays = [same.triu(1).any(-1, keepdim=True), same.tril(-1).any(-1, keepdim=True)]
    extra = torch.zeros_like(counts).scatter_(-1, first, pays[0].float())
    return extra.scatter_add_(-1, second, pays[1].float())


# ---- labelling by graph cuts on the CPU

def _library(loader: type) -> ctypes.CDLL:
    """gco's library; a handle of our own, so that argument types are ours as well."""
    library = loader(gco.cgco._cgco._name)
    number, address = ctypes.c_int, ctypes.c_void_p
    for name, types in {"CreateGeneralGraph": [number, number, address],
                        "SetAllNeighbors": [number, address, address, address, number],
                        "SetDataCost": [number, address], "SetSmoothCost": [number, address],
                        "InitLabelAtSite": [number, number, number],
                        "GetLabels": [number, address], "Swap": [number, number, address],
                        "DestroyGraph": [number]}.items():
        getattr(library, f"gco{name}").argtypes = types
    return library


# Short calls keep Python's lock, the cut itself gives it up
held, released = _library(ctypes.PyDLL), _library(ctypes.CDLL)


class GridCut:
    """Alpha-beta swap on an n × n grid with one edge weight and 2 to `max_labels` labels.

    One graph for each number of labels L, made up front: gco's list of graphs is not thread-safe,
    so graphs are made and destroyed only while no thread cuts. A graph reads its integer terms
    `unary[L]` (n², L) and `table[L]` (L, L) in place.
    """

    def __init__(self, n: int, weight: int, max_labels: int):
        grid = np.arange(n * n, dtype=np.intc).reshape(n, n)
        edges = [np.concatenate([grid[:-1].ravel(), grid[:, :-1].ravel()]),
                 np.concatenate([grid[1:].ravel(), grid[:, 1:].ravel()]),
                 np.full(2 * n * (n - 1), weight, np.intc)]
        self.labels, self.energy = np.zeros(n * n, np.intc), np.zeros(1, np.longlong)
        self.addresses = self.labels.ctypes.data, self.energy.ctypes.data
        self.unary, self.table, self.handles = {}, {}, {}
        self.potts = TABLE_SCALE * (1 - np.eye(max_labels, dtype=np.intc))
        for count in range(2, max_labels + 1):
            self.unary[count] = unary = np.zeros((n * n, count), np.intc)
            self.table[count] = table = np.zeros((count, count), np.intc)
            handle = ctypes.c_int()
            held.gcoCreateGeneralGraph(n * n, count, ctypes.addressof(handle))
            self.handles[count] = handle.value
            held.gcoSetAllNeighbors(handle.value, *(e.ctypes.data for e in edges), len(edges[0]))
            held.gcoSetDataCost(handle.value, unary.ctypes.data)
            held.gcoSetSmoothCost(handle.value, table.ctypes.data)

    def solve(self, count: int) -> np.ndarray:
        """Labels (n²,) for unary[count] and table[count], from all-zero ones."""
        handle, (labels, energy) = self.handles[count], self.addresses
        released.gcoSwap(handle, -1, energy)
        held.gcoGetLabels(handle, labels)
        for site in self.labels.nonzero()[0].tolist():
            held.gcoInitLabelAtSite(handle, site, 0)
        return self.labels

    def close(self):
        for handle in self.handles.values():
            held.gcoDestroyGraph(handle)


def _contenders(low: list[float], high: list[float], margin: float) -> list[int]:
    """Labels that may win: every other one costs more than any of these at every block.

    `low`, `high` bound a label's cost over the blocks; `margin` is more than a block's neighbours
    can add. Swaps never keep the others, so that leaving them out changes no result.
    """
    limit = min(high) + margin
    while True:
        kept = [i for i, cost in enumerate(low) if cost <= limit]
        reach = max([high[i] for i in kept]) + margin
        if reach <= limit:
            return kept
        limit = reach


def _best_labels(cut: GridCut, cost: np.ndarray, penalty: np.ndarray, bounds: list[list[float]],
                 halves: list[tuple[int, int]], margin: float) -> np.ndarray:
    """One output's labels, pairs of inputs (n², 2), or (1, 2) where all blocks have the same.

    `cost` (N, n²) + `penalty` (N,) is an input's cost, `bounds` are the least and the largest of
    `cost` for each input; `halves` are the pairs that may share a block.
    """
    n, added = len(cost), penalty.tolist()
    low, high = ([b + a for b, a in zip(bound, added, strict=True)] for bound in bounds)
    for side in (low, high):
        side += [(side[a] + side[b]) / 2 - HALF_BONUS for a, b in halves]
    kept = _contenders(low, high, margin)
    wholes = [i for i in kept if i < n]
    pairs = [(i, i) for i in wholes] + [halves[i - n] for i in kept[len(wholes):]]
    if len(pairs) == 1:
        return np.array(pairs)

    table = cut.table[len(pairs)]
    table[:] = cut.potts[:len(pairs), :len(pairs)]
    for row, parents in enumerate(pairs[len(wholes):], len(wholes)):
        for column in [wholes.index(i) for i in parents if i in wholes]:
            table[row, column] = table[column, row] = TABLE_SCALE // 4
    pairs = np.array(pairs)
    unary = cost + penalty[:, None]
    unary = (unary[pairs[:, 0]] + unary[pairs[:, 1]]) / 2
    unary[len(wholes):] -= HALF_BONUS
    if max([high[i] for i in kept]) * UNARY_SCALE > MAX_TERM:     # only differences count
        unary = np.minimum(unary - unary.min(), MAX_TERM / UNARY_SCALE)
    unary *= UNARY_SCALE
    cut.unary[len(pairs)].T[:] = unary                  # truncated toward zero
    return pairs[cut.solve(len(pairs))]


def _label_part(cut: GridCut, cost: np.ndarray, compatibility: np.ndarray, labels: np.ndarray, *,
                margin: float, gamma: float, tau: float, hard: bool, set_resolve: bool, niter: int):
    """Improves the labels (N, n², 2) of one part in place; `cost` (N, n²)."""
    n = len(cost)
    counts = np.array([np.bincount(row.ravel(), minlength=n) for row in labels], np.float32) / 2
    total = counts.sum(0)
    bounds = [cost.min(1).tolist(), cost.max(1).tolist()]
    extra = None
    for sweep in range(niter):
        before = labels.copy()
        for j in range(n):
            others = total - counts[j]
            load = compatibility @ others
            # The published program masks before A, not after: A·(others·[load > tau])
            over = compatibility @ (others * (load > tau)) if hard else np.maximum(load - tau, 0)
            penalty = np.float32(2 * gamma) * over
            if extra is not None:
                penalty += np.float32(gamma) * extra[j]
            used = counts[j].nonzero()[0].tolist() if sweep else []
            if len(used) > 3:
                used = sorted(torch.from_numpy(counts[j]).topk(3).indices.tolist())
            halves = list(itertools.combinations(used, 2))
            labels[j] = _best_labels(cut, cost, penalty, bounds, halves, margin)
            counts[j] = np.bincount(labels[j].ravel(), minlength=n) / 2
            total = others + counts[j]
        if (labels == before).all():
            return
        if set_resolve and sweep == niter - 2:
            extra = _resolve(torch.from_numpy(counts)[None])[0].numpy()


def _label_gco(cost: Tensor, compatibility: Tensor, labels0: Tensor, *, beta: float, threads: int,
               **terms) -> Tensor:
    """Labels (P, N, n, n, 2) by alpha-beta swaps; the parts are shared out among threads."""
    parts, n, side, _ = cost.shape
    weight = min(int(np.float32(beta) * EDGE_SCALE), MAX_TERM // TABLE_SCALE)
    margin = (4 * weight * TABLE_SCALE + 4) / UNARY_SCALE
    costs, compatibility = cost.flatten(2).cpu().numpy(), compatibility.cpu().numpy()
    labels = labels0.flatten(2)[..., None].expand(-1, -1, -1, 2).cpu().clone().numpy()
    workers = max(1, min(threads, parts))
    cuts = [GridCut(side, weight, n + 3) for _ in range(workers)]

    def work(worker: int):
        for p in range(worker, parts, workers):
            _label_part(cuts[worker], costs[p], compatibility[p], labels[p], margin=margin, **terms)
    try:
        if workers == 1:
            work(0)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(work, range(workers)))
    finally:
        for cut in cuts:
            cut.close()
    return torch.from_numpy(labels).view(parts, n, side, side, 2).to(cost.device)


# ---- labelling on the device, all parts at once

def _label_device(cost: Tensor, compatibility: Tensor, labels0: Tensor, *, beta: float,
                  gamma: float, tau: float, hard: bool, set_resolve: bool, niter: int) -> Tensor:
    """Labels (P, N, n, n, 2) by mean field; the host never waits for the device.

    An output's beliefs q (P, n², L), L = N inputs and three halves, are four times updated in
    parallel at a falling temperature, then once at almost zero on either colour of a checkerboard.
    """
    parts, n, side, _ = cost.shape
    device, size = cost.device, side * side
    site = torch.arange(size, device=device)
    y, x = site // side, site % side
    edges = ((y[:, None] - y).abs() + (x[:, None] - x).abs() == 1).float()
    edges = edges.expand(parts, -1, -1)
    colours = [((x + y) % 2 == colour)[:, None] for colour in (0, 1)]
    inputs = torch.arange(n, device=device)
    cost = cost.flatten(2).mT                                            # (P, n², N)
    labels = labels0.flatten(2)[..., None].repeat(1, 1, 1, 2)
    half_block = torch.full((parts, 2 * size), 0.5, device=device)
    counts = torch.zeros(parts, n, n, device=device)
    counts.scatter_add_(2, labels.flatten(2), half_block[:, None].expand(-1, n, -1))
    total, extra = counts.sum(1), torch.zeros_like(counts)

    # A step: temperature, and the blocks that it updates
    unit = max(beta, 1e-4)
    steps = [(unit * t, None) for t in (2, 0.93, 0.43, 0.2)] + [(unit / 1000, c) for c in colours]
    # Of each output's labels: the two inputs (P, N, L, 2), the shares of the inputs (P, N, L, N),
    # how alike two labels are (P, N, L, L; 1 the same, 0.75 a half and its parent), their costs
    wholes = pairs = inputs[:, None].expand(parts, n, n, 2)
    shares = alike = torch.eye(n, device=device).expand(parts, n, n, n)
    costs = cost[:, None].expand(-1, n, -1, -1)
    for sweep in range(niter):
        if sweep and n > 1:
            blocks, top = counts.topk(min(3, n))
            halves = [(a, b) for a, b in ((0, 1), (0, 2), (1, 2)) if b < n]
            parents = [top[..., half, None] for pair in halves for half in pair]
            pairs = torch.cat([wholes, torch.cat(parents, -1).view(parts, n, -1, 2)], 2)
            shares = (pairs[..., None] == inputs).float().mean(-2)
            alike = torch.eye(pairs.shape[2], device=device).repeat(parts, n, 1, 1)
            alike[..., n:, :n] = 1.5 * shares[..., n:, :]
            alike[..., :n, n:] = alike[..., n:, :n].mT
            absent = torch.cat([blocks[..., b, None] == 0 for _, b in halves], -1)
            bonus = torch.cat([torch.zeros_like(counts), HALF_BONUS - MAX_TERM * absent.float()], 2)
            costs = cost[:, None] @ shares.mT - bonus[..., None, :]
        for j in range(n):
            others = total - counts[:, j]
            load = (compatibility * others[:, None]).sum(2)
            over = (compatibility * (others * (load > tau))[:, None]).sum(2) if hard \
                else (load - tau).clamp(min=0)
            penalty = 2 * gamma * over + gamma * extra[:, j]
            unary = costs[:, j] + (shares[:, j] * penalty[:, None]).sum(2)[:, None]

            q = (unary * (-1 / steps[0][0])).softmax(2)
            for t, colour in steps:
                new = torch.baddbmm(unary, edges @ q, alike[:, j], beta=-1 / t, alpha=beta / t)
                q = new.softmax(2) if colour is None else torch.where(colour, new.softmax(2), q)
            best = q.argmax(2)[..., None].expand(-1, -1, 2)
            labels[:, j] = pairs[:, j].gather(1, best)
            counts[:, j] = 0
            counts[:, j].scatter_add_(1, labels[:, j].flatten(1), half_block)
            total = others + counts[:, j]
        if set_resolve and sweep == niter - 2:
            extra = _resolve(counts)
    return labels.view(parts, n, side, side, 2)


# ---- the whole of it

@torch.no_grad()
def label_parts(cost: Tensor, compatibility: Tensor, prior: Tensor, labels0: Tensor, *,
                beta: float = 0.32, gamma: float = 1.0, eta: float = 0.05, thres: float = 0.83,
                thres_type: str = "hard", set_resolve: bool = True, niter: int = 4,
                solver: str = "auto", threads: int = 1) -> Tensor:
    """Which inputs the blocks of each output show: labels (P, N, n, n, 2), P parts of N images.

    `cost` (P, N, n, n) and `compatibility` (P, N, N) of `cost_and_compatibility`; `prior` (P, N) is
    subtracted as eta·log(prior); `labels0` (P, N, n, n) integers in [0, N). beta, gamma and eta are
    divided by n², tau = thres·n². After niter - 1 sweeps over the outputs `set_resolve` parts those
    made of the same inputs. `solver`: "gco" (alpha-beta swaps on the CPU, `threads` of them),
    "device" (mean field on the tensors' device), "auto" (device on CUDA). ValueError for an unknown
    solver or thres_type.
    """
    if thres_type not in ("hard", "soft"):
        raise ValueError(f"thres_type is 'hard' or 'soft', not {thres_type!r}")
    if solver not in ("auto", "gco", "device"):
        raise ValueError(f"solver is 'auto', 'gco' or 'device', not {solver!r}")
    size = cost.shape[-1] ** 2
    cost = prior_cost(cost, prior, eta)
    terms = {"beta": beta / size, "gamma": gamma / size, "tau": thres * size,
             "hard": thres_type == "hard", "set_resolve": set_resolve, "niter": niter}
    labels0, compatibility = labels0.to(cost.device, non_blocking=True), compatibility.float()
    if solver == "device" or solver == "auto" and cost.is_cuda:
        with torch.autocast(cost.device.type, enabled=False):
            return _label_device(cost, compatibility, labels0, **terms)
    return _label_gco(cost, compatibility, labels0, threads=threads, **terms)


@torch.no_grad()
def blend(images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images (P, N, C, H, W) and targets (P, N, classes): blocks and their shares."""
    _, n, _, height, width = images.shape
    side = labels.shape[2]
    rows, columns = ((torch.arange(length, device=images.device) * side).div(
        length, rounding_mode="floor") for length in (height, width))
    pixels = labels[:, :, rows][:, :, :, columns][:, :, None].expand(*images.shape, 2)
    mixed = (images.gather(1, pixels[..., 0]) + images.gather(1, pixels[..., 1])) / 2
    shares = block_masks(labels, n).mean((2, 3))
    with torch.autocast(images.device.type, enabled=False):
        return mixed, shares @ targets.float()


def co_mix(images: Tensor, targets: Tensor, cost: Tensor, compatibility: Tensor, prior: Tensor,
           labels0: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Mixes one part: images (B, C, H, W) and targets (B, classes), one-hot or soft.

    `cost` (B, n, n), `compatibility` (B, B), `prior` (B,), `labels0` (B, n, n) and the options as
    in `label_parts`. Returns mixed images and soft targets (B, classes).
    """
    part = [t.to(images.device, non_blocking=True)[None]
            for t in (cost, compatibility, prior, labels0)]
    mixed, soft = blend(images[None], targets[None], label_parts(*part, **options))
    return mixed[0], soft[0]


def co_mix_batch(images: Tensor, targets: Tensor, saliency: Tensor, draws: CoMixDraws, *,
                 m_part: int = 20, omega: float = 0.001, **options) -> tuple[Tensor, Tensor]:
    """Mixes a batch in parts of `m_part` images, the last one smaller where it does not divide.

    `images` (B, C, H, W); `targets` (B, classes); `saliency` (B, H, W) >= 0, the gradient's root
    mean square over the channels; `draws` of `draw_comix` with the same m_part; the options as in
    `label_parts`. Returns mixed images and soft targets (B, classes).
    """
    mixed, soft = [], []
    whole = len(images) - len(images) % m_part
    for start, end, n in ((0, whole, m_part), (whole, len(images), len(images) - whole)):
        if start == end:
            continue
        image, target, sal, prior, labels0 = (
            t[start:end].to(images.device, non_blocking=True).unflatten(0, (-1, n))
            for t in (images, targets, saliency, draws.prior, draws.labels0))
        cost, compatibility = cost_and_compatibility(sal, draws.block_num, omega)
        labels = label_parts(cost, compatibility, prior, labels0, **options)
        x, t = blend(image, target, labels)
        mixed.append(x.flatten(0, 1))
        soft.append(t.flatten(0, 1))
    return torch.cat(mixed), torch.cat(soft)
