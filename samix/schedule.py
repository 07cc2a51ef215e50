"""Schedules over a run, and the optimizer's groups of parameters."""
import math


def cosine(step: int, total: int) -> float:
    """Return a factor that falls from 1 at step 0 to 0 at step `total`."""
    return (1 + math.cos(math.pi * step / total)) / 2


def ema_momentum(step: int, total: int, base: float, end: float, start: float) -> float:
    """Return branch k's momentum after `step` of `total`: `base` up to a share `start` of the run,
    then a cosine towards `end` that began at step 0, as in the recorded runs: it jumps there."""
    return base if step < start * total else end - (end - base) * cosine(step, total)


def parameter_groups(net, args) -> list[dict]:
    """Return what learns, q and the MixBlock apart; AdamW decays no norm, bias, token, position."""
    groups = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            plain = args.optimizer == "adamw" and (parameter.ndim == 1 or any(
                word in name for word in ("class_token", "position", "pos_embedding")))
            part = "block" if name.startswith("block.") else "q"
            groups.setdefault((part, plain), []).append(parameter)
    return [{"params": found, "part": part, "weight_decay": 0.0 if plain else args.weight_decay,
             "momentum": args.block_momentum if part == "block" else args.momentum}
            for (part, plain), found in groups.items()]


def step_rates(args, step: int, epoch_steps: int) -> dict:
    """Return learning rates of "q" and "block" at training step `step` of the run, from 0."""
    epoch = step / epoch_steps if args.lr_every == "step" else step // epoch_steps
    fall, least, block_least = cosine(epoch, args.epochs), args.min_lr, args.block_min_lr
    if args.milestones is not None:
        fall = args.gamma ** sum(epoch >= milestone for milestone in args.milestones)
        least = block_least = 0
    rates = {"q": least + (args.lr - least) * fall,
             "block": block_least + (args.block_lr - block_least) * fall}
    if epoch < args.warmup_epochs:
        rates["q"] *= 1 - (1 - epoch / args.warmup_epochs) * (1 - args.warmup_ratio)
    return rates
