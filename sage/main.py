#!/usr/bin/env python3
"""SAGE (Ma et al., BMVC 2022) and the methods it is compared with, in one program:
vanilla, input (Mixup), manifold, cutmix, saliencymix, puzzle, comix, sage.

a CPU trial       python sage/main.py --dataset digits --method sage --initial_channels 16
one GPU           python sage/main.py --dataset cifar100 --data_dir data --method sage --amp bf16
eight GPUs        torchrun --nproc_per_node=8 sage/main.py --dataset cifar100 --method sage \\
                      --batch_size 104
two machines      torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                      --rdzv_endpoint=HOST:29500 sage/main.py --dataset cifar100 --method sage \\
                      --batch_size 112

--batch_size counts the images of a step over all processes, and is a multiple of their number.
"""
import copy
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
import torch.nn.functional as F

from common import data, distributed, evaluation, flags, models, plots, runtime
from common.data.recipe import Recipe, to_uint8
from common.distributed import log
from common.errors import RunError
from common.flags import add_boolean, amount, count, number, positive, share
from common.mixing import (
    cutmix,
    draw_centre,
    draw_lambda,
    draw_perm,
    input_gradient,
    mixup,
    probabilities,
    soft_targets,
    softmax_bce,
)
from common.models.weights import load_pretrained
from common.run import Run, StepSums, about
from sage import comixup, puzzlemix, saliencymix
from sage.rearrange import draw_offsets, gradient_saliency, sage_mix

METHODS = ["vanilla", "input", "manifold", "cutmix", "saliencymix", "puzzle", "comix", "sage"]
ARCHS = [*models.NAMES["preactresnet"], "resnext29_4_24", "resnext29_4_24_new",
         *models.NAMES["wideresnet"]]
PREACT = {"arch": "preactresnet18", "lr": 0.2, "schedule": [100, 200]}


def method_defaults(method: str, dataset: str) -> dict:
    """What a method (and the size of its images) sets unless the command line says otherwise."""
    tiny = dataset == "tiny-imagenet-200"
    return {
        "input": {"mixup_alpha": 0.2 if tiny else 1.0},
        "manifold": {"mixup_alpha": 0.2 if tiny else 2.0},
        "cutmix": {"mixup_alpha": 0.2 if tiny else 1.0},
        "puzzle": {"clean_lam": 1.0 if tiny else 0.0, "t_size": -1 if tiny else 4},
        "comix": {"mixup_alpha": 2.0, "clean_lam": 1.0, "workers": 0, **PREACT},
    }.get(method, {})


# ------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    """The flags; usage errors end the program with exit code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("schedule and run").add_argument
    add("--schedule", "--milestones", type=count, nargs="+", default=[150, 225],
        help="epochs of the LR changes")
    add("--gammas", type=amount, nargs="+", default=[0.1, 0.1], help="LR factors at these epochs")
    add_boolean(add, "--dropout", False, "dropout 0.5 before the last layer")
    add("--valid_labels_per_class", type=count, default=0,
        help="training images of each class set aside; best.pt is then chosen on these")
    add("--ngpu", type=count, default=1, help="0: CPU; above 1: restarts itself under torchrun")
    add("--start_epoch", type=count, default=None, help="first epoch (default: 0 or --resume's)")
    add("--job_id", type=count, default=0, help="suffix of the run's folder, 0: none")
    add_boolean(add, "--log_off", False, "write no files")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default=None,
        help="(default: what --train, --box, --graph and --comix say, else vanilla)")
    add("--train", choices=["vanilla", "mixup", "mixup_hidden", "sage"], default=None,
        help="the method in the originals' older words; likewise:")
    add_boolean(add, "--box", None, "CutMix")
    add_boolean(add, "--graph", None, "Puzzle Mix")
    add_boolean(add, "--comix", None, "Co-Mixup")
    add("--mixup_alpha", type=number(), default=1.0,
        help="Beta (comix: Dirichlet) parameter; saliencymix: always 1")
    add_boolean(add, "--in_batch", False,
                "one lambda per image instead of one per batch (not of saliencymix and comix)")
    add("--prob_mix", type=share, default=1.0, help="fraction of the batch that is mixed")
    add("--mix_schedule", choices=["fixed", "scheduled", "delayed"], default="fixed",
        help="prob_mix over the epochs: constant, growing until, or zero before:")
    add("--mix_scheduled_epoch", type=positive, default=300)
    add("--mp", type=count, default=8, help="threads of Puzzle Mix's graph cuts, 0: none")
    add("--solver", choices=["auto", "gco", "device"], default="auto",
        help="puzzle's and comix's blocks: graph cuts by gco on the CPU, or batched on the "
             "device; auto: puzzle by gco on a CPU, all else on the device")

    add = parser.add_argument_group("sage").add_argument
    add("--blur_sigma", type=number(above=0), default=1.0, help="saliency blur, pixels")
    add("--kernel_size", type=positive, default=5, help="saliency blur, pixels, odd")
    add_boolean(add, "--eval_mode", False, "saliency pass in eval mode")
    add("--rand_pos", type=share, default=0.5, help="fraction of all offsets that are tried")
    add("--update_ratio", type=share, default=1.0, help="weight of the mixed loss; rest: clean")
    add("--upper_lambda", type=share, default=1.0, help="multiplies the drawn lambda")

    add = parser.add_argument_group("puzzle").add_argument
    add("--neigh_size", type=positive, default=4, help="cell of the pairwise colour term, pixels")
    add("--n_labels", type=int, choices=[2, 3, 4], default=3, help="mask levels")
    add("--beta", type=amount, default=1.2, help="label smoothness")
    add("--gamma", type=amount, default=0.5, help="data local smoothness")
    add("--eta", type=amount, default=0.2, help="prior weight")
    add_boolean(add, "--transport", True, "move the blocks")
    add("--t_eps", type=amount, default=0.8, help="cost of moving")
    add("--t_size", type=number(int, low=-1), default=-1,
        help="side of a moved block, pixels; -1: the mask's")
    add("--adv_p", type=share, default=0.0, help="probability of adversarial noise")
    add("--adv_eps", type=amount, default=10.0, help="noise ball, in 1/255")
    add("--clean_lam", type=amount, default=0.0, help="weight of the clean loss (also comix)")

    add = parser.add_argument_group("comix").add_argument
    add("--m_block_num", type=number(int, low=-1), default=4,
        help="blocks a side, -1: 2, 4, 8 or 16 at random")
    add("--m_part", type=positive, default=20, help="images mixed with one another")
    add("--m_beta", type=amount, default=0.32, help="label smoothness")
    add("--m_gamma", type=amount, default=1.0, help="diversity")
    add("--m_thres", type=share, default=0.83, help="over-penalty threshold, share of blocks")
    add("--m_thres_type", choices=["soft", "hard"], default="hard")
    add("--m_eta", type=amount, default=0.05, help="prior weight")
    add("--m_omega", type=amount, default=0.001, help="compatibility")
    add_boolean(add, "--set_resolve", True, "break ties of identical outputs")
    add("--m_niter", type=positive, default=4, help="sweeps")
    add_boolean(add, "--parallel", True, "all parts at once")
    flags.add_flags(
        parser, data.NAMES, ARCHS,
        {"lr": ["--learning_rate"], "weight_decay": ["--decay"],
         "job_name": ["--add_name", "--tag"]},
        dataset="cifar10", arch="wrn28_10", epochs=300, batch_size=100, lr=0.1, weight_decay=1e-4,
        workers=2, pretrained="")

    first = parser.peek(argv)
    implied = ("comix" if first.comix else "puzzle" if first.graph else "cutmix" if first.box else
               {"mixup": "input", "mixup_hidden": "manifold", None: None}.get(first.train,
                                                                             first.train))
    if first.method and implied and implied != first.method:
        parser.error(f"--train, --box, --graph and --comix ask for {implied}, "
                     f"--method for {first.method}: give one of them")
    method = first.method or implied or "vanilla"
    if method == "comix":
        parser.set_defaults(dataset="cifar100")
    parser.set_defaults(method=method)
    parser.set_defaults(**method_defaults(method, parser.peek(argv).dataset))
    args = parser.parse_args(argv)
    args.method = method
    if len(args.schedule) != len(args.gammas):
        parser.error(f"--schedule has {len(args.schedule)} epochs, --gammas {len(args.gammas)} "
                     "factors: give as many of one as of the other")
    if args.kernel_size % 2 == 0:
        parser.error(f"--kernel_size {args.kernel_size} is not odd")
    for name in ("t_size", "m_block_num"):
        if getattr(args, name) == 0:
            parser.error(f"--{name} 0 is neither -1 nor at least 1")
    if method == "comix" and args.mixup_alpha <= 0:
        parser.error(f"--mixup_alpha {args.mixup_alpha}: Co-Mixup's must be above 0")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        parser.error(f"--start_epoch {args.start_epoch}: the last epoch is {args.epochs - 1}")
    if args.ngpu == 0:
        args.device = "cpu"
    args.mp = min(args.mp, os.cpu_count())
    return args


# ----------------------------------------------------------------------------------------- mixing

class Mixed(NamedTuple):
    """A batch ready for the network, and what the preview shows of its making."""
    images: torch.Tensor            # (B, 3, H, W)
    targets: torch.Tensor           # (B, num_classes)
    hidden: dict = {}               # manifold: perm, lam and layer of the mixing inside
    partners: torch.Tensor | None = None
    saliency: torch.Tensor | None = None


def saliency_gradient(net, images, labels, args, scaler, part):
    """Gradient of the clean loss with respect to the images, (B, 3, H, W).

    When the clean loss takes part in training (update_ratio < 1, clean_lam > 0) the gradients of
    the parameters stay, weighed by these images' `part` of the batch, and the mixed loss's are
    added to them; else they are not computed.
    """
    sage = args.method == "sage"
    weight = 1 - args.update_ratio if sage else args.clean_lam
    train = not args.eval_mode if sage else weight > 0

    def clean_loss(logits, labels):
        loss = (softmax_bce(logits, probabilities(labels, logits.shape[1])) if sage else
                F.cross_entropy(logits.float(), labels))
        return scaler.scale(loss)

    with runtime.autocast(args, images.device):
        if not weight:
            return input_gradient(net, images, labels, loss=clean_loss, train=train)
        images = images.detach().requires_grad_()
        net.train(train)
        logits = net(images)
        net.train()
    weight = weight if sage else 2 * weight / logits.shape[1]
    (clean_loss(logits, labels) * weight * part).backward()
    return images.grad


def mix_batch(net, images, labels, args, info, generator, scaler, part=1.0) -> Mixed:
    """Mixes images, `part` of the batch, by --method; all randomness is of `generator`."""
    n, (height, width) = len(images), images.shape[-2:]
    per_image = n if args.in_batch else None

    if args.method == "vanilla":
        return Mixed(images, probabilities(labels, info.num_classes))

    if args.method == "comix":
        draws = comixup.draw_comix(n, generator, m_part=args.m_part, block_num=args.m_block_num,
                                   mixup_alpha=args.mixup_alpha)
        saliency = puzzlemix.gradient_magnitude(
            saliency_gradient(net, images, labels, args, scaler, part))
        mixed, targets = comixup.co_mix_batch(
            images, probabilities(labels, info.num_classes), saliency, draws,
            m_part=args.m_part, omega=args.m_omega, beta=args.m_beta, gamma=args.m_gamma,
            eta=args.m_eta, thres=args.m_thres, thres_type=args.m_thres_type,
            set_resolve=args.set_resolve, niter=args.m_niter, solver=args.solver,
            parallel=args.parallel)
        return Mixed(mixed, targets, saliency=saliency)

    perm = draw_perm(n, generator).to(images.device, non_blocking=True)
    lam = draw_lambda(args.mixup_alpha, generator, per_image)
    hidden, saliency = {}, None

    if args.method == "sage":
        lam = args.upper_lambda * (lam if args.mixup_alpha > 0 else torch.tensor(0.5))
        offsets = draw_offsets(height, width, args.rand_pos, generator)
        saliency = gradient_saliency(saliency_gradient(net, images, labels, args, scaler, part),
                                     args.kernel_size, args.blur_sigma)
        mixed, ratio = sage_mix(images, saliency, perm, offsets, lam)
        saliency = saliency[:, 0]

    elif args.method == "puzzle":
        block_num = puzzlemix.draw_block_num(generator, (height, width))
        noisy, adversary = puzzlemix.draw_noise(images, args.adv_p, args.adv_eps, generator,
                                                mean=info.mean, std=info.std)
        grad = saliency_gradient(net, noisy, labels, args, scaler, part)
        saliency = puzzlemix.gradient_magnitude(grad)
        mixed, ratio = puzzlemix.puzzle_mix(
            images, saliency, perm, lam, block_num, beta=args.beta, gamma=args.gamma,
            eta=args.eta, n_labels=args.n_labels, neigh_size=args.neigh_size,
            transport=args.transport, t_eps=args.t_eps, t_size=args.t_size, mean=info.mean,
            std=info.std, solver=args.solver, threads=args.mp, **adversary(grad))

    elif args.method == "saliencymix":
        lam = saliencymix.draw_box_lambda(generator)    # Beta(1, 1) whatever --mixup_alpha is
        source = to_uint8(images[perm[:1]], info)
        saliency = saliencymix.fine_grained_saliency(source)
        mixed, ratio = saliencymix.saliency_mix(images, perm, lam, saliency[0])
        saliency = saliency.expand(n, -1, -1)

    elif args.method == "cutmix":
        mixed, ratio = cutmix(images, perm, draw_centre(height, width, generator, per_image), lam)

    elif args.method == "manifold":
        layer = int(torch.randint(3, (), generator=generator))
        mixed, ratio = images, lam.expand(n).to(images.device, non_blocking=True)
        hidden = {"perm": perm, "lam": ratio, "layer": layer}

    else:
        mixed, ratio = mixup(images, perm, lam)

    return Mixed(mixed, soft_targets(labels, perm, ratio, info.num_classes), hidden, images[perm],
                 saliency)


# --------------------------------------------------------------------------------------- training

def mixed_share(args, epoch: int) -> float:
    """prob_mix under --mix_schedule."""
    if args.mix_schedule == "scheduled":
        return args.prob_mix * min(1, (epoch + 1) / args.mix_scheduled_epoch)
    if args.mix_schedule == "delayed" and epoch < args.mix_scheduled_epoch:
        return 0.0
    return args.prob_mix


def training_step(net, model, images, labels, args, info, epoch, generator, scaler):
    """Leaves the gradients of one step in the parameters; returns the loss and the logits.

    The last part of the batch is mixed (all of it by default), the rest stays clean.
    """
    n = len(images)
    mixed_count = int(n * mixed_share(args, epoch))
    clean_count = n - mixed_count
    loss, parts = 0, []
    if mixed_count:
        mixed = mix_batch(net, images[clean_count:], labels[clean_count:], args, info, generator,
                          scaler, mixed_count / n)
        with runtime.autocast(args, images.device):
            logits = model(mixed.images, **mixed.hidden)
        loss = softmax_bce(logits, mixed.targets) * (mixed_count / n)
        if args.method == "sage":
            loss = loss * args.update_ratio         # the clean loss weighs 1 - update_ratio
        parts = [logits]
    if clean_count:
        with runtime.autocast(args, images.device):
            logits = model(images[:clean_count])
        target = F.one_hot(labels[:clean_count], info.num_classes)
        loss = loss + softmax_bce(logits, target) * (clean_count / n)
        parts.insert(0, logits)
    scaler.scale(loss).backward()
    return loss, torch.cat(parts)


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """The rest of the epoch that `run` stands in; returns its sums of loss and hits."""
    net.train()
    sums = StepSums(len(loader), run.device, run.sums)
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(net, model, images, labels, args, info, run.epoch, generator,
                                     scaler)
        scaler.step(optimizer)
        scaler.update()
        sums.add(step, loss, logits, labels)
        if run.ends(step, sums, args.print_freq):
            break
    sums.check(run.epoch)
    return sums


def draw_preview(path, net, train, args, info, scaler):
    """A picture of the first training batch, mixed by the method."""
    train.set_epoch(0)
    images, labels = next(iter(train))
    generator = distributed.step_generator(args.seed, 0, 0)
    mixed = mix_batch(copy.deepcopy(net), images, labels, args, info, generator, scaler)
    shown = mixed.images
    if mixed.hidden:                # drawn at the input; training mixes behind a drawn layer
        shown, _ = mixup(images, mixed.hidden["perm"], mixed.hidden["lam"])
    rows = {"image": images, "partner": mixed.partners, "saliency": mixed.saliency, "mixed": shown}
    return plots.preview(path, f"{args.method} on {info.name}",
                        {name: batch for name, batch in rows.items() if batch is not None},
                        mixed.targets, info)


def check_sizes(args, *sides: int):
    """Raises RunError when the method cannot work on images of these sides in pixels."""
    least = min(sides)
    if args.method == "sage" and args.kernel_size // 2 >= least:
        raise RunError(f"--kernel_size {args.kernel_size} is too wide for images of {least} pixels")
    if args.method == "puzzle" and any(side % 2 for side in sides):
        raise RunError("puzzle cuts images into 2, 4, 8 or 16 blocks a side: "
                       f"{'×'.join(map(str, sides))} pixels cannot be halved; give an even "
                       "--image_size")
    if args.method == "comix" and args.m_block_num > least:
        raise RunError(f"--m_block_num {args.m_block_num} is more than {least} pixels")


def main(argv=None):
    """Trains (or evaluates, or draws a preview) as the flags say; returns the network."""
    args = parse_args(argv)
    runtime.use_gpus(args.ngpu)
    device = runtime.setup(args)

    # Data, network, optimizer
    train, test, info = data.load(
        args.dataset, args.data_dir, Recipe(), batch_size=args.batch_size, device=device,
        seed=args.seed, loader=args.loader, image_size=args.image_size, val_split=args.val_split,
        labels_per_class=args.labels_per_class,
        valid_labels_per_class=args.valid_labels_per_class, workers=args.workers)
    check_sizes(args, info.image_size, info.width)
    torch.manual_seed(args.seed)
    net, model = runtime.prepare(
        models.build(args.arch, info.num_classes, info.image_size,
                     initial_channels=args.initial_channels, dropout=0.5 * args.dropout),
        args, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.momentum > 0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}")

    # The run: its folder, what it holds already, and the place to go on from
    run = Run(args, device, info, [args.method, f"job{args.job_id}" * (args.job_id > 0)],
                     model=net, optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights()
        if not checkpoint:
            load_pretrained(net, args)
        if args.evaluate:
            evaluation.report(net, test, args, info, run, checkpoint)
        elif distributed.rank() == 0:
            picture = draw_preview(args.preview, net, train, args, info, scaler)
            log(f"mixed images: {picture}")
        return net
    run.start(args.start_epoch)
    if not run.resumed:
        load_pretrained(net, args)

    # The epochs
    while not run.over:
        rate = args.lr
        for start, gamma in zip(args.schedule, args.gammas, strict=True):
            rate *= gamma if run.epoch >= start else 1
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums = train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row, timing = {"lr": rate} | sums.result(), run.clock()
        distributed.share_buffers(net)
        for part, batches in (("valid", info.valid), ("test", test)):
            if batches:
                row |= evaluation.columns(evaluation.evaluate(net, batches, args, info), part)
        run.end_epoch(row | timing, row["valid_accuracy" if info.valid else "test_accuracy"], sums)

    # The report
    evaluation.report(net, test, args, info, run)
    run.finish(f"{args.method}, {args.arch} on {info.name}", draw_preview, net, train, args, info,
               scaler)
    return net


if __name__ == "__main__":
    runtime.launch(main)
