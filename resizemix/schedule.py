"""The paper's learning rate: a linear warm-up, then a half cosine, as a function of the step."""
import math


def step_rate(args, step: int, epoch_steps: int) -> float:
    """Learning rate of training step `step`, counted from 0 over all epochs.

    From --warmup_start_lr straight to --lr in --warmup_epochs, then down a half cosine to --min_lr,
    which it keeps after the end. --restart_epochs: lengths of cosine cycles that begin after one
    another, each from --lr, instead of the one cosine (Loshchilov & Hutter 2017). --lr_schedule
    step: instead of a cosine times --gamma from each of the --milestones on.
    """
    warmup = args.warmup_epochs * epoch_steps
    if step < warmup:
        return args.warmup_start_lr + (args.lr - args.warmup_start_lr) * step / warmup
    if args.lr_schedule == "step":
        return args.lr * args.gamma ** sum(step // epoch_steps >= e for e in args.milestones)
    start, length = warmup, args.epochs * epoch_steps - warmup
    if args.restart_epochs:
        start = end = 0
        for cycle in args.restart_epochs:
            if end <= step:
                start, length = end, cycle * epoch_steps
                end += length
    progress = (step - start) / length if step - start < length else 1.0
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
