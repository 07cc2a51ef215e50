"""torch.hub: the mixing methods, as objects for anybody's training loop.

    mixer = torch.hub.load("owner/mixup-zoo", "mixer", method="sage", num_classes=100)
    mixed, targets = mixer(images, labels, model)       # then cross-entropy with soft targets

For a clone, give its path and `source="local"`. The programs' code is imported as mixup_zoo.…: it
never shadows the caller's modules `common`, `sage`, …."""
import builtins
import contextlib
import copy
import importlib.machinery
import sys
import types
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import get_worker_info

dependencies = ["torch", "torchvision", "numpy", "tqdm"]

_ROOMS = ("common", "sage", "safuse", "soft_aug", "samix", "resizemix")


def _import(name, *more):
    """`from … import` as our modules see it: `common` is mixup_zoo.common, at any time."""
    ours = name.partition(".")[0] in _ROOMS
    return builtins.__import__(f"mixup_zoo.{name}" if ours else name, *more)


class _Loader(importlib.machinery.SourceFileLoader):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) \
            if path and name.startswith("mixup_zoo.") else None
        if spec and spec.origin:
            spec.loader = cls(name, spec.origin)
        return spec

    def exec_module(self, module):
        module.__builtins__ = vars(builtins) | {"__import__": _import}
        path = list(sys.path)                           # which a main.py extends
        super().exec_module(module)
        sys.path[:] = path


def _ours(name: str):
    return importlib.import_module(f"mixup_zoo.{name}")


if "mixup_zoo" not in sys.modules:
    sys.modules["mixup_zoo"] = types.ModuleType("mixup_zoo")
    sys.modules["mixup_zoo"].__path__ = [str(Path(__file__).resolve().parent)]
    sys.meta_path.insert(0, _Loader)


_METHODS = {                                            # its program, and flags
    **{name: ("sage", f"--method {name}") for name in ("input", "cutmix", "saliencymix", "sage")},
    # the clean loss is the caller's to add
    **{name: ("sage", f"--method {name} --clean_lam 0") for name in ("puzzle", "comix")},
    "cutout": ("resizemix", "--resizemix False --cutout 16"),
    "resizemix": ("resizemix", "--resizemix True"),
    "softcrop": ("soft_aug", "--da 2 --loss st"),
    "superpixels": ("safuse", "--method safuse"),
    "occamix": ("safuse", "--method occamix"),
}
_NEED_MODEL = ("puzzle", "comix", "sage", "occamix")
_NOT_MIXING = {"clean_lam", "update_ratio", "prob_mix", "mixup_hidden", "other", "randaugment",
               "autoaugment", "ra"}


def _parse(room: str, words: str, options: dict):
    """Return the program's flags; a usage error is a ValueError."""
    words = words.split()
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    _ours("common.flags").Parser.stop = _refuse
    return _ours(f"{room}.main").parse_args(words)


def _refuse(parser, message: str):
    raise ValueError(message)


class _Draws:
    """Called, returns a generator: one for each rank, and each DataLoader worker and epoch."""

    def __init__(self, seed: int | None):
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.key = self.generator = None

    def __call__(self) -> torch.Generator:
        distributed, worker = _ours("common.distributed"), get_worker_info()
        key = self.seed, distributed.rank(), worker and worker.seed
        if key != self.key:
            self.key = key
            self.generator = torch.Generator().manual_seed(distributed.seed_of(*key))
        return self.generator


class _Activations(nn.Module):
    """A network as OcCaMix asks it: class activations by its last feature map and classifier."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def activation_maps(self, images):
        heads, maps = [part for part in self.net.modules() if isinstance(part, nn.Linear)], []

        def note(part, args, out):
            if isinstance(out, torch.Tensor) and out.ndim == 4 and out[0, 0].numel() > 1 \
                    and heads and out.shape[1] == heads[-1].in_features:
                maps.append(out)

        with nn.modules.module.register_module_forward_hook(note):
            self.net(images)
        if not maps:
            raise ValueError("occamix needs a network whose last feature map a Linear layer reads")
        return _ours("safuse.network").activation_maps(maps[-1], heads[-1].weight)


def _on_cpu():              # where draws are made, whatever the default device
    other = torch.get_default_device().type != "cpu"
    return torch.device("cpu") if other else contextlib.nullcontext()


@contextlib.contextmanager
def _untouched(net: nn.Module):
    """Inside, the network may run in any mode; modes and BatchNorm's statistics come back."""
    modes = {part: part.training for part in net.modules()}
    buffers = {buffer: buffer.clone() for buffer in net.buffers()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        for buffer, value in buffers.items():
            buffer.data.copy_(value)


class Mixer:
    """A callable (images, labels, model=None) -> (mixed images, soft targets (B, num_classes)).
    images (B, 3, H, W), normalised by `mean` and `std`; labels: class indices (B,), or (not of
    softcrop) probabilities (B, num_classes); model: images -> logits, for puzzle, comix, sage and
    occamix; its statistics, gradients and mode stay; under fp16's autocast it is asked in float32.
    seed: of the draws; each rank, DataLoader worker and epoch draws its own. A call's `generator`
    is used instead; seeded once and copied into workers, it repeats itself. prob: of mixing a
    batch, by each rank for itself: not with SyncBatchNorm. options: the flags of the program."""

    def __init__(self, method: str, num_classes: int, *, mean=(0.485, 0.456, 0.406),
                 std=(0.229, 0.224, 0.225), seed: int | None = None, prob: float = 1.0, **options):
        if method not in _METHODS:
            raise ValueError(f"no method {method!r}; there are {', '.join(_METHODS)}")
        if wrong := sorted(_NOT_MIXING & options.keys()):
            raise ValueError(f"{wrong[0]} is of the training program, not of the mixing")
        self.room, words = _METHODS[method]
        self.method, self.prob, self.draws = method, prob, _Draws(seed)
        self.args = _parse(self.room, words, options)
        self.info = types.SimpleNamespace(mean=tuple(mean), std=tuple(std), num_classes=num_classes)

    def __call__(self, images, labels, model=None, *, generator=None):
        draws, kind = generator or self.draws(), images.device.type
        if self.prob < 1 and torch.rand((), generator=draws, device="cpu") >= self.prob:
            return images, _ours("common.mixing").probabilities(labels, self.info.num_classes)
        if self.method not in ("cutmix", "resizemix"):
            _ours("common.mixing").check_floats(images)
        if self.method not in _NEED_MODEL:
            model = nn.Identity()
        elif model is None:
            raise ValueError(f"{self.method} needs the model: mixer(images, labels, model)")
        net = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # gradients of fp16 overflow, and only a training loop's scaler would learn of it
        self.args.amp = "bf16" if half == torch.bfloat16 else "off"
        labels = labels if labels.is_floating_point() else labels.long()
        with _on_cpu(), _untouched(net), torch.enable_grad(), torch.autocast(kind, enabled=False):
            return self.mix(images.detach(), labels, net, draws)

    def mix(self, images, labels, net, draws):
        """Return the program's own mixture, and its targets."""
        program, args, info = _ours(f"{self.room}.main"), self.args, self.info
        if self.room == "soft_aug":
            gpu = [images.device] * bool(images.is_cuda and args.noise)     # which draws noise
            with torch.random.fork_rng(gpu, enabled=bool(gpu)):
                if gpu:
                    torch.cuda.manual_seed(int(torch.randint(2**62, (), generator=draws)))
                mixed = program.mix_batch(images, args, info, 0, draws)
            return mixed.images, program.implied_targets(labels, mixed, args, info.num_classes)
        if self.room == "safuse":
            mixed = program.mix_batch(_Activations(net), images, args, info, draws)
            # shares by area; attention is of SAFuse's network
            return mixed.images, program.targets_of(labels, mixed, args, info.num_classes)
        if self.room == "sage":
            scaler = torch.amp.GradScaler(images.device.type, enabled=False)
            return program.mix_batch(net, images, labels, args, info, draws, scaler)[:2]
        return program.mix_batch(images, labels, args, info, draws)[:2]


class SAMix(nn.Module):
    """SAMix, or AutoMix: in training (images, labels) -> (loss, logits), else images -> logits.
    backbone: images (B, 3, H, W) -> (middle feature map (B, C, h, w), pooled features (B, width)).
    Train the parameters that require a gradient; call `update()` after each of the `total_steps`
    steps of the optimizer. options: samix/main.py's flags."""

    def __init__(self, backbone: nn.Module, num_classes: int, *, total_steps: int,
                 image_size: int = 32, seed: int | None = None, **options):
        super().__init__()
        program, args = _ours("samix.main"), _parse("samix", "--method samix", options)
        if args.method not in program.LEARNED:
            raise ValueError(f"method {args.method!r} is none of {', '.join(program.LEARNED)}")
        device = next(backbone.parameters()).device
        with torch.no_grad():
            middle, pooled = copy.deepcopy(backbone).eval()(
                torch.zeros(1, 3, image_size, image_size, device=device))
        block = program.MixBlock(middle.shape[1], args.lam_mul_k, dropout=args.dropout,
                                 variant=args.method, lam_concat=args.lam_concat)
        branch = program.Branch(backbone, pooled.shape[1], num_classes)
        self.net = program.SAMix(branch, block, args).to(device)
        self.args, self.total, self.draws, self.step = args, total_steps, _Draws(seed), 0

    def get_extra_state(self):
        return torch.tensor(self.step)

    def set_extra_state(self, step):
        self.step = int(step)

    def forward(self, images, labels=None):
        if not self.training:
            return self.net.q(images)
        program = _ours("samix.main")
        fall = program.cosine(min(self.step, self.total), self.total)
        with _on_cpu():
            draws = program.draw_mixing(len(images), self.args, self.draws(), fall)
        weight = self.args.mask_loss * (fall if self.args.mask_anneal else 1)
        losses, logits, _ = self.net(images, labels, draws, weight)
        return sum(losses.values()), logits

    def update(self):
        """Move the momentum encoder after the network."""
        program, args = _ours("samix.main"), self.args
        program.momentum_update(self.net.k, self.net.q, program.ema_momentum(
            min(self.step, self.total), self.total, args.ema_base, args.ema_end, args.ema_start))
        self.step += 1


mixer, samix, slic = Mixer, SAMix, _ours("safuse.superpixels").slic
# The networks, untrained: name(num_classes, image_size=32, **options); initial_channels, dropout
globals().update({name: partial(_ours("common.models").build, name)
                  for name in _ours("common.models").ALL})
