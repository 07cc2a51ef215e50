"""Learning rate and fine-tune phase of Soft Augmentation, as functions of the step alone."""
import math


def step_rate(args, step: int, epoch_steps: int) -> float:
    """Learning rate of training step `step`, counted from 0 over all epochs.

    --decay c: a half cosine from --lr to 0, l: a line, s: times --gamma from each of the
    --milestones on. In the first --warm epochs it is multiplied by the share of them that has
    passed.
    """
    done, epoch = (step + 1) / (args.epochs * epoch_steps + 1), step // epoch_steps
    rate = args.lr * {"c": (1 + math.cos(math.pi * done)) / 2, "l": 1 - done,
                      "s": args.gamma ** sum(epoch >= start for start in args.milestones)
                      }[args.decay]
    return rate * min(1, (step + 1) / (args.warm * epoch_steps)) if args.warm else rate


def fine_tuning(epoch: int, epochs: int, ft: int = 20) -> bool:
    """Whether `epoch` (from 0) belongs to the closing phase of weak augmentation.

    Its last `ft` epochs, but nothing of the first 5 %: a run of hardly more than `ft` epochs
    augments only that first part.
    """
    return epoch >= max(0.05 * epochs, epochs - ft)
