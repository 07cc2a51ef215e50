"""Learning rate and fine-tune phase of Soft Augmentation, as functions of the step alone."""
import math

MILESTONES = (1 / 2, 3 / 4, 9 / 10)        # of the epochs, for the step schedule


def learning_rate(step: int, total: int, base: float, *, decay: str = "c", warm: int = 0,
                  steps_per_epoch: int = 1, gamma: float = 0.2) -> float:
    """Learning rate of training step `step` (from 0) out of `total`.

    decay 'c': cosine from `base` to 0, 'l': linear from `base` to 0, anything else: `base` times
    `gamma` for each of 1/2, 3/4 and 9/10 of the epochs that have passed. In the first `warm`
    steps it is multiplied by (step + 1) / warm.
    """
    done = (step + 1) / (total + 1)
    if decay == "c":
        rate = base * (1 + math.cos(math.pi * done)) / 2
    elif decay == "l":
        rate = base * (1 - done)
    else:
        epoch, epochs = step // steps_per_epoch, total // steps_per_epoch
        rate = base * gamma ** sum(epoch >= int(part * epochs) for part in MILESTONES)
    return rate * min(1, (step + 1) / warm) if warm else rate


def step_rate(args, step: int, steps_per_epoch: int) -> float:
    """Learning rate of training step `step`, counted from 0 over all epochs."""
    base, gamma = args.lr, args.gamma
    if args.milestones is not None:
        base *= gamma ** sum(step // steps_per_epoch >= epoch for epoch in args.milestones)
        gamma = 1.0
    return learning_rate(step, args.epochs * steps_per_epoch, base, decay=args.decay,
                         warm=args.warm * steps_per_epoch, steps_per_epoch=steps_per_epoch,
                         gamma=gamma)


def fine_tuning(epoch: int, epochs: int, ft: int = 20) -> bool:
    """Whether `epoch` (from 0) belongs to the closing phase of weak augmentation.

    Its last `ft` epochs, but nothing of the first 5 %: a run of hardly more than `ft` epochs
    augments only that first part.
    """
    return epoch >= max(0.05 * epochs, epochs - ft)
