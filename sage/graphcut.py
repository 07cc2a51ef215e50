"""Minimum-energy labellings of grids, for Puzzle Mix.

Puzzle Mix (Kim, Choo & Song, ICML 2020) gives every block of a grid a label l of 0 .. L-1 so that

    sum over blocks of unary[l] + sum over neighbours of weight * ((l - l') / (L-1))**2

is least. `solve` does this for a batch in one of two ways:

gco     alpha-beta swap by gco-wrapper on the CPU, which the paper's own results were made with.
        Images share no edge, so a batch is one graph, or one for each thread.
device  tensor operations without host synchronisation. The cost of two labels is convex, so the
        problem is a minimum cut with a binary variable for each block and threshold (Ishikawa,
        2003); a cut is a linear program, which ADMM solves, and the best of a few thresholds of
        its solution is taken. 60 iterations end 0.001 % above the optimum, gco 0.08 % above it.
"""
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from gco import GCO
from torch import Tensor

MAX_TERM = 10**7               # gco ends the process at larger ones


def solve(unary: Tensor, weight_x: Tensor, weight_y: Tensor, *, solver: str = "auto",
          threads: int = 0) -> Tensor:
    """Label grids of blocks with (nearly) the least energy.

    unary (B, h, w, L): cost of every label; weight_x (B, h-1, w) and weight_y (B, h, w-1):
    weights of vertical and horizontal neighbours, negative ones count as 0. solver: 'gco', 'device'
    or 'auto' (device on an accelerator, gco on the CPU). threads: of gco, 0 is none beside the
    caller's. Returns labels (B, h, w) int64. Raises ValueError for another solver.
    """
    if solver not in ("auto", "gco", "device"):
        raise ValueError(f"solver must be auto, gco or device, not {solver!r}")
    terms = unary.detach().float(), weight_x.detach().float(), weight_y.detach().float()
    if solver == "device" or solver == "auto" and unary.device.type != "cpu":
        return _solve_on_device(*terms)
    return _solve_by_gco(*terms, threads=threads)


def energy(labels: Tensor, unary: Tensor, weight_x: Tensor, weight_y: Tensor) -> Tensor:
    """Energy (B,) of labels (B, h, w) under the terms of `solve`."""
    value = labels / (unary.shape[-1] - 1)
    data = unary.gather(-1, labels.unsqueeze(-1)).flatten(1).sum(1)
    vertical = weight_x * (value[:, 1:] - value[:, :-1]) ** 2
    horizontal = weight_y * (value[:, :, 1:] - value[:, :, :-1]) ** 2
    return data + vertical.flatten(1).sum(1) + horizontal.flatten(1).sum(1)


# ---------------------------------------------------------------------------------- gco

def _integer_terms(unary, weight_x, weight_y) -> list[Tensor]:
    """1000 h w times the terms, truncated as in the paper's code; (L-1)^2 makes label costs whole.

    Where that would overflow it is cut off: such a block's label is beyond doubt.
    """
    squared = (unary.shape[-1] - 1) ** 2
    scale, most = 1000 * unary[0, ..., 0].numel(), MAX_TERM // squared
    unary, *weights = ((term * scale).clamp(-most, most).int()
                       for term in (unary, weight_x, weight_y))
    return [unary * squared, *(weight.clamp(min=0) for weight in weights)]


def _solve_by_gco(*terms, threads: int) -> Tensor:
    """Alpha-beta swap (Boykov et al. 2001) to convergence from all-zero labels.

    To be called by one thread at a time: gco keeps its graphs in one unguarded table.
    """
    device = terms[0].device
    unary, weight_x, weight_y = (term.cpu().numpy() for term in _integer_terms(*terms))
    images, height, width, num_labels = unary.shape
    level = np.arange(num_labels)
    cuts = []
    for part in np.array_split(np.arange(images), min(max(threads, 1), images)):
        site = np.arange(len(part) * height * width).reshape(-1, height, width)
        cut = GCO()
        cut.create_general_graph(site.size, num_labels)
        cut.set_data_cost(unary[part].reshape(-1, num_labels))
        cut.set_all_neighbors(np.concatenate([site[:, :-1].ravel(), site[:, :, :-1].ravel()]),
                              np.concatenate([site[:, 1:].ravel(), site[:, :, 1:].ravel()]),
                              np.concatenate([weight_x[part].ravel(), weight_y[part].ravel()]))
        cut.set_smooth_cost((level[:, None] - level) ** 2)
        cuts.append(cut)
    list((map if len(cuts) < 2 else _pool(threads).map)(GCO.swap, cuts))    # releases the GIL
    labels = np.concatenate([cut.get_labels() for cut in cuts])
    for cut in cuts:
        cut.destroy_graph()
    return torch.from_numpy(labels).view(images, height, width).long().to(device)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


# ------------------------------------------------------------------------------- device

def _solve_on_device(unary, weight_x, weight_y, iterations=60, penalty=0.2, relaxation=1.6):
    """ADMM on  min over x of  sum_e bound_e |A x - offset|_e, whose x is 0 or 1 at the optimum.

    x (B, h*w*(L-1)): is the label of this block above k? The quadratic cost of neighbours is the
    sum of |x_k - x'_m| over all pairs of thresholds k, m, plus unary terms.
    """
    images, height, width, num_labels = unary.shape
    steps = num_labels - 1
    matrix, inverse = _lifted_grid(height, width, steps, unary.device)
    weight_x, weight_y = weight_x.clamp(min=0), weight_y.clamp(min=0)
    pad = torch.nn.functional.pad
    weights = (pad(weight_x, (0, 0, 1, 0)) + pad(weight_x, (0, 0, 0, 1))
               + pad(weight_y, (1, 0)) + pad(weight_y, (0, 1))).unsqueeze(-1) / steps**2
    level = torch.arange(num_labels, device=unary.device)
    gain = (unary + weights * level * (level - steps)).diff(dim=-1).flatten(1)  # cost of x_k = 1
    edges = torch.cat([weight_x.flatten(1), weight_y.flatten(1)], 1).repeat(1, steps**2) / steps**2
    scale = 1 / (penalty * gain.abs().mean(1, keepdim=True)).clamp(min=1e-12)
    edges, alone = edges * scale, gain.abs() * scale
    ordered = gain.new_full((images, height * width * (steps - 1)), torch.inf)  # x_k >= x_k+1
    high = torch.cat([edges, torch.zeros_like(ordered), alone], 1)
    low = torch.cat([-edges, -ordered, -alone], 1)
    x = (gain < 0).float()                              # the value each would take for itself
    offset = pad(x, (high.shape[1] - x.shape[1], 0))
    dual, split = torch.zeros_like(offset), torch.zeros_like(offset)
    with torch.autocast(unary.device.type, enabled=False):
        for _ in range(iterations):
            total = dual + torch.lerp(split, x @ matrix.T - offset, relaxation)
            dual = total.clamp(low, high)
            split = total - dual
            x = (split - dual + offset) @ inverse.T
    # a cut at some threshold is at least as good as x itself (coarea formula)
    thresholds = torch.linspace(0.05, 0.95, 10, device=x.device)
    x = x.view(images, 1, height, width, steps)
    labels = (x > thresholds.view(-1, 1, 1, 1)).sum(-1)             # (B, 10, h, w)
    terms = (term.repeat_interleave(10, 0) for term in (unary, weight_x, weight_y))
    best = energy(labels.flatten(0, 1), *terms).view(images, -1).argmin(1)
    return labels[torch.arange(images, device=x.device), best]


@functools.cache
def _lifted_grid(height: int, width: int, steps: int, device) -> tuple[Tensor, Tensor]:
    """Matrix of x along edges, of x between thresholds, and of x itself; its pseudo-inverse."""
    site = np.arange(height * width).reshape(height, width)
    first = np.concatenate([site[:-1].ravel(), site[:, :-1].ravel()])
    second = np.concatenate([site[1:].ravel(), site[:, 1:].ravel()])
    x = np.eye(height * width * steps).reshape(height * width, steps, -1)
    rows = [x[first, k] - x[second, m] for k in range(steps) for m in range(steps)]
    rows += [x[:, k] - x[:, k + 1] for k in range(steps - 1)] + [x.reshape(-1, x.shape[-1])]
    matrix = np.concatenate(rows)
    inverse = np.linalg.solve(matrix.T @ matrix, matrix.T)
    return tuple(torch.from_numpy(m).float().to(device) for m in (matrix, inverse))
