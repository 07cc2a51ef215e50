"""Co-Mixup against golden vectors, its solvers against each other, and its borders."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, golden_cases

from sage import comixup
from sage.comixup import (
    blend,
    block_masks,
    co_mix_batch,
    cost_and_compatibility,
    draw_comix,
    label_parts,
    prior_cost,
)


def options(case):
    numbers = {name: float(case[name]) for name in ("beta", "gamma", "eta", "thres")}
    return numbers | {"thres_type": str(case["thres_type"]), "niter": int(case["niter"]),
                      "set_resolve": bool(case["set_resolve"])}


def part(case, device):
    return [case.tensor(name, device) for name in ("cost_in", "A", "dirichlet", "init_idx")]


def co_mix(images, targets, *terms, **options):
    """One part of a batch, as co_mix_batch mixes many."""
    terms = (term.to(images.device)[None] for term in terms)
    mixed, soft = blend(images[None], targets[None], label_parts(*terms, **options))
    return mixed[0], soft[0]


def objective(labels: torch.Tensor, cost: torch.Tensor, *, beta: float = 0.32, gamma: float = 1.0,
              thres: float = 0.83) -> tuple[torch.Tensor, torch.Tensor]:
    """What the labelling is judged by, for each part (P,): without and with the threshold.

    `labels` (P, N, n, n, 2); `cost` (P, N, n, n), the prior subtracted. sum(cost·z) +
    beta/2·sum(|z - z_neighbour|²) + gamma·sum_j(c_j·d_j), beta and gamma over n²; c_j are output
    j's blocks of each input, d_j the others', in the second value only where above thres·n².
    """
    size = cost.shape[-1] ** 2
    z = block_masks(labels, cost.shape[1])
    smooth = z.diff(dim=2).square().sum((1, 2, 3, 4)) + z.diff(dim=3).square().sum((1, 2, 3, 4))
    linear = torch.einsum("pjyxi,piyx->p", z, cost) + beta / size / 2 * smooth
    counts = z.sum((2, 3))
    others = counts.sum(1, keepdim=True) - counts
    above = others * (others > thres * size)
    return tuple(linear + gamma / size * (counts * d).sum((1, 2)) for d in (others, above))


def random_parts(parts, n, side, seed=0, device="cpu"):
    """Cost, compatibility, prior and labels0 of parts with smooth, peaked saliency."""
    generator = torch.Generator().manual_seed(seed)
    field = F.interpolate(torch.rand(parts, n, 6, 6, generator=generator), 32, mode="bilinear")
    draws = draw_comix(parts * n, generator, m_part=n, block_num=side)
    cost, compatibility = cost_and_compatibility(field ** 3, side)
    return [t.to(device) for t in (cost, compatibility, draws.prior.view(parts, n),
                                   draws.labels0.view(parts, n, side, side))]


@pytest.mark.parametrize("path", golden_cases("sage", "comix_"))
def test_graph_cuts_give_the_original_masks(path, device):
    pytest.importorskip("gco")
    case = Golden(path)
    cost, compatibility = cost_and_compatibility(case.tensor("sc", device), int(case["block_num"]),
                                                 float(case["omega"]))
    torch.testing.assert_close(cost.cpu(), case.tensor("cost_in"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compatibility.cpu(), case.tensor("A"), rtol=1e-4, atol=1e-5)

    terms, solved = part(case, device), {"solver": "gco", **options(case)}
    labels = label_parts(*(t[None] for t in terms), **solved)
    assert torch.equal(block_masks(labels, len(case["x"]))[0].cpu(), case.tensor("mask"))
    cost = prior_cost(terms[0], terms[2], float(case["eta"]))
    torch.testing.assert_close(cost.cpu(), case.tensor("cost_after_prior"), rtol=1e-4, atol=1e-5)
    weights = {name: float(case[name]) for name in ("beta", "gamma", "thres")}
    values = [float(v) for v in objective(labels, cost[None], **weights)]
    assert values == pytest.approx([float(case["obj"]), float(case["obj_thres"])], rel=1e-4)
    first = terms[3][None, ..., None].expand(-1, -1, -1, -1, 2)
    assert float(objective(first, cost[None], **weights)[0]) == pytest.approx(
        float(case["obj_init"]), rel=1e-4)

    targets = F.one_hot(case.tensor("y", device), 100).float()
    mixed, soft = co_mix(case.tensor("x", device), targets, *terms, **solved)
    torch.testing.assert_close(mixed.cpu(), case.tensor("mixed"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(soft.cpu(), case.tensor("target"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["gco", "device"])
def test_parts_do_not_interact(solver):
    cost, compatibility, prior, labels0 = problem = random_parts(5, 12, 4)
    labels = label_parts(*problem, solver=solver)
    alone = label_parts(*(t[3:4] for t in problem), solver=solver)
    assert torch.equal(alone[0], labels[3])
    images, targets = torch.randn(30, 3, 32, 32), torch.eye(30)
    draws = draw_comix(30, torch.Generator().manual_seed(0), m_part=8)
    saliency = torch.rand(30, 32, 32)
    one, two = (co_mix_batch(images, targets, saliency, draws, m_part=8, solver=solver,
                             parallel=parallel) for parallel in (True, False))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize("thres_type", ["hard", "soft"])
def test_mean_field_is_as_good_as_graph_cuts(side, thres_type, device):
    pytest.importorskip("gco")
    problem = random_parts(20, 20, side, device=device)
    cost = prior_cost(problem[0], problem[2], 0.05)
    value, spread = {}, {}
    for solver in ("gco", "device"):
        labels = label_parts(*problem, solver=solver, thres_type=thres_type)
        values = torch.stack(objective(labels, cost))
        value[solver], spread[solver] = values.mean(1), values.std(1) / 20 ** 0.5
        counts = block_masks(labels, 20).sum((2, 3))
        assert (counts > 0).sum(2).float().mean() > 1.5                # outputs are mixtures
    # Both end in one of many optima: the means of 20 parts scatter, so compare with their error
    assert (value["device"] < value["gco"] + 4 * torch.hypot(*spread.values())).all()


def test_mean_field_prefers_whole_images_where_saliency_is_flat(device):
    """Then smoothness rules: few inputs an output, few blocks of two (graph cuts: 1 and none)."""
    generator = torch.Generator().manual_seed(3)
    saliency = torch.rand(8, 20, 32, 32, generator=generator)
    draws = draw_comix(160, generator, m_part=20, block_num=4)
    labels = label_parts(*(t.to(device) for t in (
        *cost_and_compatibility(saliency, 4), draws.prior.view(8, 20),
        draws.labels0.view(8, 20, 4, 4))), solver="device")
    counts = block_masks(labels, 20).sum((2, 3))
    assert (counts > 0).sum(2).float().mean() < 1.35
    assert (labels[..., 0] != labels[..., 1]).float().mean() < 0.2


def test_mean_field_never_waits_for_the_device():
    """On tensors without data any look at a value raises."""
    problem = [t.to("meta") for t in random_parts(2, 5, 4)]
    labels = comixup._label_device(*problem[:2], problem[3], beta=0.02, gamma=0.06, tau=13.0,
                                   hard=True, set_resolve=True, niter=4)
    assert labels.shape == (2, 5, 4, 4, 2)


@pytest.mark.parametrize("solver", ["gco", "device"])
@pytest.mark.parametrize("batch, size", [(50, (32, 32)), (21, (32, 20)), (7, (8, 8)), (2, (30, 17)),
                                         (1, (32, 32))])
def test_any_batch_and_any_size(batch, size, solver, device):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, *size, generator=generator).to(device)
    targets = torch.rand(batch, 10, generator=generator).softmax(1).to(device)
    saliency = torch.rand(batch, *size, generator=generator).to(device)
    draws = draw_comix(batch, generator, block_num=4)
    mixed, soft = co_mix_batch(images, targets, saliency, draws, solver=solver)
    assert mixed.shape == images.shape and mixed.dtype == images.dtype
    torch.testing.assert_close(soft.sum(1), torch.ones(batch, device=device))
    # Every pixel is one of its part's or the mean of two
    for start in range(0, batch, 20):
        inputs, outputs = images[start:start + 20], mixed[start:start + 20]
        means = (inputs[:, None] + inputs[None]) / 2
        difference = (outputs[:, None, None] - means[None]).abs().amax(3)
        assert (difference.amin((1, 2)) < 1e-6).all()


@pytest.mark.filterwarnings("error")                     # such as of integers that overflow
@pytest.mark.parametrize("solver", ["gco", "device"])
def test_saliency_without_information(solver, device):
    """Zero, constant and infinite saliency, equal positions and huge weights stay finite."""
    images = torch.randn(6, 3, 16, 16, device=device)
    targets = torch.eye(6, device=device)
    saliency = torch.zeros(6, 16, 16, device=device)
    saliency[1], saliency[2, 3, 3] = 1, float("inf")
    assert cost_and_compatibility(saliency, 4)[0].eq(-1 / 16).all()
    cost, compatibility = cost_and_compatibility(saliency[[0, 1]], 4)
    assert torch.equal(cost, torch.full_like(cost, -1 / 16))
    assert torch.allclose(compatibility, 0.999 * torch.eye(2, device=device))
    for weights in ({}, {"gamma": 1e5, "beta": 1e5}, {"gamma": 0.0, "beta": 0.0},
                    {"gamma": 1e5, "thres": 0.0, "set_resolve": False}):
        draws = draw_comix(6, torch.Generator().manual_seed(2), m_part=6, block_num=4)
        mixed, soft = co_mix_batch(images, targets, saliency, draws, m_part=6, solver=solver,
                                   **weights)
        assert mixed.isfinite().all()
        torch.testing.assert_close(soft.sum(1), torch.ones(6, device=device))


@pytest.mark.parametrize("solver", ["gco", "device"])
def test_outputs_of_the_same_inputs_are_parted(solver, device):
    problem = random_parts(6, 4, 4, device=device)
    parted, left = ({tuple(row) for row in block_masks(label_parts(
        *problem, solver=solver, set_resolve=resolve), 4).flatten(1).tolist()}
        for resolve in (True, False))
    assert parted != left
    counts = torch.zeros(1, 5, 4)
    for output, used in enumerate([[1, 3], [1, 3], [0], [0], [1, 3]]):
        counts[0, output, used] = 8
    extra = comixup._resolve(counts)[0]
    expected = torch.zeros(5, 4)
    expected[0, 1] = expected[1, 1] = 1        # first of a pair (0, 1), (0, 4), (1, 4)
    expected[1, 3] = expected[4, 3] = 1        # second of a pair
    assert torch.equal(extra, expected)


def test_half_precision_keeps_whole_blocks(device):
    generator = torch.Generator().manual_seed(3)
    draws = draw_comix(20, generator)
    images = torch.randn(20, 3, 32, 32, generator=generator).bfloat16().to(device)
    saliency = torch.rand(20, 1, 6, 6, generator=generator).to(device)
    saliency = F.interpolate(saliency, 32, mode="bilinear")[:, 0] ** 3
    with torch.autocast(device.type, torch.bfloat16):
        mixed, soft = co_mix_batch(images, torch.eye(20, device=device), saliency, draws)
    assert mixed.dtype == torch.bfloat16 and soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(20, device=device))
    same = (mixed[:, None] == images[None]).all(2).any(1)
    assert same.float().mean() > 0.5


def test_draws():
    draw = draw_comix(50, torch.Generator().manual_seed(4), m_part=20, block_num=4)
    again = draw_comix(50, torch.Generator().manual_seed(4), m_part=20, block_num=4)
    assert all(torch.equal(a, b) for a, b in zip(draw[1:], again[1:], strict=True))
    sums = [p.sum().item() for p in draw.prior.split([20, 20, 10])]
    assert sums == pytest.approx([1, 1, 1], abs=1e-5)
    assert draw.labels0.shape == (50, 4, 4)
    assert draw.labels0[:40].unique().tolist() == list(range(20))
    assert draw.labels0[40:].unique().tolist() == list(range(10))
    generator = torch.Generator().manual_seed(5)
    sides = np.unique([draw_comix(4, generator, block_num=-1).block_num for _ in range(60)])
    assert sides.tolist() == [2, 4, 8, 16]


def test_bytes_are_refused():
    problem = random_parts(1, 4, 2)
    with pytest.raises(TypeError, match="floating point"):
        co_mix(torch.zeros(4, 3, 8, 8).byte(), torch.eye(4), *(t[0] for t in problem))


def test_dynamo_takes_it_whole():
    problem = [t[0] for t in random_parts(1, 5, 4)]
    images, targets = torch.randn(5, 3, 16, 16), torch.eye(5)
    whole = torch.compile(co_mix, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(images, targets, *problem), co_mix(images, targets, *problem))
