"""Sizes, options and random layers of the networks.

Parameter and multiply-add counts are those of the papers' own programs.
"""
import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

from common import mixing, models
from common.errors import RunError
from common.models.features import Backbone
from common.models.shake import Scale, ShakeBlock, ShakeDrop

PARAMETERS = [                 # name, image size, {classes: parameters}
    ("preactresnet18", 32, {10: 11171146, 100: 11217316, 200: 11268616}),
    ("preactresnet18", 64, {200: 11268616}),
    ("resnext29_4_24", 32, {10: 4845002, 100: 4937252, 200: 5039752}),
    ("resnext29_4_24_new", 32, {100: 4937252}),
    ("wrn16_8", 32, {10: 10965866, 100: 11012036, 200: 11063336}),
    ("wrn28_10", 32, {10: 36489290, 100: 36546980, 200: 36611080}),
    ("wrn28_2", 32, {10: 1469642, 100: 1481252, 200: 1494152}),
    ("resnet18", 32, {10: 11173962, 100: 11220132}),
    ("resnet50", 32, {10: 23520842, 100: 23705252}),
    ("resnet101", 32, {10: 42512970, 100: 42697380}),
    ("wideresnet28", 32, {10: 36479194, 100: 36536884}),
    ("pyramidnet272", 32, {10: 26210842, 100: 26288692}),
    ("pyramid272", 32, {100: 26288692}),
    ("wresnet28_10", 32, {10: 36489290, 100: 36546980}),
    ("wresnet40_2", 32, {100: 2258084}),
    ("shakeshake26_2x32d", 32, {100: 3000612}),
    ("shakeshake26_2x64d", 32, {100: 11937828}),
    ("shakeshake26_2x96d", 32, {10: 26777546, 100: 26812196}),
    ("shakeshake26_2x112d", 32, {100: 36475812}),
    ("shakeshake26_2x96d_next", 32, {100: 22809956}),
    ("resnet18", 224, {1000: 11689512}),
    ("resnet50", 224, {1000: 25557032}),
    ("resnet101", 224, {1000: 44549160}),
    ("resnet200", 224, {1000: 64673832}),
    ("wrn28_8", 32, {100: 23401012}),
    ("resnext50_32x4d", 32, {100: 23177124}),
    ("resnext50_32x4d", 224, {1000: 25028904}),
    ("resnext101_32x4d", 224, {1000: 44177704}),
    ("deit_s", 224, {1000: 22050664}),
    ("swin_t", 224, {1000: 28288354}),
    ("convnext_t", 224, {1000: 28589128}),
    ("convnext_t", 32, {100: 27895012}),
]
MULTIPLY_ADDS = [              # name, classes, image size, of convolutions (biases too) and fc
    ("resnet18", 100, 32, 555468800),
    ("resnet50", 100, 32, 1298014208),
    ("resnet101", 100, 32, 2510168064),
    ("wideresnet28", 100, 32, 5243386368),
    ("pyramidnet272", 100, 32, 4488855936),
    ("wresnet28_10", 10, 32, 5954083072),
    ("wresnet40_2", 100, 32, 356758016),
    ("shakeshake26_2x32d", 100, 32, 426717696),
    ("shakeshake26_2x64d", 100, 32, 1685545984),
    ("shakeshake26_2x96d", 10, 32, 3776909056),
    ("shakeshake26_2x112d", 100, 32, 5134855936),
    ("shakeshake26_2x96d_next", 100, 32, 3676147712),
    ("resnet50", 1000, 224, 4089184256),
    ("resnet101", 1000, 224, 7801405440),
    ("resnet200", 1000, 224, 15007481856),
]
BUFFERS = {                    # of the norms
    "wresnet28_10": 17977, "wresnet40_2": 5445, "shakeshake26_2x32d": 9020,
    "shakeshake26_2x96d": 26940, "shakeshake26_2x96d_next": 46631,
}
SMALL = ["preactresnet18", "preactresnet50", "wrn16_8", "wideresnet28", "resnext29_4_24",
         "resnet18", "resnet50", "pyramidnet272", "shakeshake26_2x32d", "shakeshake26_2x96d_next"]
BACKBONES = [                  # name, built for, images, layer, middle features, width
    ("resnet18", 32, 32, 3, (64, 8, 8), 128), ("resnet18", 32, 64, 3, (64, 16, 16), 128),
    ("resnet50", 32, 32, 1, (64, 32, 32), 512), ("resnext50_32x4d", 32, 32, 3, (256, 8, 8), 512),
    ("wrn28_8", 32, 32, 2, (64, 16, 16), 128), ("resnet18", 224, 64, 3, (256, 4, 4), 512),
    ("deit_s", 64, 64, 6, (96, 4, 4), 96), ("swin_t", 64, 64, 3, (192, 2, 2), 192),
    ("convnext_t", 32, 32, 3, (96, 8, 8), 192), ("convnext_t", 64, 64, 2, (48, 8, 8), 192),
]
MANIFOLD = ["preactresnet18", "wrn16_8", "resnext29_4_24_new"]


def count(tensors):
    return sum(t.numel() for t in tensors)


@pytest.mark.parametrize("name, size, expected", PARAMETERS)
def test_parameters(name, size, expected):
    with torch.device("meta"):
        counts = {n: count(models.build(name, n, size).parameters()) for n in expected}
    assert counts == expected


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers(name):
    with torch.device("meta"):
        assert count(models.build(name, 100).buffers()) == BUFFERS[name]


@pytest.mark.parametrize("name, num_classes, size, expected", MULTIPLY_ADDS)
def test_multiply_adds(name, num_classes, size, expected):
    biases = []
    with torch.device("meta"):
        network = models.build(name, num_classes, size).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.register_forward_hook(lambda *args: biases.append(args[2][0].numel()))
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() // 2 + sum(biases) == expected


@pytest.mark.parametrize("name", SMALL)
def test_trains(name, device):
    """Every weight but the frozen ones gets a finite gradient; bf16 autocast runs too."""
    torch.manual_seed(0)
    network = models.build(name, 7, initial_channels=16).to(device)
    logits = network(torch.randn(3, 3, 32, 32, device=device))
    assert logits.shape == (3, 7)
    mixing.softmax_bce(logits, torch.eye(7, device=device)[:3]).backward()
    for parameter_name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), parameter_name
    with torch.autocast(device.type, torch.bfloat16):
        network(torch.randn(2, 3, 32, 32, device=device)).sum().backward()


@pytest.mark.parametrize("name", SMALL)
def test_image_sizes(name):
    """64-pixel images pass a stem of stride 2, so the last maps are as small as at 32."""
    shapes = set()
    with torch.device("meta"):
        for size in (32, 64):
            network = models.build(name, 5, size, initial_channels=16).eval()
            network.tail.register_forward_hook(lambda *args: shapes.add(args[2].shape))
            assert network(torch.empty(2, 3, size, size)).shape == (2, 5)
    assert len(shapes) == 1


@pytest.mark.parametrize("names", models.FAMILIES.values(),
                         ids=[family.__name__ for family in models.FAMILIES])
def test_every_name(names):
    with torch.device("meta"):
        for name in names:
            full, quarter = (models.build(name, 10, initial_channels=channels)
                             for channels in (64, 16))
            assert 14 < count(full.parameters()) / count(quarter.parameters()) < 17
            assert quarter.eval()(torch.empty(1, 3, 32, 32)).shape == (1, 10)


def test_imagenet_form(device):
    network = models.build("resnet18", 7, 224, dropout=0.5).to(device)
    assert network(torch.randn(2, 3, 64, 64, device=device)).shape == (2, 7)
    with pytest.raises(RunError, match="--initial_channels 64"):
        models.build("resnet18", 7, 224, initial_channels=16)


def test_unknown_name():
    with pytest.raises(ValueError, match="'resnet19'; known: preactresnet18, .*resnet200"):
        models.build("resnet19", 10)


@pytest.mark.parametrize("name", SMALL)
def test_dropout(name):
    """Dropout zeroes inputs of the last layer in training only."""
    seen = []
    network = models.build(name, 5, initial_channels=16, dropout=0.5)
    network.fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, 16, 16)
    network.train()(images)
    network.eval()(images)
    network.dropout.p = 0.0
    network.train()(images)
    zeros = [(features == 0).float().mean() for features in seen]
    assert 0.3 < zeros[0] < 0.9 and zeros[0] > zeros[1] + 0.1 and zeros[0] > zeros[2] + 0.1


@pytest.mark.parametrize("name", MANIFOLD)
@pytest.mark.parametrize("lam", [torch.tensor(0.3), torch.tensor([0.3, 0.9, 0.5])])
def test_manifold(name, lam, device):
    torch.manual_seed(0)
    network = models.build(name, 5, initial_channels=16).to(device).eval()
    images, perm = torch.randn(3, 3, 16, 16, device=device), torch.tensor([1, 2, 0])
    mixed = mixing.mixup(images, perm, lam)[0]
    with torch.no_grad():
        outputs = [network(images)] + [network(images, perm, lam, layer) for layer in range(3)]
        torch.testing.assert_close(outputs[1], network(mixed))
        for layer in (1, 2):
            x = network.stem(images)
            for number, stage in enumerate(network.stages, 1):
                x = stage(x)
                if number == layer:
                    x = mixing.mixup(x, perm, lam)[0]
            by_hand = network.fc(network.tail(x).mean((2, 3)))
            torch.testing.assert_close(outputs[layer + 1], by_hand)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name, form, size, layer, middle, width", BACKBONES)
def test_backbone(name, form, size, layer, middle, width, device):
    """The middle features are of the layer named, and the classifier's input is the last ones."""
    torch.manual_seed(0)
    channels = {} if form == 224 else {"initial_channels": 16}
    network = models.build(name, 5, form, **channels).to(device).eval()
    images = torch.randn(3, 3, size, size, device=device)
    seen = []
    place = {"deit_s": f"encoder.layers.encoder_layer_{layer - 1}",
             "swin_t": f"features.{2 * layer}",
             "convnext_t": f"features.{2 * layer - 1}"}.get(
        name, f"layer{layer}" if form == 224 else f"stages.{layer - 1}")
    hook = network.get_submodule(place).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        logits = network(images)
        hook.remove()
        backbone = Backbone(network, layer, size)
        assert backbone.training and (backbone.channels, backbone.width) == (middle[0], width)
        features, pooled = copy.deepcopy(backbone).eval()(images)
        head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        torch.testing.assert_close(head(pooled), logits)
    assert features.shape == (3, *middle)
    expected = {"deit_s": lambda x: x[:, 1:].transpose(1, 2).reshape(3, *middle),
                "swin_t": lambda x: x.permute(0, 3, 1, 2)}.get(name, lambda x: x)(seen[0])
    torch.testing.assert_close(features, expected)
    assert not any(parameter is weight for parameter in backbone.parameters()
                   for weight in head.parameters())
    with pytest.raises(RunError, match="--layer 99: no layer 99 before the last"):
        Backbone(network, 99, size)


@pytest.mark.parametrize("name", models.transformer.SPECS)
def test_transformers_train(name, device):
    """Every weight learns; drop path grows to its probability, and draws in training only."""
    torch.manual_seed(0)
    network = models.build(name, 5, 32, initial_channels=16, dropout=0.5, drop_path=0.4).to(device)
    images = torch.randn(4, 3, 32, 32, device=device)
    network(images).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
    rates = [m.p for m in network.modules() if isinstance(m, StochasticDepth)]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.4)
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in network.modules()) == 1
    with torch.no_grad():
        assert not torch.equal(network(images), network(images))
        network.eval()
        assert torch.equal(network(images), network(images))
    blocks = models.build(name, 5, 32, initial_channels=16, drop_path=1.0).to(device).train()
    last = blocks.encoder.layers[-1] if name == "deit_s" else blocks.features[7][-1]
    shape = {"deit_s": (4, 5, 96), "swin_t": (4, 1, 1, 192), "convnext_t": (4, 192, 4, 4)}[name]
    x = torch.randn(shape, device=device)
    assert torch.equal(last(x), x)                  # both paths of the last block are dropped
    with pytest.raises(RunError, match="multiple of 16 pixels, not 40"):
        models.build("deit_s", 5, 40)


def coefficients(layer, x):
    """Per-sample factors of the output and of the gradient; checks that they are per sample."""
    x = x.clone().requires_grad_()
    out = layer(x)
    out.sum().backward()
    forward, backward = (out / x).flatten(1), x.grad.flatten(1)
    for factor in (forward, backward):
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-4, atol=1e-4)
    return forward[:, 0].detach(), backward[:, 0]


def test_scale():
    x = torch.randn(3, 2, requires_grad=True)
    a, b = torch.randn(2, 3, 1)
    out = Scale.apply(x, a, b)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out, x * a) and torch.equal(grad, b.expand(3, 2))


def test_shakedrop(device):
    torch.manual_seed(0)
    x = torch.rand(50, 2, 3, 3, device=device) + 0.5
    a, b = coefficients(ShakeDrop(1.0), x)
    assert -1 <= a.min() < -0.5 and 0.5 < a.max() <= 1 and 0 <= b.min() and b.max() <= 1
    assert (a - b).abs().max() > 0.1 and b.std() > 0.1
    layer, kept = ShakeDrop(0.3), 0
    for _ in range(200):       # one gate for the whole batch
        a, b = coefficients(layer, x[:2])
        unchanged = torch.isclose(a, torch.ones_like(a)).tolist()
        assert unchanged in ([True, True], [False, False])
        assert not unchanged[0] or torch.equal(b, torch.ones_like(b))
        kept += unchanged[0]
    assert 120 <= kept <= 160
    assert torch.equal(layer.eval()(x), x * (1 - 0.3))


class Zero(nn.Module):
    def forward(self, x):
        return 0 * x


def test_shakeshake(device):
    torch.manual_seed(0)
    block = ShakeBlock(2, 2, 1)
    block.branches = nn.ModuleList([nn.Identity(), Zero()])              # x + a·x + (1 - a)·0
    x = torch.rand(50, 2, 3, 3, device=device) + 0.5
    a, b = (factor - 1 for factor in coefficients(block, x))
    for factor in (a, b):
        assert -1e-6 <= factor.min() < 0.2 and 0.8 < factor.max() <= 1 + 1e-6
    assert (a - b).abs().max() > 0.1
    block.branches = nn.ModuleList([nn.Identity(), nn.Identity()])       # the weights sum to 1
    forward, backward = coefficients(block, x)
    torch.testing.assert_close([forward, backward], [torch.full_like(forward, 2)] * 2)
    block.branches = nn.ModuleList([nn.Identity(), Zero()])
    forward, backward = coefficients(block.eval(), x)
    torch.testing.assert_close([forward, backward], [torch.full_like(forward, 1.5)] * 2)


def test_shakeshake_begins(device):
    """A ResNeXt branch begins with its convolution, a plain one with a ReLU; no bias at first."""
    x = -torch.rand(2, 16, 8, 8, device=device)             # a ReLU would leave nothing of it
    for name, passes in (("shakeshake26_2x96d_next", True), ("shakeshake26_2x32d", False)):
        network = models.build(name, 5, initial_channels=16 if passes else 64).to(device)
        features = network.stages[0][0].branches[0][:3](x)
        assert (features.std() > 0.1) == passes
        assert (network.fc.bias == 0).all() and network.fc.weight.std() > 0


@pytest.mark.parametrize("name", ["pyramidnet272", "shakeshake26_2x32d"])
def test_random_layers(name, device):
    """Training draws from torch's generator, evaluation from none."""
    network = models.build(name, 5, initial_channels=16).to(device)
    images = torch.randn(2, 3, 16, 16, device=device)

    def run(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return network(images)

    assert torch.equal(run(1), run(1)) and not torch.allclose(run(1), run(2))
    network.eval()
    assert torch.equal(run(1), run(2))
