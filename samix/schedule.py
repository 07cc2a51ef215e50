"""Learning rates of branch q and of the MixBlock, and the optimizer's groups of parameters."""
from samix.momentum import cosine


def parameter_groups(net, args) -> list[dict]:
    """q's parameters and the MixBlock's; under AdamW norms, biases, tokens and positions apart,
    without decay."""
    sgd, groups = args.optimizer == "sgd", []
    for part, module, momentum in (("q", getattr(net, "q", net), args.momentum),
                                   ("block", getattr(net, "block", None), args.block_momentum)):
        kinds = {True: [], False: []}
        for name, parameter in module.named_parameters() if module else ():
            plain = parameter.ndim == 1 or any(
                word in name for word in ("class_token", "position", "pos_embedding"))
            kinds[sgd or not plain].append(parameter)
        groups += [{"params": found, "part": part, **({"momentum": momentum} if sgd else {}),
                    "weight_decay": args.weight_decay * decayed}
                   for decayed, found in kinds.items() if found]
    return groups


def step_rates(args, step: int, epoch_steps: int) -> dict:
    """Learning rates of "q" and "block" at training step `step`, counted from 0 over all epochs."""
    epoch = step / epoch_steps if args.lr_every == "step" else step // epoch_steps
    if args.milestones is not None:
        factor = args.gamma ** sum(epoch >= milestone for milestone in args.milestones)
        rates = {"q": args.lr * factor, "block": args.block_lr * factor}
    else:
        fall = cosine(epoch, args.epochs)
        rates = {"q": args.min_lr + (args.lr - args.min_lr) * fall,
                 "block": args.block_min_lr + (args.block_lr - args.block_min_lr) * fall}
    if epoch < args.warmup_epochs:
        rates["q"] *= 1 - (1 - epoch / args.warmup_epochs) * (1 - args.warmup_ratio)
    return rates
