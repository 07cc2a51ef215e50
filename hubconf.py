"""torch.hub: the mixing methods, as objects for anybody's training loop.

    mixer = torch.hub.load("owner/mixup-zoo", "mixer", method="sage", num_classes=100)
    mixed, targets = mixer(images, labels, model)       # then cross-entropy with soft targets

`source="local"` and a path take a checkout. They run the programs' own code. It is imported under
a name of its own, so that the caller's modules `common`, `sage`, … stay the caller's.
"""
import builtins
import contextlib
import importlib
import importlib.machinery
import io
import sys
import types
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import get_worker_info

dependencies = ["torch", "torchvision", "numpy", "tqdm"]

# --------------------------------------------------------------------------------- private imports

_PREFIX = "mixup_zoo"
_ROOMS = ("common", "sage", "safuse", "soft_aug", "samix", "resizemix")


def _import(name, globals=None, locals=None, fromlist=(), level=0):
    """`import` as our modules see it: `common` is mixup_zoo.common, at any time."""
    room = name.partition(".")[0]
    if level or room not in _ROOMS:
        return builtins.__import__(name, globals, locals, fromlist, level)
    whole = builtins.__import__(f"{_PREFIX}.{name}", globals, locals, fromlist, 0)
    return whole if fromlist else getattr(whole, room)


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        module.__builtins__ = vars(builtins) | {"__import__": _import}
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = None
        if path and name.startswith(f"{_PREFIX}."):
            spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec and spec.origin:
            spec.loader = _Loader(name, spec.origin)
        return spec


def _ours(name: str):
    """Our module `name`; the caller's sys.path stays as it is."""
    path = list(sys.path)
    try:
        return importlib.import_module(f"{_PREFIX}.{name}")
    finally:
        sys.path[:] = path


if _PREFIX not in sys.modules:
    sys.modules[_PREFIX] = types.ModuleType(_PREFIX)
    sys.modules[_PREFIX].__path__ = [str(Path(__file__).resolve().parent)]
    sys.meta_path.insert(0, _Finder)


# ------------------------------------------------------------------------------------------ mixers

# The program of a method, its flags, and whether it looks at the network
_METHODS = {
    **{name: ("sage", f"--method {name}", name in ("puzzle", "comix", "sage"))
       for name in ("input", "cutmix", "saliencymix", "puzzle", "comix", "sage")},
    "cutout": ("resizemix", "--resizemix False --cutout 16", False),
    "resizemix": ("resizemix", "--resizemix True", False),
    "softcrop": ("soft_aug", "--da 2 --loss st", False),
    "superpixels": ("safuse", "--method safuse", False),
    "occamix": ("safuse", "--method occamix", True),
}
_OF_THE_LOSS = ("clean_lam", "update_ratio", "prob_mix", "mixup_hidden", "other")


def _parse(program, words: str, options: dict):
    """The program's flags; ValueError with its own line for those that it refuses."""
    words = words.split()
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return program.parse_args(words)
    except SystemExit:
        raise ValueError(said.getvalue().strip().rpartition("error: ")[2]) from None


class _Draws:
    """A generator for each process: in a DataLoader's workers another one each epoch."""

    def __init__(self, seed: int | None):
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.key, self.generator = (), None

    def __call__(self) -> torch.Generator:
        distributed, worker = _ours("common.distributed"), get_worker_info()
        key = self.seed, distributed.rank(), *([worker.seed] if worker else [])
        if key != self.key:
            self.key = key
            self.generator = torch.Generator().manual_seed(distributed.seed_of(*key))
        return self.generator

    def __getstate__(self):                             # to workers that are spawned
        return {"seed": self.seed, "key": (), "generator": None}


class _Activations:
    """A network as OcCaMix asks it: class activations from its last feature map and classifier."""

    def __init__(self, net):
        self.net, self.training = net, net.training
        self.train, self.eval = net.train, net.eval
        linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise ValueError("occamix needs a network that ends in a Linear layer")
        self.head = linear[-1]

    def activation_maps(self, images):
        found = []

        def note(part, args, out):
            if isinstance(out, torch.Tensor) and out.ndim == 4 and out[0, 0].numel() > 1 \
                    and out.shape[1] == self.head.in_features:
                found.append(out)

        hooks = [part.register_forward_hook(note) for part in self.net.modules()]
        try:
            logits = self.net(images)
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise ValueError("occamix needs a network whose last feature map (B, C, h, w) has as "
                             f"many channels as its classifier has inputs, {self.head.in_features}")
        return logits, torch.einsum("bchw,kc->bkhw", found[-1], self.head.weight)


@contextlib.contextmanager
def _untouched(net):
    """Inside, the network may be used in any mode; BatchNorm's statistics and modes come back."""
    if net is None:
        yield
        return
    modes = [(part, part.training) for part in net.modules()]
    kept = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


class Mixer:
    """(images, labels, model=None) -> (mixed images, soft targets (B, num_classes)).

    images (B, 3, H, W), normalised by `mean` and `std`; labels: class indices (B,), or (not of
    softcrop) probabilities (B, num_classes); model: for puzzle, comix, sage and occamix, on the
    images' device. Its BatchNorm statistics, gradients, mode and
    requires_grad stay as they are. generator: the source of this call's draws, instead of `seed`'s.
    """

    def __init__(self, method, num_classes, mean, std, seed, prob, options):
        if method not in _METHODS:
            raise ValueError(f"no method {method!r}; there are {', '.join(_METHODS)}")
        wrong = [name for name in options if name in _OF_THE_LOSS]
        if wrong:
            raise ValueError(f"{wrong[0]} belongs to the loss of the training program")
        self.room, words, self.looks = _METHODS[method]
        if method in ("puzzle", "comix"):               # the clean loss is the caller's to add
            options = options | {"clean_lam": 0}
        self.method, self.prob, self.draws = method, prob, _Draws(seed)
        self.args = _parse(_ours(f"{self.room}.main"), words, options)
        self.info = types.SimpleNamespace(mean=tuple(mean), std=tuple(std), num_classes=num_classes)

    def __call__(self, images, labels, model=None, *, generator=None):
        draws = generator or self.draws()
        if self.prob < 1 and torch.rand((), generator=draws) >= self.prob:
            return images, _ours("common.mixing").probabilities(labels, self.info.num_classes)
        if self.looks and model is None:
            raise ValueError(f"{self.method} needs the model: mixer(images, labels, model)")
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        kind, net = images.device.type, model if self.looks else None
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.args.amp = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[half]
        with _untouched(net), torch.enable_grad(), torch.autocast(kind, enabled=False):
            mixed, targets = getattr(self, f"_{self.room}")(images.detach(), labels, net, draws)
        return mixed.detach(), targets

    def __repr__(self):
        return f"Mixer({self.method!r}, num_classes={self.info.num_classes}, prob={self.prob})"

    # ---- each program's own mixing, and its targets

    def _sage(self, images, labels, net, draws):
        scaler = torch.amp.GradScaler(images.device.type, enabled=self.args.amp == "fp16")
        mixed = _ours("sage.main").mix_batch(net, images, labels, self.args, self.info, draws,
                                             scaler)
        return mixed.images, mixed.targets

    def _resizemix(self, images, labels, net, draws):
        mixed = _ours("resizemix.main").mix_batch(images, labels, self.args, self.info, draws)
        return mixed.images, mixed.targets

    def _soft_aug(self, images, labels, net, draws):
        program = _ours("soft_aug.main")
        mixed = program.mix_batch(images, self.args, self.info, 0, draws)
        return mixed.images, program.target_shares(labels, mixed, self.args, self.info.num_classes)

    def _safuse(self, images, labels, net, draws):
        program = _ours("safuse.main")
        mixed = program.mix_batch(_Activations(net) if net else None, images, self.args, self.info,
                                  draws)
        ratio = mixed.ratio
        if ratio is None:                               # by area; attention is of SAFuse's network
            pasted = mixed.from_b.gather(1, mixed.fused.flatten(1).long())
            ratio = 1 - pasted.float().mean(1)
        return mixed.images, program.soft_targets(labels, mixed.perm, ratio, self.info.num_classes)


def mixer(method: str, num_classes: int, *, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
          seed: int | None = None, prob: float = 1.0, **options) -> Mixer:
    """A callable `mixed, targets = mixer(images, labels, model)`.

    method: input (Mixup), cutmix, cutout, saliencymix, puzzle, comix, sage, resizemix, softcrop,
    superpixels, occamix. mean, std: what the images are normalised by. seed: of the draws (None:
    from torch's global generator); ranks and DataLoader workers draw differently. prob: of mixing a
    batch. options: the program's flags by their names, e.g. rand_pos=0.1.
    Raises ValueError for a method or an option that is not there.
    """
    return Mixer(method, num_classes, mean, std, seed, prob, options)


def slic(images, n_segments, compactness: float = 10.0, iterations: int = 10):
    """SLIC superpixels (B, H, W) int64 of images (B, 3, H, W) in [0, 1], on their device."""
    return _ours("safuse.superpixels").slic(images, n_segments, compactness, iterations)


class _Learned(nn.Module):
    """SAMix for a loop: `loss, logits = module(images, labels)`; `update()` after the step."""

    def __init__(self, backbone, num_classes, image_size, total_steps, seed, args):
        super().__init__()
        program = _ours("samix.main")
        with torch.no_grad(), _untouched(backbone):
            middle, pooled = backbone.eval()(torch.zeros(1, 3, image_size, image_size,
                                             device=next(backbone.parameters()).device))
        block = program.MixBlock(middle.shape[1], args.lam_mul_k, dropout=args.dropout,
                                 variant=args.variant)
        self.net = program.SAMix(program.Branch(backbone, pooled.shape[1], num_classes), block,
                                 args).to(middle.device)
        self.args, self.total, self.draws, self.step = args, total_steps, _Draws(seed), 0

    def forward(self, images, labels=None):
        if not self.training:
            return self.net.q(images)
        program = _ours("samix.main")
        fall = program.cosine(min(self.step, self.total), self.total)
        draws = program.draw_mixing(len(images), self.args, self.draws(), fall)
        weight = self.args.mask_loss * (fall if self.args.mask_anneal else 1)
        losses, logits, _ = self.net(images, labels, draws, weight)
        return sum(losses.values()), logits

    def update(self):
        """Moves branch k after q, as after every step of the optimizer."""
        program, args = _ours("samix.main"), self.args
        program.momentum_update(self.net.k, self.net.q, program.ema_momentum(
            self.step, self.total, args.ema_base, args.ema_end, args.ema_start))
        self.step += 1


def samix(backbone: nn.Module, num_classes: int, *, total_steps: int, image_size: int = 32,
          seed: int | None = None, **options) -> nn.Module:
    """SAMix as a module: in training (images, labels) -> (loss, logits), else images -> logits.

    backbone: images (B, 3, H, W) -> (middle feature map (B, C, h, w), pooled features (B, width)).
    Train the parameters that require a gradient; call `update()` after each of the `total_steps`
    steps of the optimizer. options: samix/main.py's flags by their names.
    """
    args = _parse(_ours("samix.main"), "--method samix", options)
    return _Learned(backbone, num_classes, image_size, total_steps, seed, args)


# ---------------------------------------------------------------------------------------- networks

def _network(_name: str, num_classes: int, image_size: int = 32, **options) -> nn.Module:
    """An untrained network for square images; options: initial_channels, dropout."""
    return _ours("common.models").build(_name, num_classes, image_size, **options)


for _name in _ours("common.models").ALL:
    globals()[_name] = partial(_network, _name)
    globals()[_name].__doc__ = _network.__doc__
