"""SAMix: masks, losses, momentum branch and one full step against the recorded original."""
import argparse
import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import Golden, golden_cases
from torch import nn

from common import distributed
from common.mixing import soft_targets
from samix import configs, main, pretrain
from samix.contrast import (
    Encoder,
    Queue,
    draw_extension,
    encode_keys,
    exchange,
    extend,
    mixed_nce,
    mixed_pair,
)
from samix.main import Draws, SAMix
from samix.mixblock import (
    MixBlock,
    adjust_mask,
    draw_partners,
    mask_columns,
    mask_loss,
    mix,
    plain_near_ends,
    rescale_lambda,
)
from samix.momentum import Branch, head_loss, momentum_update
from samix.schedule import cosine, ema_momentum, parameter_groups

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# --------------------------------------------------------------------------------------- MixBlock

def our_name(name: str) -> str:
    """A recorded parameter's name in MixBlock."""
    for theirs, ours in (("value.conv.0.conv", "value.0"), ("value.conv.0.bn", "value.1"),
                         ("value.conv.1.conv", "value.3"), (".conv.", "."),
                         ("value.weight", "value.0.weight"), ("value.bias", "value.0.bias")):
        name = name.replace(theirs, ours)
    return name


def recorded(case: Golden, prefix: str, device="cpu") -> dict:
    """Arrays whose names begin with `prefix`, by our names."""
    return {our_name(name[len(prefix):]): case.tensor(name, device)
            for name in case if name.startswith(prefix)}


def block_of(case: Golden, weights: dict, device, **options) -> MixBlock:
    """A MixBlock with recorded weights; a number is missing only for num_batches_tracked."""
    block = MixBlock(weights["value.0.weight"].shape[1], **options).to(device)
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert missing in ([], ["value.1.num_batches_tracked"]) and not unexpected
    return block


@pytest.mark.parametrize("path", golden_cases("samix", "f_mixblock"))
def test_mixblock_golden(path, device):
    case = Golden(path)
    features, perm = case.tensor("feat", device), case.tensor("index")
    scale = int(case["scale_factor"])
    for k in (-1, 0.25):
        for mode in ("bilinear", "nearest"):
            for i, lam in enumerate(case["lams"]):
                block = block_of(case, recorded(case, "w__", device), device, lam_mul_k=k,
                                 mode=mode)
                mask = block(features, float(lam), perm, scale)
                assert mask.shape == (4, 2, 32, 32)
                torch.testing.assert_close(mask[:, 1], case.tensor(f"mask_lam_k{k}_{mode}_l{i}",
                                                                   device), **CLOSE)
                torch.testing.assert_close(mask.sum(1), torch.ones_like(mask[:, 0]))
    block = block_of(case, recorded(case, "w__", device), device, lam_mul_k=0.25).eval()
    mask = block(features, case.tensor("lams")[0], perm, scale)
    torch.testing.assert_close(mask[:, 1], case.tensor("mask_lam_eval_k0.25_bilinear_l0", device),
                               **CLOSE)


@pytest.mark.parametrize("path", golden_cases("samix", "f_mixblock"))
def test_mask_loss_golden(path, device):
    case = Golden(path)
    names = {"L1": "l1", "L1_Variance": "l1_variance", "L2_Variance": "l2_variance",
             "Sparsity": "sparsity"}
    for theirs, kind in names.items():
        for k in (-1, 0.25):
            for i, lam in enumerate(case["lams"]):
                share = case.tensor(f"mask_lam_k{k}_bilinear_l{i}", device)
                expected = float(case[f"maskloss_{theirs}_k{k}_l{i}"])
                for mask in (share, torch.stack([1 - share, share], 1)):
                    assert mask_loss(mask, float(lam), kind=kind).item() == \
                        pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert mask_loss(share, float(lam)) == mask_loss(share, float(lam), 0.1, "l1_variance")


@pytest.mark.parametrize("path", golden_cases("samix", "f_mixblock"))
def test_mixblock_gradients_golden(path, device):
    case = Golden(path)
    block = block_of(case, recorded(case, "w__", device), device, lam_mul_k=0.25)
    mask = block(case.tensor("feat", device), case.tensor("lams")[0], case.tensor("index"), 4)
    ramp = torch.linspace(-1, 1, 32, device=device)
    ((mask[:, 1] * ramp).sum() / 100 + mask_loss(mask, case.tensor("lams")[0])).backward()
    gradients = dict(block.named_parameters())
    for name, expected in recorded(case, "g__", device).items():
        torch.testing.assert_close(gradients.pop(name).grad, expected, rtol=1e-3, atol=1e-6)
    assert not gradients


def automix_block(case: Golden, variant: str, device) -> MixBlock:
    """AutoMix's MixBlock with the recorded weights of variant "cat" or "nolam"."""
    block = MixBlock(case["feat"].shape[1], mode="nearest", variant="automix",
                     lam_concat=variant == "cat").to(device)
    weights = recorded(case, f"{variant}_w__", device)
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert set(missing) == {"key.weight", "key.bias"} and not unexpected      # query's own
    return block


@pytest.mark.parametrize("variant", ["cat", "nolam"])
@pytest.mark.parametrize("path", golden_cases("samix", "f_automixblock"))
def test_automix_block_golden(path, variant, device):
    """Masks, their means and losses; lambda changes the masks of the one that sees it alone."""
    case = Golden(path)
    block, features = automix_block(case, variant, device), case.tensor("feat", device)
    scale, lams = int(case["scale_factor"]), case.tensor("lams")
    kinds = {"L1": "l1", "L1_Variance": "l1_variance", "L2_Variance": "l2_variance",
             "Sparsity": "sparsity"}
    for mode in ("nearest", "bilinear"):
        for i, lam in enumerate(lams):
            name = f"{variant}_mask_{mode}" + f"_l{i}" * (variant == "cat")
            mask = block(features, lam, case.tensor("index"), scale, mode=mode)
            for suffix, share in (("", mask[:, 1]), ("_every16", mask[:, 1, ::16, ::16]),
                                  ("_image0", mask[0, 1]), ("_mean", mask[:, 1].mean((1, 2)))):
                if name + suffix in case:
                    torch.testing.assert_close(share, case.tensor(name + suffix, device), **CLOSE)
            for theirs, kind in kinds.items():
                expected = case[f"{variant}_maskloss_{theirs}_{mode}_l{i}"]
                assert mask_loss(mask, lam, kind=kind).item() == pytest.approx(
                    float(expected), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("variant", ["cat", "nolam"])
@pytest.mark.parametrize("path", golden_cases("samix", "f_automixblock"))
def test_automix_block_gradients_golden(path, variant, device):
    case = Golden(path)
    block = automix_block(case, variant, device)
    features = case.tensor("feat", device).requires_grad_()
    lam, scale = case.tensor("lams")[2], int(case["scale_factor"])
    mask = block(features, lam, case.tensor("index"), scale)
    ramp = torch.linspace(-1, 1, mask.shape[3], device=device)
    objective = (mask[:, 1] * ramp).sum() / 100 + mask_loss(mask, lam, kind="l1")
    assert objective.item() == pytest.approx(float(case[f"{variant}_objective"]), rel=1e-3,
                                             abs=1e-4)    # a sum of 1e5 terms
    objective.backward()
    gradients = dict(block.named_parameters())
    for name, expected in recorded(case, f"{variant}_g__", device).items():
        torch.testing.assert_close(gradients.pop(name).grad, expected, rtol=1e-3, atol=1e-5)
    assert not gradients
    if f"{variant}_g_feat" in case:
        torch.testing.assert_close(features.grad, case.tensor(f"{variant}_g_feat", device),
                                   rtol=1e-3, atol=1e-5)


def test_mask_columns():
    """Mean and deviation inside an image; the share of pairs that show one image alone."""
    first = torch.full((4, 1, 2, 2), 0.5)
    first[0], first[1], first[2, :, 0] = 0.952, 0.048, 0.0
    columns = mask_columns(torch.cat([first, 1 - first], 1))
    expected = {"mask_mean": (0.952 + 0.048 + 0.25 + 0.5) / 4, "mask_std": 0.25 / 4,
                "mask_alone": 0.5}
    assert {name: value.item() for name, value in columns.items()} == pytest.approx(expected)


@pytest.mark.parametrize("path", golden_cases("samix", "f_mixblock"))
def test_rescale_lambda_golden(path):
    case = Golden(path)
    grid = case.tensor("rescale_lam_grid")
    for k in (0.0, 0.25, 1.0, 10.0):
        torch.testing.assert_close(rescale_lambda(grid, k), case.tensor(f"rescale_k{k}"), **CLOSE)
    assert torch.equal(rescale_lambda(grid, -1), grid)
    assert torch.equal(rescale_lambda(grid, 99), rescale_lambda(grid, 10))


@pytest.mark.parametrize("path", golden_cases("samix", "f_maskadjust"))
def test_mask_adjustment_golden(path, device):
    case = Golden(path)
    weights = recorded(case, "w__", device)
    images = pixels(case, device)
    block = block_of(case, weights, device, lam_mul_k=0.25).eval()
    features = case.tensor("feat", device)
    lam_mb, lam_bb = case.tensor("lam_mb"), case.tensor("lam_bb")
    perm_mb, perm_bb = case.tensor("index_mb"), case.tensor("index_bb")

    mask_mb = block(features, lam_mb, perm_mb, 4)
    torch.testing.assert_close(mix(images, mask_mb, perm_mb), case.tensor("mix_mb", device),
                               **CLOSE)
    assert 0.1 * mask_loss(mask_mb, lam_mb).item() == \
        pytest.approx(float(case["mask_loss_weighted"]), rel=1e-4, abs=1e-7)

    mask = block(features, lam_bb, perm_bb, 4)
    torch.testing.assert_close(mask[:, 1], case.tensor("raw_mask_bb", device), **CLOSE)
    torch.testing.assert_close(mix(images, plain_near_ends(mask, lam_bb), perm_bb),
                               case.tensor("mix_bb_noadjust", device), **CLOSE)
    for lam, name in ((lam_bb, "correct"), (lam_mb, "ref_lam0_quirk")):
        adjusted = adjust_mask(mask, lam)
        # the recorded masks are the first image's or the partner's
        torch.testing.assert_close(adjusted[:, 1], case.tensor(f"mask_bb_adjust_{name}", device),
                                   **CLOSE)
        torch.testing.assert_close(mix(images, adjusted, perm_bb),
                                   case.tensor(f"mix_bb_adjust_{name}", device), **CLOSE)
        torch.testing.assert_close(adjusted[:, 0].mean((1, 2)).cpu(),
                                   lam.float().expand(4), **CLOSE)
    plain = plain_near_ends(block(features, 0.05, perm_bb, 4), torch.tensor(0.05))
    torch.testing.assert_close(mix(images, plain, perm_bb),
                               case.tensor("mix_bb_margin_lam0.05", device), **CLOSE)


def pixels(case: Golden, device="cpu"):
    return case.tensor("img_u8", device).permute(0, 3, 1, 2).float() / 255


def test_adjustment_margin():
    """Within the margin a mask stays, outside it the mean becomes lambda."""
    mask = torch.rand(3, 1, 6, 5) * torch.tensor([0.2, 1.0, 2.0]).view(3, 1, 1, 1)
    mask = torch.cat([mask.clamp(max=1), 1 - mask.clamp(max=1)], 1)
    adjusted = adjust_mask(mask, 0.5, margin=0.15)
    means = mask[:, 0].mean((1, 2))
    assert (means[1] - 0.5).abs() < 0.15 < (means[0] - 0.5).abs()
    torch.testing.assert_close(adjusted[1], mask[1])
    assert adjusted[0, 0].mean() == pytest.approx(0.5, abs=1e-5)
    assert adjust_mask(mask[:1], 0.3)[:, 0].mean() == pytest.approx(0.3, abs=1e-5)   # a batch of 1


def test_plain_mask_near_the_ends():
    mask = torch.full((4, 2, 3, 3), 0.5)
    lam = torch.tensor([0.05, 0.5, 0.95, 0.09])
    plain = plain_near_ends(mask, lam)[..., 0, 0]
    expected = torch.tensor([[0.05, 0.95], [0.5, 0.5], [0.95, 0.05], [0.5, 0.5]])
    torch.testing.assert_close(plain, expected)


def test_partners_of_another_view(device):
    """The partner's features and images come from the second view, at the same index."""
    torch.manual_seed(0)
    block = MixBlock(8, lam_mul_k=0.25).to(device).eval()
    nn.init.normal_(block.query.weight), nn.init.normal_(block.key.weight)
    nn.init.normal_(block.value[0].weight), nn.init.normal_(block.value[3].weight)
    first, second = torch.randn(2, 5, 8, 4, 4, device=device)
    perm = torch.tensor([3, 0, 4, 1, 2])
    mask = block(first, 0.3, perm, 2, partners=second)
    identity = torch.arange(5)
    torch.testing.assert_close(mask, block(first, 0.3, identity, 2, partners=second[perm]))
    assert (mask - block(first, 0.3, perm, 2)).abs().max() > 1e-3
    images, others = torch.randn(2, 5, 3, 8, 8, device=device)
    torch.testing.assert_close(mix(images, mask, perm, others),
                               images * mask[:, :1] + others[perm] * mask[:, 1:])


@pytest.mark.parametrize("variant", ["samix", "automix"])
def test_block_options(variant, device):
    """lambda per image, mode override, channels-last input, dropout and non-square features."""
    torch.manual_seed(1)
    block = MixBlock(16, 0.25, dropout=0.5, variant=variant).to(device)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(4, 16, 6, 4, device=device)
    perm, lam = torch.tensor([1, 3, 0, 2]), torch.tensor([0.1, 0.4, 0.6, 0.9])
    block.eval()
    mask = block(features, lam, perm, 3)
    assert mask.shape == (4, 2, 18, 12) and mask.dtype == torch.float32
    last = block(features.contiguous(memory_format=torch.channels_last), lam, perm, 3)
    torch.testing.assert_close(mask, last, **CLOSE)
    for i in range(4):
        torch.testing.assert_close(mask[i], block(features, lam[i], perm, 3)[i], **CLOSE)
    nearest = block(features, lam, perm, 3, mode="nearest")
    assert (nearest[..., ::3, ::3] == nearest[..., 1::3, 2::3]).all()
    assert not (mask[..., ::3, ::3] == mask[..., 1::3, 2::3]).all()
    block.train()
    assert not torch.equal(block(features, lam, perm, 3), block(features, lam, perm, 3))
    with torch.autocast(device.type, torch.bfloat16):
        mask = block(features, lam, perm, 3)
    assert mask.dtype == torch.float32 and mask.isfinite().all()
    mask[:, 1].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_parameter_counts():
    """The recorded originals' numbers of parameters."""
    for channels, count in ((256, 164_480), (384, 369_600), (768, 1_476_480), (1024, 2_624_000)):
        assert sum(p.numel() for p in MixBlock(channels).parameters()) == count
    for concat in (True, False):
        block = MixBlock(64, variant="automix", lam_concat=concat)
        assert sum(p.numel() for p in block.parameters()) == (64 + concat) * 33 + 32 + 1
    weights = {name: p for name, p in MixBlock(256).named_parameters() if "value.1" not in name}
    assert all(p.std() < 0.012 for p in weights.values())


def test_partners_without_repeat():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 16):
        for _ in range(40):
            perm = draw_partners(n, generator, no_repeat=True)
            assert (perm != torch.arange(n)).all() and (perm.sort().values == torch.arange(n)).all()
    assert any((draw_partners(4, generator) == torch.arange(4)).any() for _ in range(20))
    assert draw_partners(1, generator, no_repeat=True).tolist() == [0]


# ------------------------------------------------------------------------------ losses, schedules

@pytest.mark.parametrize("path", golden_cases("samix", "g_losses"))
def test_losses_golden(path, device):
    case = Golden(path)
    labels, perm, lam = case.tensor("y", device), case.tensor("index"), case.tensor("lam")
    mixed = soft_targets(labels, perm, lam, 10)
    for name, targets, options in [
            ("one_q", labels, {}), ("mix_q", mixed, {}), ("mix_k_neg0", mixed, {}),
            ("mix_k_neg0.5", mixed, {}), ("mix_k_neg1", mixed, {}),      # eta does nothing in CE
            ("mix_bce_neg0.5", mixed, {"head": "bce", "neg_weight": 0.5}),
            ("mix_bce_neg1", mixed, {"head": "bce"})]:
        logits = case.tensor("logits", device).requires_grad_()
        loss = head_loss(logits, targets, **options)
        loss.backward()
        assert loss.item() == pytest.approx(float(case[name]), rel=1e-4)
        torch.testing.assert_close(logits.grad, case.tensor(f"g_{name}", device), **CLOSE)
    logits = case.tensor("logits", device)
    torch.testing.assert_close(head_loss(logits, labels, head="bce"),
                               head_loss(logits, F.one_hot(labels, 10).float(), head="bce"))


def test_label_smoothing():
    """y·0.9 + 0.1/K, for clean labels and for each term of a mixture."""
    logits, labels = torch.randn(6, 5), torch.tensor([0, 3, 2, 4, 1, 1])
    perm, lam = torch.tensor([5, 4, 3, 2, 1, 0]), 0.3
    smooth = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    log_p = logits.log_softmax(1)
    one, two = -(smooth * log_p).sum(1).mean(), -(smooth[perm] * log_p).sum(1).mean()
    torch.testing.assert_close(head_loss(logits, labels, smoothing=0.1), one)
    torch.testing.assert_close(
        head_loss(logits, soft_targets(labels, perm, torch.tensor(lam), 5), smoothing=0.1),
        lam * one + (1 - lam) * two)


@pytest.mark.parametrize("path", golden_cases("samix", "g_schedules"))
def test_schedules_golden(path):
    case = Golden(path)
    for name in ("cifar", "imagenet", "vit"):
        base, end, start, _, total = case[f"ema_{name}_cfg"]
        ours = [ema_momentum(t, int(total), base, end, start) for t in range(int(total))]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64),
                                   case.tensor(f"ema_{name}"), rtol=0, atol=1e-9)
    for total in (400, 2000):
        ours = torch.tensor([0.1 * cosine(t, total) for t in range(total)], dtype=torch.float64)
        torch.testing.assert_close(ours, case.tensor(f"mask_loss_intended_T{total}"), **CLOSE)


# ---------------------------------------------------------------------- the momentum branch, a step

class Tiny(nn.Module):
    """The recorded backbone: three strided convolutions; features after the second and third."""

    def __init__(self, widths=(8, 24, 32)):
        super().__init__()
        for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False), 1):
            setattr(self, f"c{i}", nn.Conv2d(before, after, 3, 2, 1, bias=False))
            setattr(self, f"b{i}", nn.BatchNorm2d(after))

    def forward(self, x):
        maps = []
        for i in (1, 2, 3):
            x = getattr(self, f"b{i}")(getattr(self, f"c{i}")(x)).relu()
            maps.append(x)
        return maps[1], maps[2].mean((2, 3))


LOSSES = {"one_q": "loss_one_q", "mix_q": "loss_mix_q", "mix_k": "loss_mix_k",
          "mask": "mask_loss_w"}
ROUTES = {"one_q": {"q.backbone", "q.one"}, "mix_q": {"q.backbone", "q.mix"},
          "mix_k": {"block.query", "block.key", "block.value"},
          "mask": {"block.query", "block.key", "block.value"}}


def state_of(case: Golden, prefix: str, device) -> dict:
    """A recorded full state under the names of Step."""
    out = {}
    for name, tensor in recorded(case, prefix, device).items():
        for theirs, ours in (("mix_block.", "block."), ("backbone_q.", "q.backbone."),
                             ("backbone_k.", "k.backbone."), ("head_mix_q.fc", "q.mix"),
                             ("head_one_q.fc", "q.one"), ("head_mix_k.fc", "k.mix"),
                             ("head_one_k.fc", "k.one")):
            name = name.replace(theirs, ours)
        out[name] = tensor
    return out


FLAGS = argparse.Namespace(head="ce", neg_weight=0.5, label_smoothing=0.0, one_weight=1.0,
                           mix_q_weight=1.0, mix_k_weight=1.0, mask_margin=0.1, lam_margin=0.08,
                           mask_loss_kind="l1_variance")


def recorded_step(case: Golden, device, block=None, **settings):
    """main.py's network with the recorded state, and the arguments of the recorded step."""
    flags = argparse.Namespace(**vars(FLAGS) | settings)
    step = SAMix(Branch(Tiny(), 32, 10), block or MixBlock(24, lam_mul_k=0.25), flags).to(device)
    state = state_of(case, "w__", device) | state_of(case, "buf0__", device)
    missing, unexpected = step.load_state_dict(state, strict=False)
    assert not unexpected and all("num_batches_tracked" in name or block and "block.key" in name
                                  for name in missing)
    mean, std = (case.tensor(f"norm_{v}", device).float().view(3, 1, 1) for v in ("mean", "std"))
    return step, ((pixels(case, device) - mean) / std, case.tensor("y", device),
                  Draws(case.tensor("lam_mb"), case.tensor("lam_bb"), case.tensor("index_bb"),
                        case.tensor("index_mb")), 0.1)


def check_step(case: Golden, device, step, arguments):
    """Fails unless losses, images, every gradient and every statistic are the recorded ones."""
    losses, _, (mix_mb, mix_bb) = step(*arguments)
    for name, theirs in LOSSES.items():
        assert losses[name].item() == pytest.approx(float(case[f"loss__{theirs}"]), rel=1e-4,
                                                    abs=1e-6)
    torch.testing.assert_close(mix_mb, case.tensor("mix_mb", device), **CLOSE)
    torch.testing.assert_close(mix_bb, case.tensor("mix_bb", device), **CLOSE)
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(case["loss__total"]), rel=1e-4)
    total.backward()
    gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    expected = state_of(case, "g__", device)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3, atol=1e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")
    buffers = dict(step.named_buffers())
    for name, after in state_of(case, "buf1__", device).items():
        torch.testing.assert_close(buffers[name], after, **CLOSE)


@pytest.mark.parametrize("path", golden_cases("samix", "g_fullstep"))
def test_full_step_golden(path, device):
    case = Golden(path)
    check_step(case, device, *recorded_step(case, device))


@pytest.mark.parametrize("path", golden_cases("samix", "g_automix_fullstep"))
def test_automix_full_step_golden(path, device):
    """AutoMix's whole step, the optimizer's and the momentum branch's update included."""
    case = Golden(path)
    block = MixBlock(24, mode="nearest", variant="automix", lam_concat="cat" in path.name)
    step, arguments = recorded_step(case, device, block, mask_loss_kind="l1")
    torch.testing.assert_close(step.k.backbone(arguments[0])[0],
                               case.tensor("feature_k", device), **CLOSE)
    step, arguments = recorded_step(case, device, block, mask_loss_kind="l1")
    check_step(case, device, step, arguments)
    flags = argparse.Namespace(momentum=0.9, block_momentum=0.9, weight_decay=1e-4, optimizer="sgd")
    torch.optim.SGD(parameter_groups(step, flags), 0.1).step()
    momentum_update(step.k, step.q, 0.999)
    parameters = step.state_dict()
    for name, expected in state_of(case, "after__", device).items():
        torch.testing.assert_close(parameters[name], expected, rtol=3e-6, atol=3e-7)


def reached(step, loss) -> set:
    """Names of the modules that `loss` gives a gradient."""
    step.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {".".join(name.split(".")[:2]) for name, p in step.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("path", golden_cases("samix", "g_fullstep_seed7"))
def test_routing(path, device):
    """Which loss reaches which parameters, as recorded; branch k never gets a gradient."""
    step, arguments = recorded_step(Golden(path), device)
    losses, *_ = step(*arguments)
    for name, loss in losses.items():
        assert reached(step, loss) == ROUTES[name], name
    assert not any(p.requires_grad for p in step.k.parameters())


def cut_mask_loss(step):
    forward = step.forward

    def cut(*arguments):
        losses, *images = forward(*arguments)
        return losses | {"mask": losses["mask"].detach()}, *images
    step.forward = cut


def swap_heads(step):
    step.q.forward = lambda images, head: Branch.forward(
        step.q, images, {"one": "mix", "mix": "one"}[head])


WRONG_ROUTES = {
    "mix_k reaches branch k": lambda step: step.k.requires_grad_(True),
    "mix_k stops before the block": lambda step: setattr(
        step.k, "forward", lambda images, head: Branch.forward(step.k, images.detach(), head)),
    "mix_k through branch q": lambda step: setattr(step.k, "forward", step.q.forward),
    "mix_q reaches the block": lambda step: setattr(
        step, "masks_for_q", functools.partial(SAMix.masks_for_q.__wrapped__, step)),
    "one_q and mix_q swap heads": swap_heads,
    "mask loss reaches nothing": cut_mask_loss,
}


@pytest.mark.parametrize("how", WRONG_ROUTES)
@pytest.mark.parametrize("path", golden_cases("samix", "g_fullstep_seed7"))
def test_wrong_routing_is_seen(path, how):
    """The golden comparison fails for each loss that is routed wrongly."""
    case = Golden(path)
    step, arguments = recorded_step(case, "cpu")
    WRONG_ROUTES[how](step)
    with pytest.raises(AssertionError):
        check_step(case, "cpu", step, arguments)


def test_momentum_update(device):
    """k moves to q by 1 - momentum; statistics are k's own after the start."""
    torch.manual_seed(0)
    q = Branch(Tiny(), 32, 10).to(device)
    q(torch.randn(4, 3, 16, 16, device=device))                      # statistics worth copying
    k = copy.deepcopy(q).requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(q.state_dict().values(),
                                                 k.state_dict().values(), strict=True))
    with torch.no_grad():
        for parameter in q.parameters():
            parameter.add_(torch.randn_like(parameter))
    q(torch.randn(4, 3, 16, 16, device=device))
    before = copy.deepcopy(k)
    momentum_update(k, q, 0.9)
    for new, old, target in zip(k.parameters(), before.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * target)
        assert not new.requires_grad
    for new, old in zip(k.buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old)
    momentum_update(k, q, 0.0)
    torch.testing.assert_close(list(k.parameters()), list(q.parameters()))


# --------------------------------------------------------------------------------- configurations

ALIASES = ("imagenet_r18 imagenet_r34 imagenet_r50 imagenet_r101 imagenet_rx101 cifar100_r18 "
           "cifar100_rx50 cifar100_wrn28_8 tiny_r18 tiny_rx50 cub_r18 cub_rx50 aircraft_r18 "
           "inat2017_r50 places205_r50 cifar100_deit_s cifar100_swin_t cifar100_convnext_t").split()

# The paper's table: arch, batch, epochs, lr, min, decay, block lr/momentum/min, k, dropout, EMA end
TABLE = {
    "imagenet_r18": ("resnet18", 256, 100, .1, 0, 1e-4, .1, .9, 1e-3, -1, .1, .99999),
    "cifar100_r18": ("resnet18", 100, 400, .1, .05, 1e-4, .1, .9, .05, .25, 0, .999999),
    "cifar100_wrn28_8": ("wrn28_8", 100, 400, .03, 1e-3, 1e-3, .03, 0, 1e-3, .25, 0, .999999),
    "tiny_r18": ("resnet18", 100, 400, .2, .05, 1e-4, .1, .9, 1e-3, -1, 0, .999999),
    "tiny_rx50": ("resnext50_32x4d", 100, 400, .2, .05, 1e-4, .1, .9, 1e-3, .25, 0, .999999),
    "cub_rx50": ("resnext50_32x4d", 16, 200, 1e-3, 0, 5e-4, .01, .9, 5e-4, 1, .1, .99999),
    "aircraft_r18": ("resnet18", 16, 200, 1e-3, 0, 5e-4, .01, .9, 5e-4, 1, .1, .99996),
    "inat2017_r50": ("resnet50", 256, 100, .1, 0, 1e-4, .1, .9, 1e-4, -1, .1, .99999),
    "cifar100_deit_s": ("deit_s", 100, 200, 7.5e-4, 1e-4, .05, 7.5e-4, .9, 1e-4, -1, .1, .99996),
    "cifar100_swin_t": ("swin_t", 100, 200, 5e-4, 1e-4, .05, 5e-4, .9, 1e-4, -1, .1, .99996),
    "cifar100_convnext_t": ("convnext_t", 100, 200, 1e-3, 1e-4, .05, 7.5e-4, .9, 1e-4, -1, .1,
                            .99996),
    "swin_t_l3_a2_near_bili_val_dp01_sz224_mlr2e_4_bs100_ep600":
        ("swin_t", 100, 600, 5e-4, 2e-4, .05, 7.5e-4, .9, 1e-4, -1, .1, .99996),
    "r50_l2_a2_bili_val_dp01_mul_mb_mlr1e_3_m0_bb_mlr0_4xb64_ep100":
        ("resnet50", 256, 100, .1, 0, 1e-4, .1, 0, 1e-3, -1, .1, .99999),
    "r50_l2_a2_bili_val_dp01_mul_mb_mlr1e_3_m09_bb_mlr0_4xb64_ep300":
        ("resnet50", 256, 300, .1, 0, 1e-4, .1, .9, 1e-3, -1, .1, .99999),
}
COLUMNS = ("arch", "batch_size", "epochs", "lr", "min_lr", "weight_decay", "block_lr",
           "block_momentum", "block_min_lr", "lam_mul_k", "dropout", "ema_end")


def config(name: str, method: str = "samix") -> dict:
    """Every flag under a configuration, but for the method's name."""
    values = vars(main.parse_args(["--config", name, "--method", method]))
    return values | {"method": None, "mode": tuple(values["mode"])}


@pytest.mark.parametrize("name", TABLE)
def test_config_values(name):
    values = config(name)
    assert tuple(values[column] for column in COLUMNS) == TABLE[name]


# What the table's columns leave out: of all, then of each family, then of one alone
SETTINGS = {"mask_anneal": True, "ema_start": .1, "ema_base": .999, "lr_every": "epoch",
            "warmup_epochs": 0, "clip_grad": 0, "optimizer": "sgd", "momentum": .9,
            "mode": ("bilinear",), "crop": "resized", "crop_scale": .08, "resize_first": False,
            "randaugment": False, "label_smoothing": 0, "no_repeat": False, "pretrained": "",
            "drop_last": False, "neg_weight": 1, "lam_margin": .08, "mask_loss": .1,
            "mask_margin": .1, "alpha": 2, "image_size": 224, "layer": 3, "mask_adjust": 0}
VIT = {"optimizer": "adamw", "lr_every": "step", "warmup_epochs": 20, "clip_grad": 20,
       "label_smoothing": .1, "ema_start": .25, "crop_scale": .8, "randaugment": True,
       "mode": ("nearest",)}
FAMILIES = {
    ("imagenet_r18", "imagenet_r34", "imagenet_r50", "imagenet_r101", "imagenet_rx101",
     "inat2017_r50", "places205_r50"): {},
    ("cifar100_r18", "cifar100_rx50"): {
        "mask_anneal": False, "crop": "reflect", "image_size": 32, "neg_weight": .5},
    ("cifar100_wrn28_8",): {"mask_anneal": False, "crop": "reflect", "image_size": 32,
                            "neg_weight": .5, "layer": 2},
    ("tiny_r18", "tiny_rx50"): {"mask_anneal": False, "image_size": 64, "neg_weight": .5},
    ("cub_r18", "cub_rx50", "aircraft_r18", "aircraft_rx50"): {
        "crop_scale": .5, "resize_first": True, "no_repeat": True, "pretrained": "torchvision",
        "drop_last": True},
    ("cifar100_deit_s",): {**VIT, "layer": 6},
    ("cifar100_swin_t",): VIT,
    ("cifar100_convnext_t",): {**VIT, "image_size": 32, "mode": ("bilinear",)},
}


@pytest.mark.parametrize("name, settings", [(name, settings) for names, settings in FAMILIES.items()
                                            for name in names])
def test_config_settings(name, settings):
    values = config(name)
    assert {key: values[key] for key in SETTINGS} == SETTINGS | settings
    assert {name for names in FAMILIES for name in names} == set(configs.CONFIGS)


def test_config_names():
    """Aliases, and file names with and without path and .py, give the same values."""
    assert set(ALIASES) <= set(configs.CONFIGS)
    for name in TABLE:
        for method in configs.METHODS:
            assert config(name, method)["lam_concat"] or method == "automix"
    stem = "r18_l2_a2_bili_val_dp01_mul_mb_mlr1e_3_bb_mlr0_4xb64"
    for name in (f"{stem}.py", f"configs/classification/imagenet/samix/basic/{stem}.py"):
        assert config(name) == config("imagenet_r18") | {"config": name}
    ep800 = config("r18_l2_a2_bili_val_dp0_mul_x_cat_L1_var_01_mlr5e_2_lam_mul_k0_25_"
                   "mask_adjust0_25_ep800")
    assert (ep800["mask_adjust"], ep800["epochs"]) == (0.25, 800)
    found = {configs.find(f"{folder}/samix/{alias.removeprefix(family + '_')}_{name}.py")
             [0] for (folder, family), files in configs.FILES.items() for name in files
             for alias in configs.CONFIGS if alias.startswith(f"{family}_")}
    assert found == set(configs.CONFIGS)
    configs.config("imagenet_r18")["image_size"] = 7
    assert configs.config("imagenet_r18")["image_size"] == 224


def test_config_unknown():
    with pytest.raises(ValueError, match="imagenet_r18"):
        configs.config("imagnet_r18")
    with pytest.raises(ValueError, match="one of cub_r18, aircraft_r18: give the path"):
        configs.config("r18_l2_a2_bili_val_dp01_mb_mlr5e_4_1xb16_ep200.py")
    assert configs.config("cub200/samix/r18_l2_a2_bili_val_dp01_mb_mlr5e_4_1xb16_ep200.py"
                          )["dataset"] == "cub200"


def test_config_methods():
    assert config("cifar100_r18")["mask_loss_kind"] == "l1_variance"
    assert config("cifar100_r18", "automix")["mask_loss_kind"] == "l1"
    assert config("cifar100_r18", "cutmix")["alpha"] == 0.2
    assert config("imagenet_r50", "mixup")["alpha"] == 0.2
    convnext = config("convnext_t_l2_a2_bili_val_dp01_lr2e_3_mlr1e_4_bs100_ep600")
    assert (convnext["lr"], convnext["block_lr"], convnext["epochs"]) == (2e-3, 1e-3, 600)


# What AutoMix has of its own, beside its block, l1, nearest enlargement and no dropout
VIT_RATES = {"lr": 5e-4, "block_lr": 1e-3, "clip_grad": 10}
AUTOMIX = {
    **dict.fromkeys(("imagenet_r18", "imagenet_r34", "imagenet_r101", "imagenet_rx101",
                     "inat2017_r50", "cub_r18"), {}),
    "imagenet_r50": {"block_momentum": 0},
    **dict.fromkeys(("cifar100_r18", "cifar100_rx50", "cifar100_wrn28_8", "tiny_r18", "tiny_rx50"),
                    {"lam_concat": False}),
    "cub_rx50": {"mask_loss_kind": "l1_variance"}, "aircraft_r18": {"ema_end": 0.99999},
    "aircraft_rx50": {"mask_loss_kind": "l1_variance", "ema_end": 0.99999},
    "places205_r50": {"block_min_lr": 1e-3},
    "cifar100_deit_s": VIT_RATES | {"warmup_epochs": 5}, "cifar100_swin_t": VIT_RATES,
    "swin_t_l3_a2_near_bili_val_dp01_sz224_mlr2e_4_bs100_ep600": VIT_RATES | {
        "block_lr": 7.5e-4, "min_lr": 2e-4, "mode": ("bilinear", "nearest")},
    "cifar100_convnext_t": {"lr": 2e-3, "block_lr": 1e-3, "clip_grad": 0},
}


@pytest.mark.parametrize("name", AUTOMIX)
def test_automix_settings(name):
    assert set(configs.CONFIGS) <= set(AUTOMIX)
    common = {"mask_loss_kind": "l1", "mode": ("nearest",), "dropout": 0,
              "mask_adjust": 0, "label_smoothing": 0}
    assert config(name, "automix") == config(name) | common | AUTOMIX[name]


# -------------------------------------------------------------------------------- self-supervised

def unit(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator)).to(device)


def test_contrastive_losses(device):
    """InfoNCE, its mixture and the pair loss against cross entropies over written-out logits."""
    query, first, second = (unit(6, 8, seed=i, device=device) for i in range(3))
    query.requires_grad_()
    negatives, lam, zero = unit(20, 8, seed=3, device=device), 0.3, torch.zeros(6).long().to(device)

    def cross_entropy(key):
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], 1) / 0.2
        return F.cross_entropy(logits, zero)

    pair = torch.stack([(query * key).sum(1) for key in (first, second)], 1) / 0.1
    soft = torch.tensor([[lam, 1 - lam]], device=device).expand(6, 2)
    for ours, plain in [
            (mixed_nce(query, first, first, 1.0, negatives), cross_entropy(first)),
            (mixed_nce(query, first, second, lam, negatives),
             lam * cross_entropy(first) + (1 - lam) * cross_entropy(second)),
            (mixed_pair(query, first, second, lam, 0.1), F.cross_entropy(pair, soft))]:
        torch.testing.assert_close(ours, plain)
        gradients = (torch.autograd.grad(loss, query, retain_graph=True) for loss in (ours, plain))
        torch.testing.assert_close(*gradients)


def test_keys_get_no_gradient():
    query, first, second = (unit(4, 8, seed=i).requires_grad_() for i in range(3))
    negatives = unit(9, 8, seed=3).requires_grad_()
    (mixed_nce(query, first, second, 0.4, negatives) + mixed_pair(query, first, second, 0.4)
     ).backward()
    assert query.grad is not None
    assert first.grad is None and second.grad is None and negatives.grad is None


def test_queue(device):
    """The newest keys stay, the position wraps around, and a checkpoint brings both back."""
    torch.manual_seed(0)
    queue = Queue(10, 4).to(device)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(10, device=device))
    batches = [unit(4, 4, seed=i, device=device) for i in range(4)]
    for batch in batches:
        queue.enqueue(batch)
    newest = torch.cat(batches)[-10:]
    assert all((queue.keys == key).all(1).any() for key in newest)
    assert queue.position == 6
    other = Queue(10, 4).to(device)
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(batches[0])
    assert torch.equal(queue.keys, other.keys) and torch.equal(queue.keys[6:], batches[0])
    query = unit(2, 4, device=device).requires_grad_()
    loss = mixed_nce(query, query.detach(), query.detach(), 1.0, queue.keys)
    queue.enqueue(batches[1])
    with pytest.raises(RuntimeError, match="inplace"):      # before backward: seen, not silent
        loss.backward()


def test_extended_keys():
    """Interpolated keys lie between the views' keys, extrapolated ones beyond the first."""
    first, second = unit(50, 16, seed=0), unit(50, 16, seed=1)
    generator = torch.Generator().manual_seed(2)
    drawn = [draw_extension(first.shape, generator) for _ in range(200)]
    beyond = [weight for weight in drawn if weight.max() > 1]
    within = [weight for weight in drawn if weight.max() <= 1]
    assert 0.35 < len(beyond) / 200 < 0.65
    for extrapolate, weight in ((False, within[0]), (True, beyond[0])):
        assert weight.min() > extrapolate and weight.max() < 1 + extrapolate
        assert weight.var() == pytest.approx(0.05, rel=0.2)      # Beta(2, 2)
        key = extend(first, second, weight)
        torch.testing.assert_close(key.norm(dim=1), torch.ones(50))
        assert ((key * first).sum(1) > (key * second).sum(1)).float().mean() > 0.4 + extrapolate / 2
    torch.testing.assert_close(extend(first, second, torch.ones(())), first)


def contrast_step(device):
    torch.manual_seed(0)
    flags = pretrain.parse_args("--dataset digits --queue 256 --extend_weight 0.5".split())
    step = pretrain.Contrast(Encoder(Tiny(), 32, 16), MixBlock(24, 0.25), flags).to(device)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, 6, 3, 32, 32, generator=generator).to(device)
    perms = [draw_partners(6, generator, no_repeat=True) for _ in range(2)]
    step.order = torch.randperm(12)
    step.extension = draw_extension((6, 16), generator) % 1 + 1         # beyond the first key
    draws = Draws(torch.tensor(0.6), torch.tensor(0.3), *perms)
    return step, Queue(24, 16).to(device), (*views, draws)


def test_contrast_routing(device):
    """The encoder learns from its two losses, the MixBlock from its three, the keys' never."""
    step, queue, arguments = contrast_step(device)
    losses, keys, _ = step(*arguments, queue.keys, step.order, step.extension)
    for name, loss in losses.items():
        encoder = {"q.backbone", "q.projection"}
        expected = encoder if name in ("moco", "mix") else ROUTES["mask"]
        assert reached(step, loss) == expected, name
    assert not keys.requires_grad and keys.shape == (6, 16)
    queue.enqueue(keys)


def test_contrast_partners_correspond(device):
    """The masks' partners are of the second view, at the partners' places: permuting that view, and
    the partners back, changes nothing."""
    step, queue, (view_q, view_k, draws) = contrast_step(device)
    step.eval()
    order = torch.tensor([2, 0, 1, 5, 3, 4])                # view_k[order][back] is view_k
    back = order.argsort()
    losses, *_ = step(view_q, view_k, draws, queue.keys, step.order, step.extension)
    draws = draws._replace(perm_bb=back[draws.perm_bb], perm_mb=back[draws.perm_mb])
    others, *_ = step(view_q, view_k[order], draws, queue.keys, step.order, step.extension)
    torch.testing.assert_close(others["mask"], losses["mask"], **CLOSE)


def test_contrast_meets_the_right_keys(device):
    """A mixture's first image is of view q, its partner of view k; each meets the other view's key,
    in the extended positives too."""
    step, queue, (view_q, view_k, draws) = contrast_step(device)
    step.eval()
    nn.init.normal_(step.k.projection[2].weight)            # keys that are far apart
    losses, keys, _ = step(view_q, view_k, draws, queue.keys, step.order, step.extension)
    (features_q, key_q), (features_k, key_k) = step.k(view_q), step.k(view_k)
    torch.testing.assert_close(keys, key_k)
    mask = step.block(features_q, draws.lam_mb, draws.perm_mb, 4, partners=features_k)
    _, mixed = step.k(mix(view_q, mask, draws.perm_mb, view_k))

    def block(first, second):
        return mixed_nce(mixed, first, second[draws.perm_mb], draws.lam_mb, queue.keys)
    torch.testing.assert_close(losses["block"], block(key_k, key_q), rtol=1e-5, atol=0)
    for wrong in ((key_q, key_q), (key_q, key_k), (key_k, key_k)):
        assert (block(*wrong) - losses["block"]).abs() > 1e-5
    more_k, more_q = extend(key_k, key_q, step.extension), extend(key_q, key_k, step.extension)
    torch.testing.assert_close(losses["extend"], mixed_pair(
        mixed, more_k, more_q[draws.perm_mb], draws.lam_mb), rtol=1e-5, atol=0)

    margin = step.args.mask_margin                          # the encoder's mixtures likewise
    mask = adjust_mask(step.block(features_q, draws.lam_bb, draws.perm_bb, 4, partners=features_k),
                       draws.lam_bb, margin=margin)
    _, query = step.q(mix(view_q, mask, draws.perm_bb, view_k))

    def encoder(first, second):
        return mixed_nce(query, first, second[draws.perm_bb], draws.lam_bb, queue.keys)
    torch.testing.assert_close(losses["mix"], encoder(key_k, key_q), rtol=1e-5, atol=0)
    for wrong in ((key_q, key_q), (key_q, key_k), (key_k, key_k)):
        assert (encoder(*wrong) - losses["mix"]).abs() > 1e-5


def test_at_lambda_one_the_loss_is_mocos(device):
    """Nothing is mixed at lambda 1: the encoder's loss of mixtures is MoCo's, gradients too."""
    step, queue, (view_q, view_k, draws) = contrast_step(device)
    one = torch.tensor(1.0)
    losses, *_ = step(view_q, view_k, draws._replace(lam_bb=one, lam_mb=one), queue.keys,
                      step.order, step.extension)
    torch.testing.assert_close(losses["mix"], losses["moco"], rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(losses[name], list(step.q.parameters()), retain_graph=True)
                 for name in ("mix", "moco"))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_contrast_learns(device):
    """Fifteen steps on one batch: the block's and the encoder's losses fall; k follows slowly."""
    step, queue, arguments = contrast_step(device)
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    history = []
    for _ in range(15):
        losses, *_ = step(*arguments, queue.keys, step.order, step.extension)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        momentum_update(step.k, step.q, 0.9)
        history.append({name: loss.item() for name, loss in losses.items()})
    assert history[-1]["moco"] < 0.7 * history[0]["moco"]
    assert history[-1]["mix"] < history[0]["mix"]


def two_ranks(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    images = torch.arange(12.0).view(4, 3) + 100 * rank
    everything = torch.cat([torch.arange(12.0).view(4, 3) + 100 * r for r in range(2)])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(distributed.gather_rows(images), everything)
    shuffled = exchange(images, order)
    assert torch.equal(shuffled, everything[order[4 * rank:4 * rank + 4]])
    assert torch.equal(exchange(shuffled, order.argsort()), images)
    torch.manual_seed(0)
    queue = Queue(16, 3)
    queue.enqueue(images)
    assert torch.equal(queue.keys[:8], everything) and queue.position == 8

    # BatchNorm of the shuffled keys saw other images than the queries' BatchNorm on this rank
    norm = nn.BatchNorm1d(3, momentum=1)
    encode_keys(lambda x: (norm(x), x), images, order)
    torch.testing.assert_close(norm.running_mean, shuffled.mean(0))
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path / "meet"),), nprocs=2)
