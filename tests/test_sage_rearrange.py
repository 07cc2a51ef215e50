"""SAGE's saliency, offset search and mixing against the recorded original and a plain rendering."""
import pytest
import torch
from conftest import Golden, golden_cases

from common.mixing import soft_targets
from sage import rearrange
from sage.rearrange import draw_offsets, gradient_saliency, sage_mix


@pytest.mark.parametrize("path", golden_cases("sage", "saliency_"))
def test_saliency_golden(path, device):
    case = Golden(path)
    saliency = gradient_saliency(case.tensor("grad", device), int(case["kernel"]),
                                 float(case["sigma"]))
    assert saliency.shape == (8, 1, 32, 32)
    torch.testing.assert_close(saliency, case.tensor("sal_blur", device), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("path", golden_cases("sage", "sage_mix_"))
def test_sage_mix_golden(path, device):
    case = Golden(path)
    perm, offsets = case.tensor("perm"), case.tensor("cand_offsets")
    mixed, ratio = sage_mix(case.tensor("x", device), case.tensor("saliency", device), perm,
                            offsets, case.tensor("alpha"))
    # where the two best candidates score alike either may win
    clear = torch.from_numpy(case["score_margin_rel"] > 1e-6).to(device)
    assert clear.sum() >= 7
    targets = soft_targets(case.tensor("y", device), perm, ratio, 100)
    for ours, name in ((mixed, "mixed_x"), (ratio, "lam"), (targets, "target")):
        torch.testing.assert_close(ours[clear], case.tensor(name, device)[clear],
                                   rtol=1e-4, atol=1e-5)


def shift(z, dy, dx):
    """z (..., H, W) moved down by dy and right by dx, zeros moving in."""
    out = torch.zeros_like(z)
    height, width = z.shape[-2:]
    for y in range(max(dy, 0), height + min(dy, 0)):
        for x in range(max(dx, 0), width + min(dx, 0)):
            out[..., y, x] = z[..., y - dy, x - dx]
    return out


def plain_sage_mix(images, saliency, perm, offsets, alpha):
    """The definition (spec: sum of g1·M + t·(1 - M)), image by image."""
    mixed, ratio = [], []
    share = saliency[:, 0] / saliency.sum((1, 2, 3))[:, None, None]
    for i, j in enumerate(perm.tolist()):
        g1, g2 = share[i] * alpha[i], share[j] * (1 - alpha[i])
        best = None
        for dy, dx in offsets.tolist():
            t = shift(g2, dy, dx)
            mask = g1 / (g1 + t).clamp(min=1e-16)
            score = (g1 * mask + t * (1 - mask)).sum()
            if best is None or score > best[0]:
                best = score, mask * images[i] + (1 - mask) * shift(images[j], dy, dx), mask.mean()
        mixed.append(best[1])
        ratio.append(best[2])
    return torch.stack(mixed), torch.stack(ratio)


@pytest.mark.parametrize("size", [(6, 10), (9, 5)])
@pytest.mark.parametrize("chunk", [1, 2 ** 19])
def test_sage_mix_plain(size, chunk, device, monkeypatch):
    """Non-square images, alpha per image, any chunk size."""
    monkeypatch.setattr(rearrange, "CPU_CHUNK", chunk)
    monkeypatch.setattr(rearrange, "GPU_CHUNK", chunk)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, *size, generator=generator)
    saliency = torch.rand(4, 1, *size, generator=generator)
    perm, alpha = torch.tensor([2, 3, 1, 0]), torch.tensor([0.2, 0.5, 0.7, 0.4])
    offsets = draw_offsets(*size, 0.2, generator)
    expected = plain_sage_mix(images, saliency, perm, offsets, alpha)
    actual = sage_mix(images.to(device), saliency.to(device), perm, offsets, alpha)
    torch.testing.assert_close([t.cpu() for t in actual], list(expected), rtol=1e-4, atol=1e-5)


def test_shift_direction(device):
    """A positive offset moves the partner down and right; what it leaves free keeps the first."""
    images = torch.zeros(2, 1, 4, 6, device=device)
    images[0], images[1, 0, 0, 0] = 3.0, 7.0
    saliency = torch.full((2, 1, 4, 6), 1e-6, device=device)
    saliency[1, 0, 0, 0] = 1.0
    mixed, ratio = sage_mix(images, saliency, torch.tensor([1, 0]), torch.tensor([[1, 2]]), 0.5)
    assert mixed[0, 0, 1, 2].item() == pytest.approx(7, abs=1)
    assert (mixed[0, 0, 0] == 3).all() and (mixed[0, 0, :, :2] == 3).all()
    assert ratio[0] >= 9 / 24


@pytest.mark.parametrize("value", [0, float("inf"), float("nan")])
def test_saliency_without_information_is_uniform(value, device):
    """Zero, or not finite: gradients under fp16's loss scale overflow by design."""
    images = torch.randn(4, 3, 8, 8, device=device)
    perm, offsets = torch.tensor([1, 0, 3, 2]), torch.tensor([[0, 0], [2, -1]])
    saliency = torch.ones(4, 1, 8, 8, device=device)
    expected = sage_mix(images, saliency, perm, offsets, 0.3)
    actual = sage_mix(images, torch.full_like(saliency, value), perm, offsets, 0.3)
    torch.testing.assert_close(actual, expected)
    assert actual[0].isfinite().all()


def test_inputs_untouched_and_detached(device):
    images = torch.randn(4, 3, 8, 8, device=device, requires_grad=True)
    saliency = torch.rand(4, 1, 8, 8, device=device)
    before = saliency.clone()
    mixed, ratio = sage_mix(images, saliency, torch.tensor([1, 0, 3, 2]), torch.tensor([[1, 1]]),
                            torch.tensor(0.5))
    assert torch.equal(saliency, before) and not mixed.requires_grad and ratio.shape == (4,)
    assert not gradient_saliency(images).requires_grad


@pytest.mark.parametrize("size, fraction, count", [
    ((32, 32), 0.01, 39), ((64, 64), 0.01, 161), ((4, 7), 0.0, 1), ((4, 7), 1.0, 7 * 13)])
def test_draw_offsets(size, fraction, count):
    offsets = draw_offsets(*size, fraction, torch.Generator().manual_seed(0))
    assert offsets.shape == (count, 2) and len(offsets.unique(dim=0)) == count
    assert (offsets.abs() <= torch.tensor(size) - 1).all()
    if fraction == 1:
        assert (offsets.abs().amax(0) == torch.tensor(size) - 1).all()


def test_bytes_are_refused(device):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=device)
    with pytest.raises(TypeError, match="floating point, not torch.uint8"):
        sage_mix(images, torch.rand(2, 1, 8, 8, device=device), torch.tensor([1, 0]),
                 torch.tensor([[0, 1]]), 0.5)


def test_dynamo_takes_it_whole():
    torch.manual_seed(0)
    words = (torch.randn(4, 3, 8, 8), torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 0]),
             draw_offsets(8, 8, 0.1), torch.tensor(0.4))
    for function, args in ((sage_mix, words), (gradient_saliency, words[:1])):
        whole = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(*args), function(*args))
