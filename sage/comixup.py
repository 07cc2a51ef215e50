"""Co-Mixup (Kim et al., ICLR 2021): N outputs are put together from N images, block by block."""
import itertools
import math
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.mixing import Draws, check_floats, send
from common.precision import full_precision
from sage import graphcut, puzzlemix

HALF_BONUS = 5e-4                    # what a half-and-half block is cheaper than its parents' mean
# gco works on integers: unary terms, edge weights and the table of labels are scaled so
UNARY_SCALE, EDGE_SCALE, TABLE_SCALE = 100_000, 1000, 100
# Temperatures of the mean field, in units of the labels' smoothness; 2 × 2 blocks need more
TEMPERATURES, SLOWER = (0.5, 0.05, 0.01), (1, 0.6, 0.4, 0.25, 0.15, 0.08, 0.03, 0.01)
CoMixDraws = namedtuple("CoMixDraws", "block_num prior labels0")


def draw_comix(batch: int, generator: Draws = None, *, m_part: int = 20, block_num: int = 4,
               mixup_alpha: float = 2.0) -> CoMixDraws:
    """Return blocks a side n (`block_num` -1: 2, 4, 8 or 16), and of each part of N images the
    Dirichlet(mixup_alpha) prior (B,) and uniform initial labels (B, n, n) in [0, N), on the CPU."""
    if block_num == -1:
        block_num = 2 ** int(torch.randint(1, 5, (), generator=generator))
    priors, labels = [], []
    for n in map(len, torch.arange(batch).split(m_part)):
        concentration = torch.full((n,), mixup_alpha, dtype=torch.float64)
        priors.append(torch._sample_dirichlet(concentration, generator).float())
        labels.append(torch.randint(n, (n, block_num, block_num), generator=generator))
    return CoMixDraws(block_num, torch.cat(priors), torch.cat(labels))


@torch.no_grad()
def cost_and_compatibility(saliency: Tensor, block_num: int, omega: float = 0.001) -> tuple:
    """Return cost (..., N, n, n) and compatibility A (..., N, N) of parts of N images each.
    A block costs minus its share of `saliency` (..., N, H, W) >= 0. A = (1 - omega)·I + omega·N·D /
    sum(D), D the L1 distances, in pixels, between the images' most salient 8 × 8 windows."""
    *parts, height, width = saliency.shape
    maps = saliency.float().reshape(-1, 1, height, width)
    blocks = F.adaptive_avg_pool2d(maps, block_num).view(*parts, block_num, block_num)
    cost = -puzzlemix.shares(blocks)
    windows = F.avg_pool2d(maps, (min(8, height), 1), stride=1)
    windows = F.avg_pool2d(windows, (1, min(8, width)), stride=1)
    top = windows.flatten(1).argmax(1).view(parts)
    positions = torch.stack([top // windows.shape[-1], top % windows.shape[-1]], -1).float()
    distance = torch.cdist(positions, positions, p=1)
    share = distance * parts[-1] / distance.sum((-2, -1), keepdim=True).clamp(min=1)
    return cost, (1 - omega) * torch.eye(parts[-1], device=saliency.device) + omega * share


def prior_cost(cost: Tensor, prior: Tensor, eta: float) -> Tensor:
    """Return the cost (..., n, n) of inputs less eta/n²·log(prior (...))."""
    return cost.float() - eta / cost.shape[-1] ** 2 * (prior + 1e-8).log()[..., None, None]


def block_masks(labels: Tensor, inputs: int) -> Tensor:
    """Return masks (..., N, n, n, inputs), 0, 0.5 or 1, of labels (..., N, n, n, 2)."""
    return F.one_hot(labels, inputs).float().mean(-2)


def _resolve(counts: Tensor) -> Tensor:
    """Return the cost (P, N, N), 0 or 1, that parts two outputs of the same two or more inputs: one
    pays for their first common input, the other for the second."""
    used = (counts > 0).int()
    same = (used[:, :, None] == used[:, None]).all(-1) & (used.sum(-1) > 1)[..., None]
    first = used.argmax(-1, keepdim=True)
    second = used.scatter(-1, first, 0).argmax(-1, keepdim=True)
    pays = [same.triu(1).any(-1, keepdim=True), same.tril(-1).any(-1, keepdim=True)]
    extra = torch.zeros_like(counts).scatter_(-1, first, pays[0].float())
    return extra.scatter_add_(-1, second, pays[1].float())


def _best_labels(unary: np.ndarray, halves: list[tuple[int, int]], weight: int) -> np.ndarray:
    """Return one output's labels (n², 2): `unary` (n², N) an input's cost in each block, `halves`
    the pairs that may share one, `weight` of neighbours an integer."""
    size, n = unary.shape
    pairs = np.array([(i, i) for i in range(n)] + halves)
    if len(pairs) == 1:                                          # gco ends the process
        return pairs.repeat(size, 0)
    unary = unary[:, pairs].mean(2)
    unary[:, n:] -= HALF_BONUS
    if unary.max() * UNARY_SCALE > graphcut.MAX_TERM:            # only differences count
        unary = np.minimum(unary - unary.min(), graphcut.MAX_TERM / UNARY_SCALE)
    table = TABLE_SCALE * (1 - np.eye(len(pairs), dtype=np.intc))
    for half, parents in enumerate(halves, n):
        table[half, list(parents)] = table[list(parents), half] = TABLE_SCALE // 4
    site = np.arange(size).reshape(math.isqrt(size), -1)
    graph = graphcut.build_graph(unary * UNARY_SCALE, site,
                                 np.full(2 * (size - len(site)), weight), table)
    graph.swap()
    best = graph.get_labels()
    graph.destroy_graph()
    return pairs[best]


@torch.compiler.disable
def _label_gco(cost: Tensor, compatibility: Tensor, labels0: Tensor, *, beta: float, gamma: float,
               tau: float, hard: bool, set_resolve: bool, niter: int) -> Tensor:
    """Return labels (P, N, n, n, 2) by graph cuts, output by output, as the paper's program."""
    n = cost.shape[1]
    weight = min(int(np.float32(beta) * EDGE_SCALE), graphcut.MAX_TERM // TABLE_SCALE)
    labels = labels0.flatten(2)[..., None].repeat(1, 1, 1, 2).cpu()
    for unary, alike, part in zip(cost.flatten(2).mT.cpu().numpy(), compatibility.cpu().numpy(),
                                  labels.numpy(), strict=True):
        counts = np.array([np.bincount(row.ravel(), minlength=n) for row in part], np.float32) / 2
        extra = np.zeros_like(counts)
        for sweep in range(niter):
            before = part.copy()
            for j in range(n):
                others = counts.sum(0) - counts[j]
                load = alike @ others
                # The published program masks before A, not after: A·(others·[load > tau])
                over = alike @ (others * (load > tau)) if hard else np.maximum(load - tau, 0)
                penalty = np.float32(2 * gamma) * over + np.float32(gamma) * extra[j]
                used = torch.from_numpy(counts[j]).topk(min(3, np.count_nonzero(counts[j]))).indices
                halves = list(itertools.combinations(sorted(used.tolist()), 2)) if sweep else []
                part[j] = _best_labels(unary + penalty, halves, weight)
                counts[j] = np.bincount(part[j].ravel(), minlength=n) / 2
            if (part == before).all():
                break
            if set_resolve and sweep == niter - 2:
                extra = _resolve(torch.from_numpy(counts)[None])[0].numpy()
    return labels.view(*labels0.shape, 2).to(cost.device)


def _sweep_terms(counts: Tensor, cost: Tensor, eye: Tensor, limit: float):
    """Return, for N whole labels and halves of the three most used inputs (L in all), the halves'
    inputs (P, N, 3, 2), the inputs' shares (P, N, L, N), how alike labels are (P, N, L, L), and the
    labels' costs (P, N, n², L). `counts` (P, N, N), `cost` (P, n², N); `limit` bars unused ones."""
    parts, size, n = cost.shape
    blocks, top = counts.topk(min(3, n))
    usable = blocks.minimum(blocks.roll(1, -1)) > 0.25
    pairs = torch.stack([top, top.roll(1, -1)], -1)
    half = eye[:n, :n][pairs].mean(-2)
    wholes = eye[:n, :n].expand(parts, n, n, n)
    other = eye[n:, n:].expand(parts, n, -1, -1)
    near = 1.5 * half                                                # 0.75 of a half's parents
    alike = torch.cat([torch.cat([wholes, near.mT], 3), torch.cat([near, other], 3)], 2)
    halves = (cost @ half.flatten(1, 2).mT).view(parts, size, n, -1).transpose(1, 2)
    halves = torch.where(usable[:, :, None], halves - HALF_BONUS / graphcut.MAX_TERM * limit, limit)
    costs = torch.cat([cost[:, None].expand(-1, n, -1, -1), halves], 3)
    return pairs, torch.cat([wholes, half], 2), alike, costs


def _label_device(cost: Tensor, compatibility: Tensor, labels0: Tensor, *, beta: float,
                  gamma: float, tau: float, hard: bool, set_resolve: bool, niter: int) -> Tensor:
    """Return labels (P, N, n, n, 2) by mean field: the beliefs q (P, n², L) of one output change at
    falling temperatures; the last one makes them almost certain: their sums count the blocks."""
    parts, n, side, _ = cost.shape
    device, size = cost.device, side * side
    site, inputs = torch.arange(size, device=device), torch.arange(n, device=device)
    y, x = site // side, site % side
    edges = ((y[:, None] - y).abs() + (x[:, None] - x).abs() == 1).float().expand(parts, -1, -1)
    # At first a block heeds the whole grid as well, so that one label can win it at once
    wide = (edges + edges.mean(2, keepdim=True)) / 2
    ones, eye = torch.ones_like(edges), torch.eye(n + min(3, n), device=device)
    unit = max(beta, 1e-4)
    first, *falling = (unit * t for t in (TEMPERATURES if side > 2 else SLOWER))
    limit = graphcut.MAX_TERM / -first
    cost = cost.flatten(2).mT / -first                                   # logits, (P, n², N)
    counts = (labels0.flatten(2)[..., None] == inputs).float().sum(2)    # (P, N, N)
    shares = alike = wholes = eye[:n, :n].expand(parts, n, n, n)
    costs, pairs = cost[:, None].expand(-1, n, -1, -1), inputs[:, None].expand(parts, n, -1, 2)
    # Blocks of the inputs to blocks, to A times blocks, and to the penalty of labels
    weigh = (compatibility if hard else wholes[:, 0]) * (-2 * gamma / first)
    tables = torch.cat([wholes[:, 0], compatibility.mT, weigh.expand(parts, -1, -1)], 2)
    for sweep in range(niter):
        if sweep:
            halves, shares, alike, costs = _sweep_terms(counts, cost, eye, limit)
        if sweep == niter - 1 and sweep and set_resolve:
            extra = _resolve(counts * (counts > 0.25))[..., None]
            costs = costs - gamma / first * (shares @ extra).mT
        adds, weigh = (shares.flatten(1, 2) @ tables).view(parts, n, -1, 3 * n).split(2 * n, 3)
        # The blocks, and A times the blocks, of each output and of all; a row for each block
        own = (counts @ tables[..., :2 * n])[:, :, None].expand(-1, -1, size, -1)
        total, found = own.sum(1), []
        for j in range(n):
            others = total - own[:, j]
            blocks, load = others.chunk(2, 2)
            over = blocks * (load > tau) if hard else (load - tau).clamp(min=0)
            logits = torch.baddbmm(costs[:, j], over, weigh[:, j].mT)
            q = logits.softmax(2)
            for t, near in zip(falling, [wide, *[edges] * len(falling)], strict=False):
                field = q @ alike[:, j] if sweep else q
                q = torch.baddbmm(logits, near, field, beta=first / t, alpha=beta / t).softmax(2)
            total = torch.baddbmm(others, ones @ q, adds[:, j])
            found.append(q)
        q = torch.stack(found, 1)
        counts = (q.sum(2, keepdim=True) @ shares)[:, :, 0]
    best = q.argmax(3)[..., None].expand(-1, -1, -1, 2)
    pairs = torch.cat([pairs, halves], 2) if niter > 1 else pairs
    return pairs.gather(2, best).view(parts, n, side, side, 2)


@torch.no_grad()
def label_parts(cost: Tensor, compatibility: Tensor, prior: Tensor, labels0: Tensor, *,
                beta: float = 0.32, gamma: float = 1.0, eta: float = 0.05, thres: float = 0.83,
                thres_type: str = "hard", set_resolve: bool = True, niter: int = 4,
                solver: str = "auto") -> Tensor:
    """Return the inputs that the blocks of each output of P parts of N images show: labels
    (P, N, n, n, 2), two inputs half and half, or twice the same.
    `cost` (P, N, n, n) and `compatibility` A (P, N, N) of `cost_and_compatibility`, `prior` (P, N),
    `labels0` (P, N, n, n) in [0, N). Blocks prefer salient inputs and their neighbours' (beta/n²),
    outputs those that the others leave alone (gamma/n², once A times their blocks exceeds
    thres·n²); before the last of niter sweeps `set_resolve` parts outputs of the same inputs.
    `solver`: "device" or "auto" (mean field), "gco" (alpha-beta swaps, the paper's own, slower)."""
    size = cost.shape[-1] ** 2
    cost = prior_cost(cost, prior, eta)
    terms = {"beta": beta / size, "gamma": gamma / size, "tau": thres * size,
             "hard": thres_type == "hard", "set_resolve": set_resolve, "niter": niter}
    labels0, compatibility = labels0.to(cost.device, non_blocking=True), compatibility.float()
    if solver == "gco":
        return _label_gco(cost, compatibility, labels0, **terms)
    with full_precision(cost.device.type):
        return _label_device(cost, compatibility, labels0, **terms)


@torch.no_grad()
def blend(images: Tensor, targets: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mixed images (P, N, C, H, W) and targets (P, N, classes): blocks and their shares."""
    check_floats(images)
    _, n, _, height, width = images.shape
    side = labels.shape[2]
    rows, columns = (torch.arange(s, device=images.device) * side // s for s in (height, width))
    pixels = labels[:, :, rows[:, None], columns][:, :, None].expand(*images.shape, 2)
    mixed = (images.gather(1, pixels[..., 0]) + images.gather(1, pixels[..., 1])) / 2
    shares = block_masks(labels, n).mean((2, 3))
    with full_precision(images.device.type):
        return mixed, shares @ targets.float()


def co_mix_batch(images: Tensor, targets: Tensor, saliency: Tensor, draws: CoMixDraws, *,
                 m_part: int = 20, omega: float = 0.001, parallel: bool = True, **options) -> tuple:
    """Return images (B, C, H, W) and targets (B, classes) mixed in parts of `m_part` images, all
    parts of one size at once if `parallel`. `saliency` (B, H, W); `draws` of `draw_comix` with the
    same m_part; options as in `label_parts`."""
    at_once = len(images) // m_part * m_part if parallel else m_part
    sent = [send(t, images.device) for t in (draws.prior, draws.labels0)]
    batch = [t.to(images.device, non_blocking=True).split(at_once or len(images))
             for t in (images, targets, saliency, *sent)]
    results = []
    for together in zip(*batch, strict=True):
        image, target, sal, prior, labels0 = (
            t.unflatten(0, (-1, min(m_part, len(t)))) for t in together)
        cost, compatibility = cost_and_compatibility(sal, draws.block_num, omega)
        labels = label_parts(cost, compatibility, prior, labels0, **options)
        results.append([t.flatten(0, 1) for t in blend(image, target, labels)])
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
