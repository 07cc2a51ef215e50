#!/usr/bin/env python3
"""SAGE (Ma et al., BMVC 2022) and the methods it is compared with, in one program:
vanilla, input (Mixup), manifold, cutmix, saliencymix, puzzle, comix, sage.

CPU trial   python sage/main.py --dataset digits --method sage --rand_pos 0.01 \\
                --arch preactresnet18 --initial_channels 16 --epochs 16 --schedule 6 12
one GPU     python sage/main.py --dataset cifar100 --method sage --rand_pos 0.01 --amp bf16
eight GPUs  torchrun --nproc_per_node=8 sage/main.py --method sage … --batch_size 104
two nodes   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \\
                --rdzv_endpoint=HOST:29500 sage/main.py --method sage … --batch_size 112"""
import copy
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # no traceback of Ctrl-C while importing

import torch
import torch.nn.functional as F

from common import data, distributed, evaluation, flags, mixing, models, plots, runtime
from common.data.recipe import Recipe, to_uint8
from common.distributed import log
from common.errors import RunError
from common.flags import add_boolean, amount, chosen, count, number, positive, share
from common.mixing import probabilities, softmax_bce
from common.models.parts import Network
from common.models.weights import load_pretrained
from common.run import Run, about
from sage import comixup, puzzlemix, rearrange, saliencymix

METHODS = {"vanilla": "Plain training", "input": "Mixup", "manifold": "Manifold Mixup",
           "cutmix": "CutMix", "saliencymix": "SaliencyMix", "puzzle": "Puzzle Mix",
           "comix": "Co-Mixup", "sage": "SAGE"}
OLDER_WORDS = {"mixup": "input", "mixup_hidden": "manifold"}        # of --train
DEFAULTS = {"comix": {"mixup_alpha": 2.0, "clean_lam": 1.0, "dataset": "cifar100", "workers": 0,
                      "arch": "preactresnet18", "lr": 0.2, "schedule": [100, 200]},
            "manifold": {"mixup_alpha": 2.0}, "puzzle": {"t_size": 4}}
TINY_DEFAULTS = {"comix": DEFAULTS["comix"], "puzzle": {"clean_lam": 1.0}} | dict.fromkeys(
    ("input", "manifold", "cutmix"), {"mixup_alpha": 0.2})          # of tiny-imagenet-200


def parse_args(argv=None):
    """Return the flags; usage errors exit with code 2."""
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("schedule and run").add_argument
    add("--schedule", "--milestones", type=count, nargs="+", default=[150, 225],
        help="epochs of the LR changes")
    add("--gammas", type=amount, nargs="+", default=[0.1, 0.1], help="LR factors at these epochs")
    add_boolean(add, "--dropout", False, "dropout 0.5 before the last layer")
    add("--valid_labels_per_class", type=count, default=0, help="of each class, kept for best.pt")
    add("--ngpu", type=count, default=1, help="0: CPU; above 1: restarts itself under torchrun")
    add("--start_epoch", type=count, default=None, help="first epoch, counted from 0")
    add("--job_id", type=count, default=0, help="suffix of the run's folder, 0: none")
    add_boolean(add, "--log_off", False, "write no files")
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, help="(default: from the older flags below, else vanilla)")
    add("--train", choices=["vanilla", *OLDER_WORDS, "sage"], help="older --method, as are:")
    add_boolean(add, "--box", None, "CutMix")
    add_boolean(add, "--graph", None, "Puzzle Mix")
    add_boolean(add, "--comix", None, "Co-Mixup")
    add("--mixup_alpha", type=number(), default=1.0, help="of Beta (saliencymix: 1) or Dirichlet")
    add_boolean(add, "--in_batch", False, "a lambda an image (not of saliencymix and comix)")
    add("--prob_mix", type=share, default=1.0, help="fraction of the batch that is mixed")
    add("--mix_schedule", choices=["fixed", "scheduled", "delayed"], default="fixed",
        help="--prob_mix of each batch: always; growing to it until an epoch; only from it on")
    add("--mix_scheduled_epoch", type=positive, default=300, help="the epoch of --mix_schedule")
    add = parser.add_argument_group("sage").add_argument
    add("--blur_sigma", type=number(above=0), default=1.0, help="saliency blur, pixels")
    add("--kernel_size", type=positive, default=5, help="saliency blur, pixels, odd")
    add_boolean(add, "--eval_mode", False, "saliency pass in eval mode")
    add("--rand_pos", type=share, default=0.5, help="share of offsets tried; published: 0.01")
    add("--update_ratio", type=share, default=1.0, help="weight of the mixed loss; rest: clean")
    add("--upper_lambda", type=share, default=1.0, help="multiplies the drawn lambda")
    add = parser.add_argument_group("puzzle and comix").add_argument
    add("--clean_lam", type=amount, default=0.0, help="weight of the clean loss")
    add("--solver", choices=["auto", "gco", "device"], default="auto", help="gco on the CPU, or "
        "batched on the device (auto: gco for puzzle on a CPU, if installed)")
    add = parser.add_argument_group("puzzle").add_argument
    add("--mp", type=count, default=8, help="threads of the graph cuts by gco")
    add("--neigh_size", type=positive, default=4, help="cell of the pairwise colour term, pixels")
    add("--n_labels", type=int, choices=[2, 3, 4], default=3, help="mask levels")
    add("--beta", type=amount, default=1.2, help="label smoothness")
    add("--gamma", type=amount, default=0.5, help="data local smoothness")
    add("--eta", type=amount, default=0.2, help="prior weight")
    add_boolean(add, "--transport", True, "move the blocks")
    add("--t_eps", type=amount, default=0.8, help="cost of moving")
    add("--t_size", type=number(int, low=-1), default=-1, help="side of a moved block; -1: mask's")
    add("--adv_p", type=share, default=0.0, help="probability of adversarial noise")
    add("--adv_eps", type=amount, default=10.0, help="noise ball, in 1/255")
    add = parser.add_argument_group("comix").add_argument
    add("--m_block_num", type=number(int, low=-1), default=4, help="blocks a side, -1: at random")
    add("--m_part", type=positive, default=20, help="images mixed with one another")
    add("--m_beta", type=amount, default=0.32, help="label smoothness")
    add("--m_gamma", type=amount, default=1.0, help="diversity")
    add("--m_thres", type=share, default=0.83, help="share of blocks above which to penalize")
    add("--m_thres_type", choices=["soft", "hard"], default="hard",
        help="penalize in proportion to what is above, or wholly")
    add("--m_eta", type=amount, default=0.05, help="prior weight")
    add("--m_omega", type=amount, default=0.001, help="compatibility")
    add_boolean(add, "--set_resolve", True, "break ties of identical outputs")
    add("--m_niter", type=positive, default=4, help="sweeps")
    add_boolean(add, "--parallel", True, "all parts at once")
    flags.add_flags(parser, data.NAMES, models.ALL, {
        "lr": ["--learning_rate"], "weight_decay": ["--decay"], "job_name": ["--add_name", "--tag"]
    }, dataset="cifar10", arch="wrn28_10", epochs=300, batch_size=100, lr=0.1, weight_decay=1e-4,
       workers=2, pretrained="")

    first = parser.peek(argv)
    older = ("comix" if first.comix else "puzzle" if first.graph else "cutmix" if first.box else
             OLDER_WORDS.get(first.train, first.train))
    method = first.method or older or "vanilla"
    if older not in (None, method):
        parser.error(f"--method {method}, and an older flag for {older}: give one of them")
    defaults = TINY_DEFAULTS if first.dataset == "tiny-imagenet-200" else DEFAULTS
    parser.set_defaults(method=method, **defaults.get(method, {}))
    args = parser.parse_args(argv)
    parser.idle(
        args, (method != "vanilla", "prob_mix mix_schedule", "a method that mixes"),
        (method not in ("vanilla", "saliencymix"), "mixup_alpha", "a method that has it"),
        (method not in ("vanilla", "saliencymix", "comix"), "in_batch", "a method that has it"),
        (args.mix_schedule != "fixed", "mix_scheduled_epoch", "--mix_schedule"),
        (args.solver != "device", "mp", "--solver gco"),
        (args.adv_p, "adv_eps", "--adv_p"), (args.transport, "t_eps t_size", "--transport"))
    if len(args.schedule) != len(args.gammas):
        parser.error(f"--schedule has {len(args.schedule)} epochs, --gammas {len(args.gammas)}")
    if args.kernel_size % 2 == 0 or args.m_block_num in (0, 1):
        parser.error("--kernel_size is odd, --m_block_num 2 or more, or -1")
    if args.ngpu == 0:
        parser.only(args, args.device == "cpu", "device", "--ngpu above 0")
        args.device = "cpu"
    return args


class Mixed(NamedTuple):
    """A batch for the network, and what the preview shows of its making."""
    images: torch.Tensor            # (B, 3, H, W)
    targets: torch.Tensor           # (B, num_classes)
    hidden: dict = {}               # manifold: perm, lam and layer of the mixing inside
    partners: torch.Tensor | None = None
    saliency: torch.Tensor | None = None


def saliency_gradient(net, images, labels, args, scaler, part):
    """Return the gradient (B, 3, H, W) of the clean loss with respect to the images. Where the loss
    takes part in training (update_ratio < 1, clean_lam > 0), leave the gradients of the parameters,
    weighed by these images' `part` of the batch."""
    sage = args.method == "sage"
    weight = 1 - args.update_ratio if sage else args.clean_lam
    train = not args.eval_mode if sage else weight > 0

    def clean_loss(logits, labels):
        return scaler.scale(softmax_bce(logits, probabilities(labels, logits.shape[1])) if sage else
                            F.cross_entropy(logits.float(), labels))
    with runtime.autocast(args, images.device):
        if not weight:
            return mixing.input_gradient(net, images, labels, loss=clean_loss, train=train)
        images = images.detach().requires_grad_()
        net.train(train)
        logits = net(images)
        net.train()
    weight = weight if sage else 2 * weight / logits.shape[1]
    (clean_loss(logits, labels) * weight * part).backward()
    return images.grad


def mix_batch(net, images, labels, args, info, generator, scaler, part=1.0) -> Mixed:
    """Mix images, `part` of the batch, by --method; every random number is `generator`'s."""
    n, size = len(images), images.shape[-2:]
    per_image = n if args.in_batch else None
    compiled = partial(runtime.compiled, args=args)
    gradient = partial(saliency_gradient, net, args=args, scaler=scaler, part=part)

    if args.method == "vanilla":
        return Mixed(images, probabilities(labels, info.num_classes))
    if args.method == "comix":
        draws = comixup.draw_comix(n, generator, m_part=args.m_part, block_num=args.m_block_num,
                                   mixup_alpha=args.mixup_alpha)
        saliency = puzzlemix.gradient_magnitude(gradient(images, labels))
        mixed, targets = compiled(comixup.co_mix_batch)(
            images, probabilities(labels, info.num_classes), saliency, draws,
            **chosen(args, "m_part set_resolve solver parallel"),
            **chosen(args, "omega beta gamma eta thres thres_type niter", "m_"))
        return Mixed(mixed, targets, saliency=saliency)

    perm = mixing.draw_perm(n, generator).to(images.device, non_blocking=True)
    lam = mixing.draw_lambda(args.mixup_alpha, generator, per_image)
    hidden, saliency = {}, None
    if args.method == "sage":
        lam = args.upper_lambda * (lam if args.mixup_alpha > 0 else torch.tensor(0.5))
        offsets = rearrange.draw_offsets(*size, args.rand_pos, generator)
        saliency = rearrange.gradient_saliency(gradient(images, labels), args.kernel_size,
                                               args.blur_sigma)
        mixed, ratio = compiled(rearrange.sage_mix)(images, saliency, perm, offsets, lam)
        saliency = saliency[:, 0]
    elif args.method == "puzzle":
        block_num = puzzlemix.draw_block_num(generator, size)
        noisy, adversary = puzzlemix.draw_noise(images, args.adv_p, args.adv_eps, generator,
                                                mean=info.mean, std=info.std)
        grad = gradient(noisy, labels)
        saliency = puzzlemix.gradient_magnitude(grad)
        mixed, ratio = compiled(puzzlemix.puzzle_mix)(
            images, saliency, perm, lam, block_num, mean=info.mean, std=info.std, threads=args.mp,
            **chosen(args, "beta gamma eta n_labels neigh_size transport t_eps t_size solver"),
            **adversary(grad))
    elif args.method == "saliencymix":
        lam = saliencymix.draw_box_lambda(generator)    # Beta(1, 1) whatever --mixup_alpha is
        saliency = compiled(saliencymix.fine_grained_saliency)(to_uint8(images[perm[:1]], info))
        mixed, ratio = compiled(saliencymix.saliency_mix)(images, perm, lam, saliency[0])
        saliency = saliency.expand(n, -1, -1)
    elif args.method == "cutmix":
        centre = mixing.draw_centre(*size, generator, per_image)
        mixed, ratio = compiled(mixing.cutmix)(images, perm, centre, lam)
    elif args.method == "manifold":
        layer = int(torch.randint(3, (), generator=generator))
        mixed, ratio = images, lam.expand(n).to(images.device, non_blocking=True)
        hidden = {"perm": perm, "lam": ratio, "layer": layer}
    else:
        mixed, ratio = compiled(mixing.mixup)(images, perm, lam)

    targets = mixing.soft_targets(labels, perm, ratio, info.num_classes)
    return Mixed(mixed, targets, hidden, images[perm], saliency)


def mixed_share(args, epoch: int) -> float:
    """Return --prob_mix under --mix_schedule; without mixing 1, the batch in one piece."""
    if args.method == "vanilla":
        return 1.0
    return args.prob_mix * {"fixed": 1, "scheduled": min(1, (epoch + 1) / args.mix_scheduled_epoch),
                            "delayed": epoch >= args.mix_scheduled_epoch}[args.mix_schedule]


def training_step(net, model, images, labels, args, info, epoch, generator, scaler):
    """Leave the gradients of one step in the parameters; return the loss and the logits. The last
    part of the batch is mixed (all of it by default), the rest stays clean."""
    clean = len(images) - int(len(images) * mixed_share(args, epoch))
    share, parts = clean / len(images), []
    in_evaluation_mode = {"sage": args.eval_mode, "puzzle": not args.clean_lam,
                          "comix": not args.clean_lam}
    if in_evaluation_mode.get(args.method):         # of the saliency; each rank has its own
        distributed.share_buffers(net)
    if share < 1:
        mixed = mix_batch(net, images[clean:], labels[clean:], args, info, generator, scaler,
                          1 - share)
        ratio = args.update_ratio if args.method == "sage" else 1   # the clean loss has the rest
        parts.append((mixed, (1 - share) * ratio))
    if share > 0:
        targets = probabilities(labels[:clean], info.num_classes)
        parts.append((Mixed(images[:clean], targets), share))
    loss, logits = 0, []
    for part, weight in parts:
        with runtime.autocast(args, images.device):
            logits.append(model(part.images, **part.hidden))
        loss = loss + softmax_bce(logits[-1], part.targets) * weight
    scaler.scale(loss).backward()
    return loss, torch.cat(logits[::-1])


def train_one_epoch(net, model, loader, optimizer, scaler, args, info, run):
    """Train to the end of the run's epoch; run.sums takes loss and hits."""
    net.train()
    for step, (images, labels) in run.steps(loader):
        generator = distributed.step_generator(args.seed, run.epoch, step)
        optimizer.zero_grad(set_to_none=True)
        loss, logits = training_step(net, model, images, labels, args, info, run.epoch, generator,
                                     scaler)
        scaler.step(optimizer)
        scaler.update()
        run.sums.add(step, loss, logits, labels)


def draw_preview(path, net, train, args, info, scaler):
    """Draw the first training batch, mixed with a lambda near a half; return the path."""
    train.set_epoch(0)
    images, labels = next(iter(train))
    args = copy.copy(args)
    args.mixup_alpha = args.mixup_alpha if args.method == "comix" else 32.0
    batches = (mix_batch(copy.deepcopy(net), images, labels, args, info,
                         distributed.step_generator(args.seed, 0, step), scaler)
               for step in range(30 if args.method == "saliencymix" else 1))    # lambda: Beta(1, 1)
    mixed = min(batches, key=lambda mixed: mixed.targets.amax(1).median())
    shown = mixed.images
    if mixed.hidden:                # drawn at the input; training mixes behind a drawn layer
        shown, _ = mixing.mixup(images, mixed.hidden["perm"], mixed.hidden["lam"])
    rows = {"image": images, "partner": mixed.partners, "saliency": mixed.saliency, "mixed": shown}
    return plots.preview(path, f"{METHODS[args.method]} on {info.name}", rows, mixed.targets, info)


def main(argv=None):
    """Train, evaluate or draw as the flags say; return the network."""
    args = parse_args(argv)
    runtime.use_gpus(args.ngpu)
    device = runtime.setup(args)

    train, test, info = data.load(args.dataset, args.data_dir, Recipe(), device=device,
                                  **chosen(args, f"{flags.LOADING} valid_labels_per_class"))
    torch.manual_seed(args.seed)
    net = models.build(args.arch, info.num_classes, info.image_size,
                       initial_channels=args.initial_channels, dropout=0.5 * args.dropout)
    if args.method == "manifold" and not isinstance(net, Network):
        raise RunError(f"--method manifold: {args.arch} for {info.image_size} pixels cannot mix "
                       "inside; preactresnet18 can")
    net, model = runtime.prepare(net, args, device)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, nesterov=args.momentum > 0)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    log(f"{about(info, net, train, args)}; method {args.method}")

    run = Run(args, device, info, [args.method, f"job{args.job_id}" * (args.job_id > 0)],
              model=net, optimizer=optimizer, scaler=scaler)
    if args.evaluate or args.preview:
        checkpoint = run.load_weights(train, test) or load_pretrained(net, args)
        if args.evaluate:
            evaluation.report(net, test, args, info, run, checkpoint)
        elif distributed.rank() == 0:
            log(f"mixed images: {draw_preview(args.preview, net, train, args, info, scaler)}")
        return net
    run.start(args.start_epoch)
    if not run.resumed:
        load_pretrained(net, args)

    while not run.over:
        rate = args.lr
        for start, gamma in zip(args.schedule, args.gammas, strict=True):
            rate *= gamma if run.epoch >= start else 1
        for group in optimizer.param_groups:
            group["lr"] = rate
        train_one_epoch(net, model, train, optimizer, scaler, args, info, run)
        row = {"lr": rate} | run.sums.result()
        for part, batches in (("valid", info.valid), ("test", test)):
            if batches:
                row |= evaluation.columns(evaluation.evaluate(net, batches, args, info), part)
        run.end_epoch(row, row["valid_accuracy" if info.valid else "test_accuracy"])

    evaluation.report(net, test, args, info, run)
    run.finish(f"{METHODS[args.method]}, {args.arch} on {info.name}", draw_preview, net, train,
               args, info, scaler)
    return net


if __name__ == "__main__":
    runtime.launch(main)
