"""Puzzle Mix (Kim, Choo & Song, ICML 2020): blocks go to the image that is salient there
(`puzzle_mask`), and each image moves its salient blocks into what it owns (`apply_mask`)."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import RunError
from common.mixing import Draws, check_floats, send
from sage import graphcut


def gradient_magnitude(grad: Tensor) -> Tensor:
    """Return the saliency (B, H, W): root mean square over channels of the input gradient."""
    return grad.float().square().mean(1).sqrt()


def draw_block_num(generator: Draws = None, sides: tuple[int, ...] = ()) -> int:
    """Return blocks a side: 2, 4, 8 or 16, of these what divides all `sides` (pixels)."""
    choices = [n for n in (2, 4, 8, 16) if not any(side % n for side in sides)]
    if not choices:
        raise RunError(f"Puzzle Mix: images of {'×'.join(map(str, sides))} pixels cannot be halved")
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def draw_noise(images: Tensor, adv_p: float, adv_eps: float, generator: Draws = None, *, mean, std):
    """Return the images (B, C, H, W) of the saliency pass, with noise of radius adv_eps / 255 for
    the first and for the second ones with probability adv_p each, and a function of their gradient
    that returns the keyword arguments `noise` and `noisy` of `puzzle_mix`."""
    noisy = tuple((torch.rand(2, generator=generator) < adv_p).tolist())
    if not any(noisy):
        return images, lambda grad: {}
    radius = adv_eps / 255
    start = (2 * torch.rand(images.shape, generator=generator) - 1) * radius
    length = float(torch.rand((), generator=generator))
    mean, std = _per_channel(mean, images), _per_channel(std, images)
    pixels = images * std + mean
    attacked = (pixels + send(start, images.device)).clamp(0, 1)

    def adversary(grad: Tensor) -> dict:
        step = (adv_eps + 2) / 255 * grad.sign()
        noise = (attacked - pixels + step).clamp(-radius, radius) * length
        return {"noise": noise, "noisy": noisy}
    return (attacked - mean) / std, adversary


def puzzle_mix(images: Tensor, saliency: Tensor, perm: Tensor, lam: Tensor | float, block_num: int,
               *, transport: bool = True, t_eps: float = 0.8, t_size: int = 4, mean, std,
               noise: Tensor | None = None, noisy=(True, True), **options) -> tuple[Tensor, Tensor]:
    """Return image i mixed with image perm[i] (B, C, H, W), and ratio (B,), the mask's mean.
    images normalised by mean and std; saliency (B, H, W) >= 0; lam: the first image's share a
    priori, one or (B,); block_num: blocks a side, divides both sides. transport: move blocks of
    t_size pixels (or the next more that divides the mask's; -1: these) at a cost of
    t_eps·distance². noise (B, C, H, W) is added to
    [0, 1] pixels of the first and / or second images (`noisy`). options: of `puzzle_mask`."""
    mask = puzzle_mask(images, saliency, perm, lam, block_num, std=std, **options)
    return apply_mask(images, saliency, perm, mask, transport=transport, t_eps=t_eps,
                      t_size=t_size, mean=mean, std=std, noise=noise, noisy=noisy)


@torch.no_grad()
def puzzle_mask(images: Tensor, saliency: Tensor, perm: Tensor, lam: Tensor | float,
                block_num: int, *, beta: float = 1.2, gamma: float = 0.5, eta: float = 0.2,
                n_labels: int = 3, neigh_size: int = 4, std, solver: str = "auto",
                threads: int = 0) -> Tensor:
    """Return the mask (B, n, n) in [0, 1], 1 for the first image; arguments as in `puzzle_mix`.
    beta, gamma, eta: weights of label smoothness, of colour steps and of the prior; n_labels: mask
    levels; neigh_size: side of the colour cells in pixels; solver, threads: of `graphcut.solve`."""
    terms = graph_terms(images, saliency, perm, block_num, beta=beta, gamma=gamma,
                        neigh_size=neigh_size, std=std)
    terms = label_terms(*terms, lam, beta=beta, eta=eta, n_labels=n_labels)
    return 1 - graphcut.solve(*terms, solver=solver, threads=threads) / (n_labels - 1)


@torch.no_grad()
def apply_mask(images: Tensor, saliency: Tensor, perm: Tensor, mask: Tensor, *,
               transport: bool = True, t_eps: float = 0.8, t_size: int = 4, mean, std,
               noise: Tensor | None = None, noisy=(True, True)) -> tuple[Tensor, Tensor]:
    """Mix by a mask (B, n, n) in [0, 1]; arguments and results as in `puzzle_mix`."""
    perm = perm.to(images.device, non_blocking=True)
    first = second = images
    if noise is not None:
        mean, std = _per_channel(mean, images), _per_channel(std, images)
        attacked = ((images * std + mean + noise).clamp(0, 1) - mean) / std
        first, second = (attacked if chosen else images for chosen in noisy)
    second = second[perm]
    if transport:
        blocks = [side // mask.shape[1] for side in images.shape[-2:]]
        cells = [next(side for side in range(min(t_size, block) if t_size > 0 else block, block + 1)
                      if block % side == 0) for block in blocks]        # smaller ones: (H·W)² costs
        mass = shares(F.avg_pool2d(saliency.float(), cells))
        fine = _upsample(mask, mass)
        plans = transport_plan(torch.cat([fine, 1 - fine]), torch.cat([mass, mass[perm]]), t_eps)
        first, second = _move(torch.cat([first, second]), plans, cells).chunk(2)
    weight = _upsample(mask, images).unsqueeze(1).to(images.dtype)
    return torch.lerp(second, first, weight), mask.flatten(1).mean(1)


def graph_terms(images: Tensor, saliency: Tensor, perm: Tensor, block_num: int, *, beta: float,
                gamma: float, neigh_size: int, std) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the cost (B, n, n) of giving a block to the first and to the second image, and what
    the colours add to the weight of vertical (B, n-1, n) and horizontal (B, n, n-1) neighbours. A
    colour step along the border of two blocks depends on both owners: it is split into costs of the
    blocks and a weight of their disagreement."""
    check_floats(images)
    if block_num < 2 or images.shape[-2] % block_num or images.shape[-1] % block_num:
        raise ValueError(f"block_num {block_num} does not divide images of "
                         f"{images.shape[-2]}x{images.shape[-1]} pixels")
    perm = perm.to(images.device, non_blocking=True)
    blocks = [side // block_num for side in images.shape[-2:]]
    cells = [_gcd(min(neigh_size, block), block) for block in blocks]
    mass = shares(F.avg_pool2d(saliency.float(), blocks))
    costs = torch.stack([mass[perm], mass])              # taking one image loses the other's mass
    scale = beta * gamma / (block_num * 16)
    colours = F.avg_pool2d(images, cells) * _per_channel([value * scale for value in std], images)
    colours = torch.stack([colours, colours[perm]])
    vertical = _colour_steps(colours, blocks[0] // cells[0], block_num)
    horizontal = _colour_steps(colours.mT, blocks[1] // cells[1], block_num)
    weights = []
    for steps, cost in ((vertical, costs), (horizontal, costs.mT)):
        cost[:, :, :-1] += steps.mean(1)                 # whoever owns the block below
        cost[:, :, 1:] += steps.mean(0)
        weights.append(steps.diff(dim=0).diff(dim=1)[0, 0] / -2)
    return *costs, weights[0], weights[1].mT


def label_terms(to_first: Tensor, to_second: Tensor, weight_x: Tensor, weight_y: Tensor, lam, *,
                beta: float, eta: float, n_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the terms of `graphcut.solve`: label l is a share of 1 - l/(n_labels-1) for the first
    image, a priori binomial with mean lam (one or (B,))."""
    n, steps = to_first.shape[1], n_labels - 1
    lam = torch.as_tensor(lam, dtype=torch.float32)[..., None]         # where it was drawn
    level = torch.arange(n_labels, device=lam.device)
    ways = torch.tensor([math.comb(steps, k) for k in range(n_labels)])
    likelihood = ways.to(lam.device, non_blocking=True) * lam**(steps - level) * (1 - lam)**level
    prior = (-eta / n**2 * torch.log(likelihood + 1e-8)).to(to_first.device, non_blocking=True)
    share = torch.arange(n_labels, device=to_first.device) / steps
    unary = torch.lerp(to_first.unsqueeze(-1), to_second.unsqueeze(-1), share)
    smooth = beta / (n * 16)
    return unary + prior.view(-1, 1, 1, n_labels), weight_x + smooth, weight_y + smooth


def _colour_steps(colours: Tensor, cells: int, n: int) -> Tensor:
    """Return colour differences (image above, image below, B, n-1, n) across the borders of blocks
    `cells` rows high, of colours (2, B, C, h, w) of the first and the second images."""
    above, below = colours[..., cells - 1:-1:cells, :], colours[..., cells::cells, :]
    steps = (above[:, None] - below[None]).abs().mean(3)
    return steps.unflatten(-1, (n, -1)).mean(-1)


def shares(maps: Tensor) -> Tensor:
    """Return maps (..., h, w) >= 0 of sum 1: uniform where theirs is zero or not finite."""
    total = maps.sum((-2, -1), keepdim=True)
    usable = (total > 0) & (total < torch.inf)
    return torch.where(usable, maps / total, 1 / (maps.shape[-2] * maps.shape[-1]))


@torch.no_grad()
def transport_plan(mask: Tensor, saliency: Tensor, t_eps: float = 0.8) -> Tensor:
    """Return the block (B, h*w) that each position of an image gets by masked transport.
    mask (B, h, w): positive where the image is seen; saliency (B, h, w), sums to 1 per image.
    Each block prefers the seen position where t_eps * distance**2 (the grid's sides being 1) minus
    its saliency is least, if negative. max(h, w) rounds: every block proposes to the best position
    that has not refused it, every position keeps its best proposer, or else its own block."""
    size = mask[0].numel()
    down, right = (torch.arange(side, device=mask.device) for side in mask.shape[1:])
    down, right = ((d[:, None] - d).square() * (t_eps / max(len(d) - 1, 1) ** 2)
                   for d in (down, right))
    distance = (down[:, None, :, None] + right[None, :, None, :]).reshape(size, size)
    plans = []
    limit = max(1, 2**26 // size**2)                  # images at once: 256 MiB of costs
    for seen, gain in zip((mask > 0).split(limit), saliency.split(limit), strict=True):
        if mask.device.type == "cpu":
            image, block = _bidders(seen, gain, down, right).nonzero(as_tuple=True)
        else:       # all, as their number would halt the device
            block = torch.arange(gain.numel(), device=mask.device)
            image, block = block // size, block % size
        plans.append(_propose(seen, gain, distance, image, block))
    return torch.cat(plans)


def _bidders(seen: Tensor, gain: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Return which blocks (B, h*w) could win a position from its own block; mostly none, and few
    otherwise: nothing moves in an image unless a block from a position not seen does."""
    def cheapest(price, step):          # min over i of price (B, i, .) + step (i, j): (B, j, .)
        return (price.unsqueeze(2) + step.unsqueeze(2)).amin(1)

    def no_stay(step):
        return step.clone().fill_diagonal_(torch.inf)

    price = torch.where(seen, gain, torch.inf)
    elsewhere = torch.minimum(cheapest(cheapest(price, down).mT.contiguous(), no_stay(right)).mT,
                              cheapest(price, no_stay(down)))
    wins = elsewhere <= gain + 1e-6                      # rounding: saliencies sum to 1
    return (wins & (wins & ~seen).any((1, 2), keepdim=True)).flatten(1)


def _propose(seen: Tensor, gain: Tensor, distance: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """Rounds of `transport_plan`, of the bidders block[k] of image[k]. A bid and its bidder are one
    integer: the bits of a float above 0 grow with it, and the lesser block wins among equals."""
    rounds, size = max(gain.shape[1:]), len(distance)
    seen, gain = seen.flatten(1), gain.flatten(1)
    bids = gain[image, block].unsqueeze(1) - distance[block]
    unwanted = ~seen[image] | (bids <= 0)

    def key(bid, block):
        return bid.view(torch.int32).long() * size + (size - 1 - block)

    bids = key(bids, block.unsqueeze(1)).masked_fill_(unwanted, -1)
    own = torch.arange(size, device=gain.device)
    best = key(gain.contiguous(), own).flatten()                # a position's own block bids, too
    start = image * size
    for _ in range(rounds):
        bid, choice = bids.max(1)
        target = choice + start
        best = best.scatter_reduce(0, target, bid, "amax")
        accepted = bid.masked_fill(best[target] != bid, -1)
        bids.scatter_(1, choice.unsqueeze(1), accepted.unsqueeze(1))
    return (size - 1 - best % size).view_as(gain)


def _move(images: Tensor, plan: Tensor, cells) -> Tensor:
    """Return the images with the i-th block of `cells` pixels replaced by block plan[i]."""
    height, width = images.shape[-2:]
    pixels = torch.arange(height * width, device=images.device).view(height, width)
    corners, inside = pixels[::cells[0], ::cells[1]], pixels[:cells[0], :cells[1]]
    source = corners.flatten()[plan].view(len(images), *corners.shape)
    source = (source[:, :, None, :, None] + inside[:, None]).flatten(1).unsqueeze(1)
    return images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)


def _gcd(a: int, b: int) -> int:
    while b:                                     # dynamo does not trace math.gcd of changing sizes
        a, b = b, a % b
    return a


def _upsample(mask: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(mask.unsqueeze(1), like.shape[-2:], mode="nearest-exact").squeeze(1)


def _per_channel(values, images: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=images.dtype)
    return values.to(images.device, non_blocking=True).view(-1, 1, 1)
