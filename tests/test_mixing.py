"""common.mixing against the recorded originals, and the properties that every use relies on."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, golden_cases

from common import mixing

CASES = pytest.mark.parametrize("path", golden_cases("sage", "cutmix_mixup_manifold"))


@CASES
def test_cutmix_golden(path, device):
    case = Golden(path)
    images = case.tensor("x", device)
    for cut in ("cut0", "cut1", "cut2"):
        perm = case.tensor(f"{cut}_perm")
        centre = torch.stack([case.tensor(f"{cut}_rx_f64"), case.tensor(f"{cut}_ry_f64")])
        mixed, ratio = mixing.cutmix(images, perm, centre, case.tensor(f"{cut}_lam_f64"))
        h0, h1, w0, w1 = case[f"{cut}_box_h0h1w0w1"]
        expected = images.clone()
        expected[:, :, h0:h1, w0:w1] = images[perm.to(device)][:, :, h0:h1, w0:w1]
        assert torch.equal(mixed, expected)
        torch.testing.assert_close(ratio, case.tensor(f"{cut}_ratio", device))
        if f"{cut}_mixed" in case:
            assert torch.equal(mixed, case.tensor(f"{cut}_mixed", device))


@CASES
@pytest.mark.parametrize("kind, source", [("inp", "x"), ("man", "man_h")])
def test_mixup_golden(path, kind, source, device):
    case = Golden(path)
    perm = case.tensor(f"{kind}_perm")
    mixed, ratio = mixing.mixup(case.tensor(source, device), perm, case.tensor(f"{kind}_lam_f64"))
    targets = mixing.soft_targets(case.tensor("y", device), perm, ratio, 100)
    torch.testing.assert_close(mixed, case.tensor(f"{kind}_mixed", device), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets, case.tensor(f"{kind}_target", device))


@pytest.mark.parametrize("shape", [(5, 3, 12, 20), (5, 1, 9, 7)])
def test_draws_per_image(shape, device):
    """(B,) lambdas and (B, 2) centres mix every image as a scalar draw mixes it alone."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(shape, generator=generator).to(device)
    perm = mixing.draw_perm(5, generator)
    lam = mixing.draw_lambda(1.0, generator, 5)
    centre = mixing.draw_centre(*shape[2:], generator, 5)
    for i in range(5):
        for every, alone in ((mixing.mixup(images, perm, lam), mixing.mixup(images, perm, lam[i])),
                             (mixing.cutmix(images, perm, centre, lam),
                              mixing.cutmix(images, perm, centre[i], lam[i]))):
            assert torch.equal(every[0][i], alone[0][i])
            assert every[1][i] == alone[1][i] and every[1].shape == alone[1].shape == (5,)


def test_cutout(device):
    """Squares of even sides around the pixels; the recorded ones are in test_soft_aug.py."""
    images = torch.ones(3, 2, 10, 12, device=device)
    centres = torch.tensor([[5, 5], [0, 11], [9, 0]])
    cut = mixing.cutout(images, centres, 6) == 0
    assert cut.sum((1, 2, 3)).tolist() == [72, 2 * 3 * 4, 2 * 4 * 3]
    assert cut[0, :, 2:8, 2:8].all() and cut[1, :, :3, 8:].all() and cut[2, :, 6:, :3].all()
    assert torch.equal(mixing.cutout(images, centres, 7) == 0, cut)


@pytest.mark.parametrize("alpha", [0.001, 0.2, 1.0, 2.0])
def test_lambda_is_of_the_beta_distribution(alpha):
    lam = mixing.draw_lambda(alpha, torch.Generator().manual_seed(0), 40_000).double()
    other = torch.from_numpy(np.random.default_rng(0).beta(alpha, alpha, 40_000))
    share = torch.linspace(0.05, 0.95, 10)
    for part in share:
        assert abs((lam < part).double().mean() - (other < part).double().mean()) < 0.012
    assert mixing.draw_lambda(0, None) == 1 and mixing.draw_lambda(-1, None, 3).tolist() == [1] * 3


def test_draw_pixels():
    pixels = mixing.draw_pixels(4000, (10, 12), torch.Generator().manual_seed(0))
    assert [column.unique().tolist() for column in pixels.T] == [list(range(10)), list(range(12))]


def test_cutmix_extremes(device):
    images, perm = torch.randn(4, 3, 8, 8, device=device), torch.tensor([1, 2, 3, 0])
    kept, ratio = mixing.cutmix(images, perm, torch.tensor([4.0, 4.0]), 1.0)
    assert torch.equal(kept, images) and ratio.tolist() == [1] * 4
    swapped, ratio = mixing.cutmix(images, perm, torch.tensor([4.0, 4.0]), 0.0)
    assert torch.equal(swapped, images[perm]) and ratio.tolist() == [0] * 4


def test_dtypes(device):
    images = torch.randn(4, 3, 8, 8, device=device).bfloat16()
    perm, lam = torch.tensor([1, 2, 3, 0]), torch.full((4,), 0.3)
    for mixed, ratio in (mixing.mixup(images, perm, lam), mixing.mixup(images, perm, 0.3),
                         mixing.cutmix(images, perm, torch.tensor([4.0, 4.0]), lam)):
        assert mixed.dtype == torch.bfloat16 and ratio.dtype == torch.float32


def test_softmax_bce(device):
    """As torch's BCELoss on the softmax, also where it saturates, and in float32 under autocast."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 10, generator=generator) * 5).to(device)
    logits[0, 0] = 400                                       # the other probabilities become 0
    targets = torch.rand(6, 10, generator=generator).softmax(1).to(device)
    p = logits.double().softmax(1)
    log = torch.log(p).clamp(-100), torch.log(1 - p).clamp(-100)
    expected = -(targets * log[0] + (1 - targets) * log[1]).mean().float()
    torch.testing.assert_close(mixing.softmax_bce(logits, targets), expected, rtol=1e-4, atol=1e-6)
    with torch.autocast(device.type, torch.bfloat16):
        loss = mixing.softmax_bce(logits.requires_grad_(), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_soft_targets_weigh_two_cross_entropies(device):
    logits, labels = torch.randn(6, 10, device=device), torch.arange(6, device=device)
    perm, ratio = torch.tensor([1, 2, 3, 4, 5, 0]), torch.linspace(0, 1, 6, device=device)
    each = (ratio * F.cross_entropy(logits, labels, reduction="none")
            + (1 - ratio) * F.cross_entropy(logits, labels.roll(-1), reduction="none"))
    loss = F.cross_entropy(logits, mixing.soft_targets(labels, perm, ratio, 10))
    torch.testing.assert_close(loss, each.mean())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_draw_lambda(alpha):
    """Moments of Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); the same seed, the same draw."""
    lam = mixing.draw_lambda(alpha, torch.Generator().manual_seed(1), 40000)
    assert abs(lam.mean() - 0.5) < 0.01
    assert abs(lam.var() - 1 / (4 * (2 * alpha + 1))) < 0.004
    assert lam.dtype == torch.float32 and 0 <= lam.min() and lam.max() <= 1
    one = mixing.draw_lambda(alpha, torch.Generator().manual_seed(7))
    assert one.shape == () and one == mixing.draw_lambda(alpha, torch.Generator().manual_seed(7))


def test_draws_without_mixing():
    generator = torch.Generator().manual_seed(0)
    assert mixing.draw_lambda(0, generator) == 1
    assert mixing.draw_lambda(-1, generator, 3).tolist() == [1, 1, 1]


def test_draw_centre():
    centre = mixing.draw_centre(10, 40, torch.Generator().manual_seed(0), 5000)
    assert (centre.amax(0) <= torch.tensor([10, 40])).all() and (centre >= 0).all()
    torch.testing.assert_close(centre.mean(0), torch.tensor([5.0, 20.0]), rtol=0.03, atol=0)


def test_draws_take_torchs_own_generator():
    draws = (mixing.draw_perm, 9), (mixing.draw_lambda, 1.0), (mixing.draw_centre, 9, 9), \
        (mixing.draw_pixels, 9, (30, 30))
    for draw, *words in draws:
        torch.manual_seed(5)
        one, two = draw(*words), draw(*words)
        assert not torch.equal(one, two)
        torch.manual_seed(5)
        assert torch.equal(draw(*words), one)


def test_soft_targets_chain(device):
    """Of probabilities: smoothed labels, or those of another mixing."""
    labels, perm = torch.arange(4, device=device), torch.tensor([1, 2, 3, 0])
    first = mixing.soft_targets(labels, perm, torch.tensor(0.7), 5)
    again = mixing.soft_targets(first, perm, torch.tensor(0.6), 5)
    torch.testing.assert_close(again, 0.6 * first + 0.4 * first[perm])
    assert again.dtype == torch.float32 and torch.allclose(again.sum(1), torch.ones(4).to(device))
    whole = torch.eye(4, 5, device=device)
    assert torch.equal(mixing.probabilities(whole.long(), 5), whole)        # of F.one_hot
    with pytest.raises(ValueError, match="not of 6 classes"):
        mixing.soft_targets(first, perm, torch.tensor(0.7), 6)


def test_bytes_and_impossible_shares_are_refused(device):
    perm, pixels = torch.tensor([1, 0]), torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=device)
    with pytest.raises(TypeError, match="floating point, not torch.uint8"):
        mixing.mixup(pixels, perm, 0.5)
    for lam in (1.7, -0.1, torch.tensor([0.5, float("nan")])):
        with pytest.raises(ValueError, match=r"shares must lie in \[0, 1\]"):
            mixing.mixup(pixels.float(), perm, lam)
        with pytest.raises(ValueError, match="shares"):
            mixing.cutmix(pixels, perm, torch.tensor([4.0, 4.0]), lam)


class Tiny(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                         torch.nn.Dropout(0.5), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_input_gradient_leaves_the_model_as_it_was(device):
    """The gradient in evaluation mode; modes, statistics, gradients, frozen parameters stay."""
    torch.manual_seed(0)
    net = Tiny().to(device)
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[5].bias.grad = torch.ones(5, device=device)
    before, images = state(net), torch.randn(6, 3, 8, 8, device=device)
    labels = torch.arange(6, device=device) % 5
    with torch.no_grad():
        found = mixing.input_gradient(net, images, labels)
    assert not images.requires_grad and not found.requires_grad
    assert [part.training for part in net] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [p.grad is None for p in net.parameters()] == [True] * 5 + [False]
    assert torch.equal(net[5].bias.grad, torch.ones(5, device=device))
    assert not net[0].weight.requires_grad and net[5].weight.requires_grad
    leaf = images.clone().requires_grad_()
    F.cross_entropy(net.eval()(leaf), labels).backward()
    torch.testing.assert_close(found, leaf.grad)
    one_hot = F.one_hot(labels, 5).float()
    torch.testing.assert_close(mixing.input_gradient(net, images, one_hot), found)
    doubled = mixing.input_gradient(net, images, labels,
                                    loss=lambda out, y: 2 * F.cross_entropy(out, y))
    torch.testing.assert_close(doubled, 2 * found)
    net.train()
    mixing.input_gradient(net, images, labels, train=True)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


def test_input_gradient_in_other_peoples_wrappers(device):
    """Under autocast (then training goes on), DataParallel and torch.compile."""
    torch.manual_seed(0)
    net, images = Tiny().to(device), torch.randn(6, 3, 8, 8, device=device)
    labels = torch.arange(6, device=device) % 5
    plain = mixing.input_gradient(net, images, labels)
    on_gpus = device.type == "cuda" or not torch.cuda.is_available()    # else it wants them there
    parallel = torch.nn.DataParallel(net) if on_gpus else net
    for wrapped in (parallel, torch.compile(net, backend="eager"),
                    torch.compile(parallel, backend="eager")):
        assert torch.equal(mixing.input_gradient(wrapped, images, labels), plain)
    with torch.autocast(device.type, torch.bfloat16):
        half = mixing.input_gradient(net, images, labels)
        loss = F.cross_entropy(net(images), labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0.1, atol=0.01)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    with pytest.raises(TypeError, match="floating point"):
        mixing.input_gradient(net, images.byte(), labels)


def test_large_tensors_are_sent_in_pieces(device):
    for values in (torch.randn(3, 50_000), torch.arange(10), torch.arange(40_001).short()):
        assert torch.equal(mixing.send(values, device).cpu(), values)
    pieces = mixing.send(torch.zeros(3, 50_000), torch.device("meta"))
    assert pieces.shape == (3, 50_000) and pieces.is_meta


def test_dynamo_takes_mixing_whole():
    """No graph break in Mixup, CutMix and Cutout."""
    images, perm = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 0])
    centre, pixels = torch.tensor([3.0, 4.0]), torch.tensor([[1, 2], [3, 4], [5, 6], [7, 7]])
    for mix, *words in ((mixing.mixup, perm, torch.tensor(0.3)),
                        (mixing.cutmix, perm, centre, torch.tensor(0.3)),
                        (mixing.cutout, pixels, 4)):
        compiled = torch.compile(mix, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images, *words), mix(images, *words))
