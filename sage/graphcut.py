"""Minimum-energy labellings of grids, for Puzzle Mix: by gco-wrapper on the CPU, as the paper does
(0.03 % above the optimum), or batched on the device (0.001 %)."""
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from common.errors import RunError
from common.precision import full_precision

try:
    from gco import GCO
except ImportError:            # gco-wrapper has few wheels
    GCO = None

MAX_TERM = 10**7               # gco ends the process at larger ones


def solve(unary: Tensor, weight_x: Tensor, weight_y: Tensor, *, solver="auto", threads=0) -> Tensor:
    """Return labels l (B, h, w) int64 of 0 .. L-1 that (nearly) minimize the sum over blocks of
    unary[l] (B, h, w, L) and over neighbours of weight * ((l - l') / (L-1))**2: weight_x
    (B, h-1, w) of vertical, weight_y (B, h, w-1) of horizontal ones; negative ones count as 0.
    solver: 'gco' (of so many threads), 'device' or 'auto' (gco on the CPU, if installed)."""
    terms = unary.float(), weight_x.float(), weight_y.float()
    if solver == "gco" or solver == "auto" and GCO and unary.device.type == "cpu":
        return _solve_by_gco(*terms, threads)
    return _solve_on_device(*terms)


def energy(labels: Tensor, unary: Tensor, weight_x: Tensor, weight_y: Tensor) -> Tensor:
    """Return the energy (B, ...) of labels (B, ..., h, w) under the terms of `solve`."""
    value = labels / (unary.shape[-1] - 1)
    data = unary.gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum((-2, -1))
    vertical = weight_x * value.diff(dim=-2).square()
    horizontal = weight_y * value.diff(dim=-1).square()
    return data + vertical.sum((-2, -1)) + horizontal.sum((-2, -1))


def neighbours(site: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of all edges of grids (..., h, w): the vertical ones, then the others."""
    first, second = (site[..., :-1, :], site[..., :-1]), (site[..., 1:, :], site[..., 1:])
    return tuple(np.concatenate([part.ravel() for part in ends]) for ends in (first, second))


def build_graph(unary: np.ndarray, site: np.ndarray, weights: np.ndarray, table: np.ndarray):
    """Return gco's graph of unary (sites, L), weights of `neighbours(site)` and a table (L, L).
    One thread at a time: gco keeps its graphs in one unguarded table."""
    if GCO is None:
        raise RunError("the solver gco needs gco-wrapper (pip install gco-wrapper: x86-64 Linux, "
                       "Python 3.10, 3.11); --solver device does without it")
    graph = GCO()
    graph.create_general_graph(*unary.shape)
    graph.set_data_cost(np.ascontiguousarray(unary))
    graph.set_all_neighbors(*neighbours(site), weights)
    graph.set_smooth_cost(table)
    return graph


@torch.compiler.disable
def _solve_by_gco(unary: Tensor, weight_x: Tensor, weight_y: Tensor, threads: int) -> Tensor:
    """Alpha-beta swap (Boykov et al. 2001) to convergence from all-zero labels, on 1000 h w times
    the terms, truncated as in the paper's code; (L-1)² makes label costs whole. What would overflow
    is cut off: such a block's label is beyond doubt."""
    images, height, width, num_labels = unary.shape
    squared, level = (num_labels - 1) ** 2, np.arange(num_labels)
    scale, most = 1000 * height * width, MAX_TERM // squared
    terms = [(term * scale).clamp(low, most).int().cpu().numpy()
             for term, low in ((unary, -most), (weight_x, 0), (weight_y, 0))]
    graphs = []
    for part in np.array_split(np.arange(images), min(max(threads, 1), images)):
        costs, *weights = (term[part] for term in terms)
        site = np.arange(len(part) * height * width).reshape(-1, height, width)
        graphs.append(build_graph(squared * costs.reshape(-1, num_labels), site,
                                  np.concatenate([weight.ravel() for weight in weights]),
                                  (level[:, None] - level) ** 2))
    with ThreadPoolExecutor(len(graphs)) as pool:
        list(pool.map(GCO.swap, graphs))                        # releases the GIL
    labels = np.concatenate([graph.get_labels() for graph in graphs])
    for graph in graphs:
        graph.destroy_graph()
    return torch.from_numpy(labels).view(images, height, width).long().to(unary.device)


RELAXATION, PENALTY, ITERATIONS = 1.9, 0.3, 24          # of ADMM


def _solve_on_device(unary: Tensor, weight_x: Tensor, weight_y: Tensor) -> Tensor:
    """A minimum cut, as the cost of two labels is convex (Ishikawa 2003); that is a linear program:
    ADMM on  min over x of  sum_e bound_e |A x - offset|_e, whose x is 0 or 1 at the optimum.
    x (B, h*w*(L-1)): is the label of this block above k? Neighbours cost the sum of |x_k - x'_m|
    over all pairs of thresholds k, m, plus unary terms: distances from 0 where they favour 0, from
    1 else. One iteration, in s = t - 2 clamp(t), is a single matrix product."""
    images, height, width, num_labels = unary.shape
    steps, size = num_labels - 1, height * width
    matrix, offset, step, inverse, slope = _lifted_grid(height, width, steps, unary.device)
    pad, x_side, y_side = torch.nn.functional.pad, weight_x.clamp(min=0), weight_y.clamp(min=0)
    weights = (pad(x_side, (0, 0, 1, 0)) + pad(x_side, (0, 0, 0, 1))
               + pad(y_side, (1, 0)) + pad(y_side, (0, 1)))                # at each block
    gain = torch.addcmul(unary.diff(dim=-1), weights.unsqueeze(-1), slope).flatten(1)  # of x_k = 1
    unit = (PENALTY * gain.abs().mean(1, keepdim=True)).clamp(min=1e-12)
    gain = gain / unit
    edges = torch.cat([x_side.flatten(1), y_side.flatten(1)], 1) / (unit * steps**2)
    ends = edges.repeat(1, steps**2), torch.cat([gain, -gain], 1).clamp(min=0)
    ordered = gain.new_zeros(images, size * (steps - 1))                    # x_k >= x_k+1
    free = gain.new_full((images, 1), torch.inf)
    high = torch.cat([ends[0], ordered, ends[1], free], 1)
    low = -torch.cat([ends[0], ordered + torch.inf, ends[1], free], 1)
    with full_precision(unary.device.type):
        alone = (gain < 0).float()                       # what each would take for itself
        total = torch.addmm(offset, alone, matrix.T, beta=-1)
        for _ in range(ITERATIONS):
            mirrored = torch.sub(total, total.clamp(low, high), alpha=2)
            total = torch.addmm(total, mirrored, step, beta=1 - RELAXATION / 2)
        x = (torch.sub(total, total.clamp(low, high), alpha=2) + offset) @ inverse.T
    # a cut at some threshold is at least as good as x itself (coarea formula)
    thresholds = torch.linspace(0.05, 0.95, 10, device=x.device).view(-1, 1, 1, 1)
    labels = (x.view(images, 1, height, width, steps) > thresholds).sum(-1)     # (B, 10, h, w)
    unary = unary[:, None].expand(-1, 10, -1, -1, -1)
    best = energy(labels, unary, weight_x[:, None], weight_y[:, None]).argmin(1)
    return labels[torch.arange(images, device=x.device), best]


@functools.cache
@torch.compiler.assume_constant_result
def _lifted_grid(height: int, width: int, steps: int, device) -> tuple[Tensor, ...]:
    """Return A, the offset, an iteration's matrix, A's pseudo-inverse, and what a neighbour's
    weight adds to the cost of each threshold. Rows of A: x along edges, x between thresholds, x
    twice (distances from 0 and from 1), and zeros that carry the iteration's constant term."""
    site = np.arange(height * width).reshape(height, width)
    first, second = neighbours(site)
    x = np.eye(height * width * steps).reshape(height * width, steps, -1)
    rows = [x[first, k] - x[second, m] for k in range(steps) for m in range(steps)]
    rows += [x[:, k] - x[:, k + 1] for k in range(steps - 1)] + [x.reshape(-1, x.shape[-1])] * 2
    matrix = np.concatenate([*rows, np.zeros((1, x.shape[-1]))])
    offset = (np.arange(len(matrix)) >= len(matrix) - 1 - x.shape[-1]).astype(float)
    inverse = np.linalg.solve(matrix.T @ matrix, matrix.T)
    step = RELAXATION * (matrix @ inverse)
    step[-1] = step @ offset - RELAXATION * offset
    step[-1, -1] = 0
    np.fill_diagonal(step, step.diagonal() - RELAXATION / 2)
    slope = np.diff(np.arange(steps + 1) * (np.arange(steps + 1) - steps)) / steps**2
    return tuple(torch.from_numpy(m).float().to(device, non_blocking=True)
                 for m in (matrix, offset, step, inverse, slope))
