"""SAFuse's mixing, pooling, attention, losses and networks against the recorded originals."""
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, golden_cases
from programs import close, relabelled

from common import distributed
from common.errors import RunError
from safuse import losses, mixing, network
from safuse.network import Network, SuperpixelAttention, superpixel_pool

# ---------------------------------------------------------------------------------------- mixing

def images_of(case, device):
    return case.tensor("img_u8", device).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("trim", [None, False])
@pytest.mark.parametrize("path", golden_cases("safuse", "a_mix_"))
def test_superpixel_mix_golden(path, trim, device):
    case = Golden(path)
    chosen = case.tensor("bern_draw") == (1 if "lgcoa" in path.name else 0)
    mixed, fused, from_b = mixing.superpixel_mix(
        images_of(case, device), case.tensor("rand_index"), case.tensor("map_a", device).long() - 1,
        case.tensor("map_b", device).long() - 1, chosen, num_a=40, trim=trim)
    close(mixed, case.tensor("mixed", device))
    ranks, expected_from_b = relabelled(case.tensor("fused_map"))
    assert torch.equal(fused.cpu(), ranks)
    size = expected_from_b.shape[1]
    if trim is False:
        assert from_b.shape[1] == 40 + chosen.shape[1] and not from_b[:, size:].any()
    assert torch.equal(from_b[:, :size].cpu(), expected_from_b)
    counts = superpixel_pool(mixed, fused, from_b.shape[1])[1]
    pixels = case.tensor("nb_pixels", device).clamp(min=0)
    close(counts[:, :size], pixels)
    close(mixing.area_ratio(counts, from_b), case.tensor("mask", device).float().mean((1, 2)))


def test_superpixel_mix_without_bounds(device):
    """labels_a may reach further than chosen; a label that is cut into pieces stays one."""
    labels_a = torch.tensor([[[0, 0, 0], [5, 5, 5]]], device=device)
    labels_b = torch.tensor([[[0, 1, 0], [0, 0, 0]]], device=device)
    images = torch.arange(6.0, device=device).view(1, 1, 2, 3)
    _, fused, from_b = mixing.superpixel_mix(images, torch.tensor([0]), labels_a, labels_b,
                                             torch.tensor([[False, True]]))
    assert fused[0].tolist() == [[0, 2, 0], [1, 1, 1]]
    assert from_b[0, :3].tolist() == [False, False, True]


def occamix(images, perm, scores, labels_b, cells, num_b=None):
    chosen = mixing.attentive_superpixels(scores[perm], labels_b, cells, num_b=num_b)
    mixed, fused, from_b = mixing.superpixel_mix(images, perm, labels_b, labels_b, chosen)
    return mixed, 1 - from_b.gather(1, fused.flatten(1)).float().mean(1)


@pytest.mark.parametrize("path", golden_cases("safuse", "e_occamix"))
def test_occamix_golden(path, device):
    case = Golden(path)
    labels = case.tensor("seg_maps", device).long()
    labels -= labels.amin((1, 2), keepdim=True)
    args = (images_of(case, device), case.tensor("rand_index"), case.tensor("scores", device),
            labels, int(case["N"]))
    for num_b in (None, 60):
        mixed, ratio = occamix(*args, num_b)
        close(mixed, case.tensor("mixed", device))
        close(1 - ratio, case.tensor("lam", device))
    maps = network.activation_maps(case.tensor("cam_f", device), case.tensor("cam_w", device))
    close(maps.amax(1), case.tensor("cam_scores", device))


def test_occamix_takes_lowest_label_of_equals(device):
    """Two superpixels lie wholly in the best cell: the lower label is pasted, and only it."""
    labels = torch.tensor([[2, 1, 0, 0], [2, 1, 0, 0], [0] * 4, [0] * 4], device=device)
    labels = torch.stack([labels, labels.flip(1)])
    scores = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=device).expand(2, 2, 2)
    images = torch.tensor([0.0, 1.0], device=device)[:, None, None, None].expand(2, 3, 4, 4)
    mixed, ratio = occamix(images, torch.tensor([1, 0]), scores, labels, 1)
    assert ratio.tolist() == [1 - 2 / 16, 1 - 12 / 16]
    assert torch.equal(mixed[0, 0] == 1, labels[0] == 1)
    assert torch.equal(mixed[1, 2] == 0, labels[1] == 0)


@pytest.mark.parametrize("at_least_one, expected", [(True, 1), (False, 2)])
def test_top_superpixels_of_few(at_least_one, expected, device):
    """int(0.4 · 2) is 0: the best one, or all; padding is never taken."""
    scores = torch.tensor([[1.0, 3.0, 9.0], [2.0, 5.0, 1.0]], device=device)
    counts = torch.tensor([[4.0, 4.0, 0.0], [1.0, 1.0, 1.0]], device=device)
    index, selected = mixing.top_superpixels(scores, counts, 0.4, at_least_one=at_least_one)
    assert selected.sum(1).tolist() == [expected, 1]
    assert index[0, :expected].tolist() == [1, 0][:expected] and index[1, 0] == 1


# ------------------------------------------------------------------- attention and losses, golden

@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("path", golden_cases("safuse", "bcd_local_"))
def test_local_golden(path, padding, device):
    """From decoder features to the total loss and every gradient."""
    case = Golden(path)
    fused, from_b = relabelled(case.tensor("fused_map"))
    from_b = F.pad(from_b, (0, padding)).to(device)
    features = case.tensor("feats", device).requires_grad_()
    attention, fc_local = SuperpixelAttention(8).to(device), torch.nn.Linear(8, 10).to(device)
    modules = {"q": attention.query, "k": attention.key, "v": attention.value,
               "ln": attention.norm, "fc_local": fc_local}
    with torch.no_grad():
        for name, module in modules.items():
            module.weight.copy_(case.tensor(f"{name}_w"))
            module.bias.copy_(case.tensor(f"{name}_b"))

    means, counts = superpixel_pool(features, fused.to(device), from_b.shape[1])
    attended, scores = attention(means, counts)
    present = counts > 0
    assert present.sum(1).tolist() == case["n_fused"].tolist()
    close(means[present], case.tensor("pooled", device))
    if "attended" in case:
        close(attended[present], case.tensor("attended", device))
    weights = scores.sigmoid()
    close(weights[present], case.tensor("sp_weights", device))

    cub, safuse = "cub" in path.name, "safuse" in path.name
    index, selected = mixing.top_superpixels(scores, counts, float(case["topN_ratio"]),
                                         at_least_one=cub)
    assert selected.sum(1).tolist() == case["n_top"].tolist()
    expected = case.tensor("topn_idx", device)
    assert torch.equal(index[selected], expected[expected >= 0])
    area, seen = mixing.area_ratio(counts, from_b), mixing.attention_ratio(weights, counts, from_b)
    assert not seen.requires_grad
    close(area, case.tensor("lam0", device))
    close(seen, case.tensor("lam1", device))
    ratio = seen if cub else (area + seen) / 2
    close(ratio, case.tensor("lam", device))

    labels, perm = case.tensor("labels", device), case.tensor("rand_index", device)
    local_labels = torch.where(from_b, labels[perm][:, None], labels[:, None]).gather(1, index)
    local_logits = fc_local(attended).gather(1, index[..., None].expand(-1, -1, 10))
    assert torch.equal(local_labels[selected], case.tensor("local_labels", device))
    close(local_logits[selected], case.tensor("local_logits", device))
    chosen = weights.gather(1, index) if safuse else None
    local = losses.local_cross_entropy(local_logits, local_labels, selected, chosen)
    close(local * len(labels), case.tensor("loss_local_ce_sum", device))
    contrast = losses.superpixel_contrastive(
        local_logits, local_labels, selected, chosen, temperature=float(case["temp"]),
        base_temperature=float(case["base_temp"]))
    close(contrast, case.tensor("loss_scl", device))
    logits = case.tensor("global_logits", device).requires_grad_()
    first, second = (F.cross_entropy(logits, y, reduction="none") for y in (labels, labels[perm]))
    whole = ((1 - ratio) * first + ratio * second).mean()
    close(whole, case.tensor("loss_global", device))

    total = float(case["gamma_ce"]) * local + whole + float(case["gamma_scl"]) * contrast
    close(total, case.tensor("loss_total", device))
    total.backward()
    close(features.grad, case.tensor("grad_feats", device), atol=1e-6)
    close(logits.grad, case.tensor("grad_global_logits", device), atol=1e-6)
    for name, module in modules.items():
        close(module.weight.grad, case.tensor(f"grad_{name}_w", device))
        if f"grad_{name}_b" in case:
            close(module.bias.grad, case.tensor(f"grad_{name}_b", device))


def test_attention_at_initialisation(device):
    """The original's score is blind before training; pre_norm is not."""
    torch.manual_seed(0)
    pooled, counts = torch.randn(2, 6, 64, device=device), torch.ones(2, 6, device=device)
    blind = SuperpixelAttention(64, "post_norm").to(device)(pooled, counts)[1]
    seeing = SuperpixelAttention(64, "pre_norm").to(device)(pooled, counts)[1]
    assert blind.abs().max() < 1e-4 and seeing.std() > 1


def plain_contrastive(logits, labels, temperature, base):
    """The spec's section 1.6, pair by pair."""
    f = F.normalize(logits, dim=1)
    s = (f @ f.T / temperature).tolist()
    labels, terms, n = labels.tolist(), [], range(len(labels))
    for i in n:
        negative = sum(np.exp(s[i][k]) for k in n if labels[k] != labels[i])
        log_p = [s[i][j] - np.log(np.exp(s[i][j]) + negative) for j in n if labels[j] == labels[i]]
        terms.append(-temperature / base * np.mean(log_p))
    return np.array(terms)


def test_contrastive_plain(device):
    torch.manual_seed(3)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0]])
    selected = torch.tensor([[True, True, True, False], [True] * 4])
    weights = torch.rand(2, 4)
    terms = plain_contrastive(logits[selected], labels[selected], 0.3, 0.1)
    args = [t.to(device) for t in (logits, labels, selected)]
    loss = losses.superpixel_contrastive(*args, temperature=0.3, base_temperature=0.1)
    assert loss.item() == pytest.approx(terms.mean(), rel=1e-4)
    loss = losses.superpixel_contrastive(*args, weights.to(device), temperature=0.3,
                                         base_temperature=0.1)
    assert loss.item() == pytest.approx(np.average(terms, weights=weights[selected]), rel=1e-4)
    one = losses.superpixel_contrastive(args[0], torch.zeros_like(args[1]), args[2])
    assert one.item() == pytest.approx(0, abs=1e-5)


class Ranks:
    """Two threads in the part of torch.distributed."""

    def __init__(self):
        self.barrier, self.mine, self.values = threading.Barrier(2), threading.local(), [None, None]

    def is_initialized(self):
        return True

    def get_world_size(self):
        return 2

    def get_rank(self):
        return self.mine.rank

    def all_gather(self, results, values):
        assert not values.requires_grad
        self.values[self.mine.rank] = values
        self.barrier.wait(20)
        for result, value in zip(results, self.values, strict=True):
            result.copy_(value)
        self.barrier.wait(20)


def test_contrastive_gathers(monkeypatch, device):
    """Two processes get the loss and, by DDP's mean, the gradient of one with the whole batch."""
    torch.manual_seed(4)
    logits, labels = torch.randn(4, 3, 5, device=device), torch.randint(0, 3, (4, 3), device=device)
    selected, weights = torch.rand(4, 3, device=device) < 0.8, torch.rand(4, 3, device=device)
    whole = logits.clone().requires_grad_()
    expected = losses.superpixel_contrastive(whole, labels, selected, weights)
    expected.backward()
    ranks = Ranks()
    monkeypatch.setattr(distributed, "dist", ranks)

    def run(rank):
        ranks.mine.rank, half = rank, slice(2 * rank, 2 * rank + 2)
        mine = logits[half].clone().requires_grad_()
        loss = losses.superpixel_contrastive(mine, labels[half], selected[half], weights[half])
        loss.backward()
        close(loss, expected)
        close(mine.grad / 2, whole.grad[half], atol=1e-6)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (0, 1)))


# -------------------------------------------------------------------------------------- networks

def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("arch, classes, size, decoder, total, encoder, decoder_total", [
    ("resnet18", 100, 32, "joint", 12_126_984, 11_168_832, 881_344),
    ("resnet50", 100, 32, "joint", 37_626_440, 23_500_352, 13_895_680),
    ("resnext50", 100, 32, "joint", 37_098_312, 22_972_224, 13_895_680),
    ("resnet18", 200, 64, "joint", 12_188_368, 11_166_016, 881_344),
    ("resnet50", 200, 64, "joint", 37_832_464, 23_488_576, 13_895_680),
    ("resnext50", 200, 64, "joint", 37_316_112, 22_972_224, 13_895_680),
    ("resnet18", 200, 224, "joint", 11_789_264, 11_176_512, 471_744),
    ("resnet50", 200, 224, "joint", 29_725_456, 23_508_032, 5_769_216),
    ("resnext50", 200, 224, "joint", 29_197_328, 22_979_904, 5_769_216),
    ("resnet18", 100, 32, "local", 12_120_584, 11_168_832, 881_344),
    ("resnet50", 100, 32, "local", 37_620_040, 23_500_352, 13_895_680),
    ("resnet18", 200, 224, "local", 11_776_464, 11_176_512, 471_744),
    ("resnet50", 200, 224, "local", 29_712_656, 23_508_032, 5_769_216),
    ("resnext50", 200, 224, "local", 31_442_800, 22_979_904, 8_043_264),
    ("resnext50", 200, 64, "local", 48_204_560, 22_972_224, 24_796_928),
    ("deit_b16", 200, 224, "local", 88_154_064, 85_798_656, 2_176_000),
])
def test_parameter_counts(arch, classes, size, decoder, total, encoder, decoder_total):
    with torch.device("meta"):
        net = Network(arch, classes, size, decoder=decoder)
    assert parameters(net.encoder) == encoder
    assert parameters(net.decoder) == decoder_total
    if decoder_total != 8_043_264:                           # attention over 32 channels there
        assert parameters(net.attention) == 12_608
    assert parameters(net) == total
    with torch.device("meta"):
        plain = Network(arch, classes, size, decoder="none")
    assert parameters(plain) == encoder + (net.features + 1) * classes


@pytest.mark.parametrize("decoder", ["joint", "local"])
@pytest.mark.parametrize("arch, size", [
    *((arch, size) for arch in network.RESNETS for size in (32, 64, 128)), ("deit_b16", 32)])
def test_network_runs(arch, size, decoder, device):
    """Narrow forms: features at the images' resolution, and gradients everywhere."""
    net = Network(arch, 7, size, decoder=decoder, initial_channels=16).to(device)
    images = torch.rand(2, 3, size, size, device=device)
    fused = torch.arange(size, device=device).expand(2, size, size) // 8
    stages = net.encoder(images)[0]
    assert net.decoder(stages).shape == (2, net.decoder.channels, size, size)
    logits, local, scores, counts = net(images, fused, 20)
    assert logits.shape == (2, 7) and local.shape == (2, 20, 7)
    assert counts.shape == scores.shape == (2, 20) and (counts > 0).sum() == 2 * size // 8
    (logits.sum() + local[counts > 0].square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    close(net(images), net(images, fused, 20)[0])
    maps = net.activation_maps(images)
    assert maps.shape == (2, 7, *stages[-1].shape[2:]) and (maps >= 0).all()


def test_decoder_joins_each_stage_at_its_step():
    """By hand, as the paper's table: T5(x4), T6[u1, x3], T7[u2, x2], T8[u3, x1], T9[u4, x0]."""
    net = Network("resnet18", 7, 32, initial_channels=16).eval()
    x0, x1, x2, x3, x4 = net.encoder(torch.rand(2, 3, 32, 32))[0]
    first, *others, last = net.decoder.steps
    u = first(x4)
    for step, stage in zip(others, (x3, x2, x1), strict=True):
        u = step(torch.cat([u, stage], 1))
    close(net.decoder([x0, x1, x2, x3, x4]), last(torch.cat([u, x0], 1)))


@pytest.mark.parametrize("decoder", ["joint", "local"])
def test_activation_maps_are_of_the_encoders_features(decoder):
    net = Network("resnet18", 7, 32, decoder=decoder, initial_channels=16).eval()
    images = torch.rand(2, 3, 32, 32)
    x4 = net.encoder(images)[0][-1]
    expected = torch.einsum("kc,bchw->bkhw", net.fc.weight[:, :x4.shape[1]], x4).clamp(min=0)
    close(net.activation_maps(images), expected)


def test_attention_without_weight_is_area():
    counts, from_b = torch.tensor([[30., 10, 0], [30, 10, 0]]), torch.tensor([[False, True, False]])
    weights = torch.tensor([[0., 0, 0], [1, 1, 0]])
    close(mixing.attention_ratio(weights, counts, from_b), torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize("size, sizes", [(32, [32, 32, 16, 8, 4]), (64, [64, 64, 32, 16, 8]),
                                         (224, [112, 56, 28, 14, 14])])
def test_stage_sizes(size, sizes):
    with torch.device("meta"):
        net = Network("resnet18", 10, size)
        stages = net.encoder(torch.rand(1, 3, size, size))[0]
    assert [s.shape[-1] for s in stages] == sizes
    assert [s.shape[1] for s in stages] == [64, 64, 128, 256, 512]


def test_vit_tokens():
    """The map holds the tokens without the class token, in place."""
    encoder = Network("deit_b16", 5, 32, decoder="none", initial_channels=16).encoder.eval()
    images, seen = torch.rand(2, 3, 32, 32), {}
    encoder.encoder.register_forward_hook(lambda m, i, out: seen.update(tokens=out))
    (features,), token = encoder(images)
    close(features[1, :, 1, 0], seen["tokens"][1, 3])
    close(token, seen["tokens"][:, 0])


def test_transposed_convolutions_break_symmetry():
    net = Network("resnet18", 7, 64, initial_channels=16)
    for step in net.decoder.steps:
        assert step[0].weight.flatten(2).std((0, 1)).min() > 1e-3


@pytest.mark.parametrize("arch, size, convolution, query, bias", [
    ("resnet18", 32, 0.0417, 0.072, 0.072), ("resnet18", 64, 0.0295, 0.01, 0),
    ("resnet18", 224, 0.0295, 0.01, 0), ("resnext50", 64, 0.125, 0.072, 0.072),
    ("resnext50", 224, 0.0722, 0.01, 0)])
@pytest.mark.parametrize("decoder", ["joint", "local"])
def test_initial_deviations(arch, size, convolution, query, bias, decoder):
    """Pre-activation networks and those for 224 pixels begin with xavier, the others with
    Kaiming: of a 3×3 convolution of 128 channels (ResNeXt: 1×1 from 256) and of the query."""
    torch.manual_seed(0)
    net = Network(arch, 10, size, decoder=decoder)
    weight = {"resnext50": lambda: net.encoder.layer1[1].conv1.weight}.get(
        arch, lambda: net.encoder.layer2[1].convs[3].weight if size == 64 else
        net.encoder.layer2[1].conv2.weight)()
    assert weight.shape[:1] == (128,)
    assert weight.std().item() == pytest.approx(convolution, rel=0.02)
    for name in ("query", "key", "value"):
        linear = getattr(net.attention, name)
        if linear.in_features == 64:
            assert linear.weight.std().item() == pytest.approx(query, rel=0.05)
            assert linear.bias.std().item() == pytest.approx(bias, rel=0.3)
    assert (net.fc.bias.abs().max() == 0) == (net.fc_local.bias.abs().max() == 0) == (bias == 0)


def test_sizes_are_checked():
    with pytest.raises(RunError, match="multiples of 8"):
        Network("resnet18", 10, 36)
    with pytest.raises(RunError, match="multiples of 16"):
        Network("deit_b16", 10, 40)


# ---------------------------------------------------------------------------------- localisation

def test_boxes_of_activation_maps(device):
    """The largest of two blobs, at the images' scale; a map without any is the whole image."""
    maps = torch.zeros(3, 8, 8, device=device)
    maps[0, 1:3, 4:7] = 1.0
    maps[0, 6, 1] = 0.9
    maps[1, 2:6, 0:2] = 5.0
    boxes = network.boxes_of(maps, 64, 64)
    overlap = [tuple(round(v) for v in box) for box in boxes.tolist()]
    x1, y1, x2, y2 = overlap[0]
    assert 27 <= x1 <= 32 and 56 <= x2 <= 61 and 3 <= y1 <= 8 and 24 <= y2 <= 29
    assert overlap[1][0] == 0 and overlap[2] == (0, 0, 64, 64)
