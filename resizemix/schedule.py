"""The paper's learning rate: a linear warm-up, then a half cosine, as a function of the step."""
import math


def learning_rate(step: int, *, epoch_steps: int, epochs: int, init_lr: float, min_lr: float = 0.0,
                  warmup_epochs: int = 0, warmup_start_lr: float = 1e-5,
                  restart_epochs: tuple[int, ...] = ()) -> float:
    """Learning rate of update number `step` (from 0) of a training of `epochs` epochs.

    epoch_steps: updates per epoch (the training loader's length). From warmup_start_lr straight
    to init_lr in `warmup_epochs`, then down a half cosine to min_lr, which it keeps after the
    end. restart_epochs: lengths of cosine cycles that begin after one another, each from
    init_lr, instead of the one cosine (Loshchilov & Hutter 2017).
    """
    warmup = warmup_epochs * epoch_steps
    if step < warmup:
        return warmup_start_lr + (init_lr - warmup_start_lr) * step / warmup
    start, length = warmup, epochs * epoch_steps - warmup
    if restart_epochs:
        start = end = 0
        for cycle in restart_epochs:
            if end <= step:
                start, length = end, cycle * epoch_steps
                end += length
    progress = (step - start) / length if step - start < length else 1.0
    return min_lr + (init_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def step_rate(args, step: int, epoch_steps: int) -> float:
    """Learning rate of training step `step`, counted from 0 over all epochs."""
    in_steps = args.lr_schedule == "step"
    rate = learning_rate(step, epoch_steps=epoch_steps, epochs=args.epochs, init_lr=args.lr,
                         min_lr=args.lr if in_steps else args.min_lr,
                         warmup_epochs=args.warmup_epochs, warmup_start_lr=args.warmup_start_lr,
                         restart_epochs=tuple(args.restart_epochs))
    return rate * args.gamma ** sum(step // epoch_steps >= epoch for epoch in args.milestones)
