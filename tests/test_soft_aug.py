"""Soft Augmentation: the original's numbers, mended defects, RandAugment against torchvision."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, golden_cases
from skimage import data
from sklearn.datasets import load_sample_images
from torchvision.transforms import RandAugment
from torchvision.transforms.v2 import functional as TF

from common.evaluation import bin_sums, expected_calibration_error
from common.mixing import cutout, mixup
from common.randaugment import OPERATIONS, draw_randaugment, rand_augment
from soft_aug import main as schedule
from soft_aug.losses import (
    cross_entropy,
    focal_loss,
    mixup_loss,
    smooth_cross_entropy,
    soft_target_loss,
)
from soft_aug.softcrop import (
    confidence,
    draw_noise,
    draw_offsets,
    soft_crop,
    soft_noise,
)


def close(ours, golden, rtol=1e-4, atol=1e-5):
    ours = ours.detach().cpu().double() if torch.is_tensor(ours) else torch.tensor(ours).double()
    torch.testing.assert_close(ours, torch.as_tensor(np.asarray(golden)).double(),
                               rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------- SoftCrop

@pytest.mark.parametrize("path", golden_cases("soft_aug", "softcrop_"))
def test_soft_crop_equals_the_original(path, device):
    case = Golden(path)
    num_classes, _, t, max_p, power, std, iou = case["params"].tolist()
    crops, visible = soft_crop(case.tensor("x_norm", device), case.tensor("offset_rc"),
                               case.tensor("bg_draw") * std, iou=bool(iou))
    close(crops, case["out"], rtol=0, atol=1e-7)
    close(visible, case["overlap"], rtol=0, atol=1e-6)
    ours = confidence(visible, int(num_classes), power=power, t=t, max_p=max_p)
    close(ours, case["confidence"], rtol=0, atol=1e-5)
    close(case.tensor("labels") + 1 - ours.cpu().double(), case["encoded"], rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32          # also where nothing is visible


@pytest.mark.parametrize("path", golden_cases("soft_aug", "confidence_curve_"))
def test_confidence_equals_the_original(path, device):
    case = Golden(path)
    visible, golden = case.tensor("x", device).float(), case["prob"]
    axes = [case[name].tolist() for name in ("powers", "T", "max_prob", "n_classes")]
    for index in np.ndindex(golden.shape[:-1]):
        power, t, max_p, num_classes = (values[i] for values, i in zip(axes, index, strict=True))
        ours = confidence(visible, num_classes, power=power, t=t, max_p=max_p).cpu()
        assert (ours >= 1 / num_classes - 1e-6).all() and ours.isfinite().all()
        # at t = 0 and v = 1e-12 the original divides two underflowing powers
        valid = np.isfinite(golden[index]) & ((t > 0) | (np.abs(case["x"] - 1e-12) > 1e-13))
        close(ours[torch.from_numpy(valid)], golden[index][valid], rtol=0, atol=1e-6)


def test_confidence_takes_a_ceiling_for_each_image():
    visible, ceiling = torch.tensor([1.0, 0.5, 0.0, 0.3]), torch.tensor([0.9, 0.7, 0.9, 0.001])
    ours = confidence(visible, 10, power=2.0, max_p=ceiling)
    each = [confidence(v[None], 10, power=2.0, max_p=float(m))
            for v, m in zip(visible, ceiling, strict=True)]
    torch.testing.assert_close(ours, torch.cat(each))


@pytest.mark.parametrize("path", golden_cases("soft_aug", "offset_sampler_"))
@pytest.mark.parametrize("name", ["sig12_lim32", "sig30_lim32", "sig100_lim8", "sig0.012_lim32"])
def test_offsets_replay_the_original_stream(path, name, monkeypatch):
    case = Golden(path)
    sigma, limit = float(name[3:].split("_")[0]), int(name.split("lim")[1])
    stream, used = case.tensor(f"{name}_stream"), 0

    def next_normals(n, generator=None):
        nonlocal used
        used += n
        return stream[used - n:used]

    monkeypatch.setattr(torch, "randn", next_normals)
    count = int((np.cumsum(case[f"{name}_ndraws"].astype(int)) < 1500).sum())
    ours = [draw_offsets(1, (limit,), sigma).item() for _ in range(count)]
    assert ours == case[f"{name}_values"][:count].tolist()
    assert used == case[f"{name}_ndraws"][:count].astype(int).sum()


def test_an_offset_is_given_up_after_a_hundred_draws(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "randn", lambda n, generator=None: asked.append(n) or
                        torch.full((n,), 3.0))
    assert not draw_offsets(5, (8,), 100.0).any()
    assert asked == [5] * 100


def test_distribution_of_offsets():
    """The figures of spec section 2: sigma 12, 32x32 images, 100 classes."""
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    offsets = draw_offsets(n, (32, 32), 12.0, generator)
    assert offsets.shape == (n, 2) and offsets.abs().max() == 31
    shares = torch.bincount(offsets.flatten() + 31, minlength=63) / (2 * n)
    assert abs(shares[31] - 0.0669) < 0.001                  # two bins wide: truncation
    assert abs(shares[30] - 0.0332) < 0.001 and abs(shares[32] - 0.0332) < 0.001
    assert abs(np.corrcoef(offsets.T.numpy())[0, 1]) < 0.01
    visible = ((32 - offsets.abs()) / 32).prod(1)
    close(soft_crop(torch.zeros(500, 1, 32, 32), offsets[:500], torch.zeros(500, 1))[1],
          visible[:500])
    p2, p4 = (confidence(visible, 100, power=k) for k in (2, 4))
    for value, expected in ((visible, 0.522), (p2, 0.724), ((p2 < 0.5).float(), 0.170),
                            (p4, 0.873)):
        assert abs(value.mean() - expected) < 0.002
    repeated = draw_offsets(n, (32, 32), 12.0, torch.Generator().manual_seed(0))
    assert torch.equal(offsets, repeated)
    assert not draw_offsets(10_000, (32, 32), 12 / 1000, generator).any()      # fine-tune phase


def test_other_draws_have_their_distributions():
    generator = torch.Generator().manual_seed(0)
    sigma, field = draw_noise((20_000, 1, 2, 2), 0.5, 3.0, generator)
    assert (sigma >= 0).all() and abs(sigma.square().mean().sqrt() - 0.5) < 0.01
    assert field.shape == (20_000, 1, 2, 2) and abs(field.std() - 3) < 0.05


@pytest.mark.parametrize("path", golden_cases("soft_aug", "cutout_"))
def test_cutout_equals_the_original(path, device):
    case = Golden(path)
    images = (case.tensor("x_u8").permute(0, 3, 1, 2) / 255).to(device)
    for length in np.unique(case["length"]):                  # one length in a batch
        ours = cutout(images, case.tensor("center_yx"), float(length)).cpu()
        chosen = torch.from_numpy(case["length"] == length)
        assert torch.equal(ours[chosen], case.tensor("out")[chosen])


def test_soft_noise(device):
    images = torch.rand(4, 3, 8, 8, device=device)
    sigma, field = torch.tensor([0.0, 0.5, 1.0, 3.0]), torch.randn(4, 3, 8, 8)
    noisy, visible = soft_noise(images, sigma, field)
    torch.testing.assert_close(visible.cpu(), torch.tensor([1, 2 / 3, 0.5, 0.25]))
    assert torch.equal(noisy[0], images[0])
    torch.testing.assert_close((noisy - images)[3].cpu(), 3 * field[3], rtol=1e-4, atol=1e-5)


def test_augmentation_and_losses_compile_whole(device):
    def step(images, labels):
        crops, visible = soft_crop(images, torch.tensor([[3, -2]] * 4), torch.zeros(4, 3))
        crops, noisy = soft_noise(crops, torch.ones(4), images.flip(0))
        p = confidence(visible, 10, power=2) * noisy
        logits, perm = cutout(crops, torch.tensor([[3, 5]] * 4), 4).flatten(1)[:, :10], labels
        return mixup_loss(soft_target_loss, logits, labels, p, perm, torch.tensor(0.3)) + \
            smooth_cross_entropy(logits, labels, smoothing=0.1) + focal_loss(logits, labels)

    images = torch.randn(4, 3, 16, 16, device=device)
    labels = torch.tensor([2, 0, 3, 1], device=device)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, labels), step(images, labels))


# --------------------------------------------------------------------------------------- losses

def with_gradient(loss, logits, *args, **keywords):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *args, **keywords)
    value.backward()
    return value, logits.grad


@pytest.mark.parametrize("path", golden_cases("soft_aug", "losses_"))
def test_losses_equal_the_original(path, device):
    case = Golden(path)
    logits, labels = case.tensor("logits", device), case.tensor("labels", device)
    p = case.tensor("conf", device)
    columns, checked = case["combo_cols"].tolist(), 0
    for row, loss, grad in zip(case["combos"], case["loss"], case["grad"], strict=True):
        flags = dict(zip(columns, row.astype(bool).tolist(), strict=True))
        # dropping the leftover mass is no option of the programs; lr_correction cancels reweight
        reweight = True if flags["reweight"] and not flags["lr_correction"] else None
        soften = flags["soften_one_hot"]
        if soften and not flags["distribute"]:
            continue
        if not flags["other"] or not soften:
            value, ours = with_gradient(soft_target_loss, logits, labels, p, reweight=reweight,
                                        soften=soften)
            close(value, loss)
            close(ours, grad)
            checked += 1
            continue
        # the original gave the rest to the last existing class: a network of one class fewer
        kept = labels < logits.shape[1] - 1
        value, ours = with_gradient(soft_target_loss, logits[kept], labels[kept], p[kept],
                                    reweight=None, other=True)
        scale = kept.float().mean() * (p.mean() if reweight else 1)
        close(ours * scale, grad[kept.cpu().numpy()])
        checked += 1
    assert checked >= 20
    for smoothing in ("0", "0.1", "0.3"):
        value, grad = with_gradient(smooth_cross_entropy, logits, labels, p,
                                    smoothing=float(smoothing))
        close(value, case[f"sce_{smoothing}_loss"])
        close(grad, case[f"sce_{smoothing}_grad"])
    for gamma in ("0", "1", "2", "5"):
        value, grad = with_gradient(focal_loss, logits, labels, p, gamma=float(gamma))
        close(value, case[f"focal_{gamma}_loss"])
        close(grad, case[f"focal_{gamma}_grad"])
    for loss in (cross_entropy, soft_target_loss):
        value, grad = with_gradient(loss, logits, labels, torch.ones_like(p))
        close(value, case["hard_int_loss"])
        close(grad, case["hard_int_grad"])


def test_soft_target_loss_per_sample_and_with_a_class_for_the_rest(device):
    logits, labels = torch.randn(8, 6, device=device), torch.arange(8, device=device) % 5
    p = torch.linspace(0.2, 1, 8, device=device)
    onehot = F.one_hot(labels, 6)
    spread = onehot * p[:, None] + (1 - onehot) * ((1 - p) / 5)[:, None]
    rest = onehot * p[:, None]
    rest[:, 5] = 1 - p
    for target, other in ((spread, False), (rest, True)):
        divergence = F.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
        for reweight, expected in ((None, divergence.mean()), (False, divergence.mean()),
                                   ("batch", divergence.mean() * p.mean()),
                                   (True, divergence.mean() * p.mean()),
                                   ("sample", (divergence * p).mean())):
            ours = soft_target_loss(logits, labels, p, reweight=reweight, other=other)
            torch.testing.assert_close(ours, expected)
    hard = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(
        soft_target_loss(logits, labels, p, reweight="sample", soften=False), (hard * p).mean())


def test_certain_labels_leave_no_nan(device):
    for other in (False, True):
        value, grad = with_gradient(
            soft_target_loss, 50 * torch.randn(5, 4, device=device),
            torch.zeros(5, dtype=torch.int64, device=device), torch.ones(5, device=device),
            other=other)
        assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("path", golden_cases("soft_aug", "mixup_"))
def test_mixup_equals_the_original(path, device):
    case = Golden(path)
    logits, labels = case.tensor("logits", device), case.tensor("y", device)
    soft = 1 - (case.tensor("y_soft_encoded", device) - labels)
    images = case.tensor("x_u8", device).permute(0, 3, 1, 2).float() / 255
    for name in ("a1", "a02", "a0", "soft"):
        perm, lam = case.tensor(f"{name}_index"), float(case[f"{name}_lam"])
        if name != "a0":
            close(mixup(images, perm, lam)[0][:3], case[f"{name}_mixed"])
        p = soft if name == "soft" else torch.ones_like(soft)
        # the original's own curve on lam: exponent 1 and 10^6 classes, in its test run 2 and 100
        curve = {"num_classes": 100, "power": 2} if name == "soft" else \
            {"num_classes": 10**6, "power": 1}
        share = confidence(torch.full_like(p, lam), max_p=p, **curve)
        close(labels.cpu() + 1 - share.cpu(), case[f"{name}_ya"], rtol=0, atol=2e-5)
        close(soft_target_loss(logits, labels, share), case[f"{name}_st_loss_ya_only"], rtol=1e-3)
        close(mixup_loss(cross_entropy, logits, labels, p, perm, lam), case[f"{name}_ce_loss"])
        if name == "a1":                        # (the others' second labels round up or soften)
            assert (labels.cpu()[perm] == case.tensor("a1_yb_long")).all()


def test_mixup_keeps_confidence_and_both_labels(device):
    """Every loss: the pair counts; soft targets: the gradient of the mixed soft target."""
    logits = torch.randn(6, 100, device=device)
    labels = torch.tensor([99, 3, 50, 99, 32, 7], device=device)
    p, perm = torch.linspace(0.3, 1, 6, device=device), torch.tensor([3, 0, 5, 1, 2, 4])
    moved = perm.to(device)

    def per_sample_off(*args):
        return soft_target_loss(*args, reweight=None)

    onehot = F.one_hot(labels, 100)
    target = onehot * p[:, None] + (1 - onehot) * ((1 - p) / 99)[:, None]
    target = 0.7 * target + 0.3 * target[moved]
    _, grad = with_gradient(
        lambda logits: mixup_loss(per_sample_off, logits, labels, p, perm, 0.7), logits)
    _, expected = with_gradient(lambda logits: F.cross_entropy(logits, target), logits)
    torch.testing.assert_close(grad, expected)
    for loss in (cross_entropy, focal_loss, soft_target_loss,
                 lambda *args: smooth_cross_entropy(*args, smoothing=0.1)):
        both = mixup_loss(loss, logits, labels, p, perm, 0.7)
        torch.testing.assert_close(
            both, 0.7 * loss(logits, labels, p) + 0.3 * loss(logits, labels[moved], p[moved]))
        # the second label survives shares of the first beyond float32's resolution of a label
        torch.testing.assert_close(mixup_loss(loss, logits, labels, p, perm, 1 - 1e-8),
                                   loss(logits, labels, p))


# ---------------------------------------------------------------------------------- calibration

@pytest.mark.parametrize("path", golden_cases("soft_aug", "ece_"))
def test_calibration_error_equals_the_original(path, device):
    case, cases = Golden(path), 0
    for name in (key[:-4] for key in case if key.endswith("_ece")):
        data_name, slots = name.rsplit("_b", 1)
        logits = case.tensor(f"{data_name}_logits", device).float()
        labels = case.tensor(f"{data_name}_labels", device)
        bins = int(slots) - 1                   # the original counts edges
        close(expected_calibration_error(logits, labels, bins), case[f"{name}_ece"])
        *sums, count = bin_sums(logits, labels, bins)
        for ours, kind in zip((*(part / count.clamp(min=1) for part in sums), count),
                              ("conf", "acc", "count"), strict=True):
            close(ours, case[f"{name}_{kind}"][1:])
        cases += 1
    assert cases >= 5


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_focal_loss_of_the_certain_has_a_gradient(gamma):
    logits = torch.tensor([[100.0, 0.0], [0.0, 1.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([0, 0]), gamma=gamma).backward()
    assert logits.grad.isfinite().all() and logits.grad[1].abs().min() > 0.1


# ------------------------------------------------------------------------------------- schedule

@pytest.mark.parametrize("path", golden_cases("soft_aug", "lr_schedule_"))
def test_learning_rate_equals_the_original(path):
    case = Golden(path)
    flags = {"lr": 0.1, "warm": 0, "milestones": [], "gamma": 0.2}
    for name in ("c_sch2.5_it391", "l_sch2.5_it391", "c_sch0.05_it7"):
        total = int(case[f"{name}_total"])
        args = SimpleNamespace(decay=name[0], epochs=total, **flags)
        ours = [schedule.step_rate(args, step, 1) for step in case[f"{name}_step"].tolist()]
        close(ours, case[f"{name}_lr"], rtol=1e-6, atol=1e-13)
    # the original runs one epoch more than 200 sch
    args = SimpleNamespace(decay="s", epochs=500, **flags | {"milestones": [250, 375, 450]})
    ours = [schedule.step_rate(args, 391 * epoch, 391) for epoch in range(501)]
    close(ours, case["s_sch2.5_lr_per_epoch"], rtol=1e-9)


def test_schedule_of_warm_up_and_fine_tuning():
    plain, warm = ([schedule.step_rate(SimpleNamespace(
        lr=0.1, decay="c", epochs=20, warm=warm, milestones=[], gamma=1), step, 5)
        for step in range(100)] for warm in (0, 2))
    assert warm[0] == pytest.approx(plain[0] / 10) and warm[9:] == plain[9:]
    assert all(a < b for a, b in zip(warm[:10], warm[1:10], strict=False))
    assert plain[0] < 0.1 and plain[-1] < 1e-4
    for epochs, ft, first in ((500, 20, 480), (10, 20, 0.5), (50, 0, 50)):
        assert schedule.first_weak_epoch(SimpleNamespace(epochs=epochs, ft=ft)) == first


# ---------------------------------------------------------------------------------- RandAugment

SHIFT, SHEAR = 150 / 331 * 9 / 30, math.degrees(math.atan(float(torch.linspace(0, 0.3, 31)[9])))
FACTOR = float(torch.linspace(0, 0.9, 31)[9])


def affine(images, **keywords):
    neutral = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return TF.affine(images, **{**neutral, **keywords})


# torchvision's call for each operation; s is its sign
REFERENCE = {
    "Identity": lambda x, s: x,
    "ShearX": lambda x, s: affine(x, shear=[s * SHEAR, 0.0], center=[0, 0]),
    "ShearY": lambda x, s: affine(x, shear=[0.0, s * SHEAR], center=[0, 0]),
    "TranslateX": lambda x, s: affine(x, translate=[s * int(SHIFT * x.shape[-1]), 0]),
    "TranslateY": lambda x, s: affine(x, translate=[0, s * int(SHIFT * x.shape[-2])]),
    "Rotate": lambda x, s: TF.rotate(x, s * 9.0),
    "Brightness": lambda x, s: TF.adjust_brightness(x, 1 + s * FACTOR),
    "Color": lambda x, s: TF.adjust_saturation(x, 1 + s * FACTOR),
    "Contrast": lambda x, s: TF.adjust_contrast(x, 1 + s * FACTOR),
    "Sharpness": lambda x, s: TF.adjust_sharpness(x, 1 + s * FACTOR),
    "Posterize": lambda x, s: TF.posterize(x, 7),
    "Solarize": lambda x, s: TF.solarize(x, 178.5),
    "AutoContrast": lambda x, s: TF.autocontrast(x),
    "Equalize": lambda x, s: TF.equalize(x),
}


@pytest.fixture(scope="module")
def photographs():
    """(40, 3, 32, 48) uint8: pieces of photographs, and one flat picture."""
    generator = torch.Generator().manual_seed(0)
    sources = [*load_sample_images().images, data.astronaut(), data.chelsea()]
    pieces = []
    for photo in sources:
        for _ in range(10):
            y, x = (int(torch.randint(side - 96, (), generator=generator))
                    for side in photo.shape[:2])
            pieces.append(torch.from_numpy(photo[y:y + 64:2, x:x + 96:2].copy()))
    pieces[-1][:] = 77
    return torch.stack(pieces).permute(0, 3, 1, 2).contiguous()


def test_randaugment_has_torchvisions_operations_and_magnitudes():
    space = RandAugment()._augmentation_space(31, (32, 32))
    assert list(space) == list(OPERATIONS)
    picked = {name: float(values[9]) for name, (values, _) in space.items() if values.ndim}
    assert (picked["Posterize"], picked["Solarize"], picked["Color"]) == (7, 178.5, FACTOR)
    assert picked["TranslateX"] == pytest.approx(4.3505, abs=1e-4)
    ops, negative = draw_randaugment(70_000, torch.Generator().manual_seed(0))
    assert ops.shape == negative.shape == (2, 70_000)
    for row in ops:
        assert (row.bincount(minlength=14) / 70_000 - 1 / 14).abs().max() < 0.004
    assert abs(negative.float().mean() - 0.5) < 0.01


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_torchvision(name, sign, photographs, device):
    n = len(photographs)
    ops = torch.full((1, n), OPERATIONS.index(name))
    ours = rand_augment(photographs.to(device), ops, torch.full((1, n), sign < 0)).cpu()
    expected = REFERENCE[name](photographs, sign)
    assert ours.dtype == torch.uint8
    if name != "Identity":
        assert (ours != photographs).any()
    if device.type == "cpu":
        assert torch.equal(ours, expected)
    assert (ours.int() - expected.int()).abs().max() <= 1     # a GPU may fuse other products


def test_randaugment_composes_operations_image_by_image(photographs, device):
    generator = torch.Generator().manual_seed(1)
    photographs = photographs[::2]
    ops, negative = draw_randaugment(len(photographs), generator)
    images = photographs.to(device)
    ours = rand_augment(images, ops, negative)
    assert torch.equal(images.cpu(), photographs)             # the input stays
    for i, image in enumerate(photographs):
        for op, minus in zip(ops[:, i], negative[:, i], strict=True):
            image = REFERENCE[OPERATIONS[op]](image, -1 if minus else 1)
        if device.type == "cpu":
            assert torch.equal(ours[i], image)
        else:                       # one level before Solarize or Equalize can become many
            assert (ours[i].cpu() != image).float().mean() < 0.02
    for i in range(3):                                        # a batch of one: empty families
        alone = rand_augment(images[i:i + 1], ops[:, i:i + 1], negative[:, i:i + 1])
        assert torch.equal(alone[0], ours[i])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the CUDA runtime")
def test_augmentation_never_waits_for_the_gpu(photographs):
    images = photographs.cuda()
    draws = draw_randaugment(len(images))
    offsets, background = draw_offsets(len(images), (32, 48), 12.0), torch.zeros(len(images), 3)
    labels = torch.zeros(len(images), dtype=torch.int64, device="cuda")
    rand_augment(images, *draws)                              # fills the table of sources
    torch.cuda.set_sync_debug_mode("error")
    try:
        pixels = rand_augment(images, *draws).float() / 255
        crops, visible = soft_crop(pixels, offsets, background)
        p = confidence(visible, 10, power=2)
        cutout(crops, torch.full((len(images), 2), 5), 8)
        soft_target_loss(crops.flatten(1)[:, :10], labels, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")
