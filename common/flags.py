"""The parser of all programs, argparse types, and the flags shared by all training scripts."""
import argparse
import contextlib
import difflib
import math
import os
import sys

from common.distributed import print_once, warn

BOOLEANS = {"true": True, "t": True, "yes": True, "y": True, "1": True,
            "false": False, "f": False, "no": False, "n": False, "0": False}


class Help(argparse.HelpFormatter):
    """Shows the default of every flag that has one, also of flags without a help text."""

    def add_argument(self, action):
        text, none = action.help or "", (None, "", [], argparse.SUPPRESS)
        if action.default not in none and text != argparse.SUPPRESS and "(default" not in text:
            action.help = f"{text} (default: %(default)s)".strip()
        super().add_argument(action)


class Parser(argparse.ArgumentParser):
    """argparse with a main.py's docstring, usage errors of two lines, and "did you mean"."""

    def __init__(self, doc: str | None):
        super().__init__(description=(doc or "").split("\n\n")[0], formatter_class=Help,
                         usage="%(prog)s [flags]")
        self.refused = {}

    def refuse(self, names: str, why: str):
        """Leave shared flags out of --help, and make them usage errors."""
        for name in names.split():
            self.refused[name] = why
            self._option_string_actions[f"--{name}"].help = argparse.SUPPRESS

    def given(self, args, names: str) -> list[str]:
        """Return those of the flags whose values are not the defaults."""
        return [action.option_strings[0] for action in self._actions if action.dest in names.split()
                and getattr(args, action.dest) != action.default]

    def only(self, args, holds: bool, names: str, of: str):
        """Refuse flags that were given, unless what they are of holds."""
        for flag in () if holds else self.given(args, names):
            self.error(f"{flag} is for {of}")

    def idle(self, args, *rules: tuple):
        """Warn of flags that were given; a rule: whether they have an effect, names, what of."""
        for holds, names, of in rules:
            if not holds and (given := self.given(args, names)):
                warn(f"{' '.join(given)}: no effect without {of}")

    def peek(self, argv=None) -> argparse.Namespace:
        """Return the flags given, before a configuration among them sets the others' defaults."""
        words = sys.argv[1:] if argv is None else argv
        return self.parse_known_args([word for word in words if word not in ("-h", "--help")])[0]

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """As argparse's; refused flags, and flags of pictures and evaluations that nothing would
        follow, are errors. A flag in a group headed by other methods than --method is warned of."""
        found = super().parse_args(args, namespace)
        methods = getattr(self._option_string_actions.get("--method"), "choices", [])
        for group in self._action_groups:
            theirs = group.title.replace(" and ", ", ").split(", ")
            if {*theirs} <= {*methods}:
                names = " ".join(action.dest for action in group._group_actions)
                self.idle(found, (found.method in theirs, names,
                                  f"--method {group.title.replace(' and ', ' or ')}"))
        for name, why in self.refused.items():
            if getattr(found, name) != self.get_default(name):
                self.error(f"--{name}: {why}")
        if getattr(found, "target_layer", None) and not found.cam:
            self.error("--target_layer is of --cam FILE.png")
        if getattr(found, "corruptions", None) and (found.cam or found.preview):
            self.error("--corruptions is of evaluations: not with --cam or --preview")
        if getattr(found, "cam", None):                 # draws with the weights of --evaluate
            self.idle(found, (False, "compile", "training or --evaluate"))
            found.evaluate, found.compile = "auto", False       # whose hooks see every module
        return found

    def error(self, message: str):
        """Exit with code 2 and two lines, of which one may say "did you mean"."""
        for word in message.split() if message.startswith("unrecognized") else ():
            near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near and word.startswith("--") else ""
        self.stop(message)

    def stop(self, message: str):
        """Print a usage error, and exit."""
        usage = self.usage % {"prog": self.prog}
        print_once(f"usage: {usage}; --help lists them\n{self.prog}: error: {message}")
        sys.exit(2)


def boolean(text: str) -> bool:
    """argparse type of the papers' booleans: true/false, yes/no, 1/0 in any case."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return BOOLEANS[text.lower()]


def add_boolean(add, name: str, default: bool, help: str):
    """`--name`, `--name True` and `--name False` all work; `add`: a parser's add_argument."""
    add(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def number(kind=float, low=-math.inf, high=math.inf, above=-math.inf):
    """argparse type: a finite number within bounds (`above` excludes the bound itself)."""
    bounds = [f"{word} {bound}" for word, bound in
              (("of at least", low), ("at most", high), ("above", above)) if abs(bound) < math.inf]

    def check(text: str):
        with contextlib.suppress(ValueError):
            value = kind(text.removesuffix(".0") if kind is int else text)
            if low <= value <= high and above < value and abs(value) < math.inf:
                return value
        what = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"'{text}' is not {what} {' and '.join(bounds)}".rstrip())
    return check


def path(text: str) -> str:
    """argparse type: a path, with ~ expanded."""
    if not text:
        raise argparse.ArgumentTypeError("an empty string is no path")
    return os.path.expanduser(text)


def picture(text: str) -> str:
    """argparse type: the path of a picture to draw."""
    if not path(text).lower().endswith((".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")):
        raise argparse.ArgumentTypeError(f"'{text}' is no name of a picture: FILE.png, .pdf, .svg")
    return path(text)


def folder(text: str) -> str:
    """argparse type: a folder that is there."""
    if not os.path.isdir(path(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is no folder")
    return path(text)


def weights(text: str) -> str:
    """argparse type of --pretrained: "torchvision", a path, or "" for none; booleans, too."""
    known = {word: "torchvision" if value else "" for word, value in BOOLEANS.items()}
    return (known | {"none": "", "torchvision": "torchvision"}).get(text.lower(), text)


LOADING = "batch_size seed loader image_size val_split labels_per_class workers"   # of data.load
positive, count = number(int, low=1), number(int, low=0)
amount, share = number(low=0), number(low=0, high=1)


def add_flags(parser, datasets, archs, names: dict, **defaults):
    """Add the flags shared by all training scripts. names: a paper's own names for some of these
    flags, by ours; defaults: values by flag (none: None, unless a configuration sets it)."""
    group = parser.add_argument_group("data, network and schedule (the same in every main.py)")
    defaults = {"data_dir": "data", "root_dir": "experiments", "initial_channels": 64, "seed": 0,
                "workers": 4, "print_freq": 100, "momentum": 0.9, "job_name": ""} | defaults

    def add(name, help, **options):
        group.add_argument(f"--{name}", *names.get(name, ()), default=defaults.get(name), help=help,
                           **options)

    add("dataset", "which data", choices=datasets)
    add("data_dir", "folder (or .npz file) of the data set", type=path)
    add("root_dir", "where the run's folder is made", type=path)
    add("job_name", "suffix of the run's folder")
    add("labels_per_class", "training images of each class, if not all", type=positive)
    add("val_split", "share of each class to test on, where a folder or imagenet has no test part "
        "(drawn by --seed)", type=number(above=0, high=0.9))
    add("image_size", "side of the square images in pixels, if not the data set's", type=positive)
    add("arch", ", ".join(archs), choices=archs, metavar="NET")
    add("initial_channels", "64: as published; 16: a quarter as wide", type=number(int, low=4))
    if "pretrained" in defaults:
        add("pretrained", "begin with ImageNet weights: torchvision's (the flag alone), a file's, "
            "or none", type=weights, nargs="?", const="torchvision", metavar="FILE")
    add("epochs", "passes over the training images", type=positive)
    add("batch_size", "images of a step, over all processes", type=positive)
    add("lr", "learning rate", type=amount)
    add("momentum", "of SGD", type=share)
    add("weight_decay", "L2 penalty of the optimizer", type=amount)
    add("seed", "random seed" + " (-1: pick one)" * (defaults["seed"] == -1),
        type=number(int, low=-2**63, high=2**63 - 1))
    add("workers", "threads (of torch's loader: processes) that decode or run DALI; 0 "
        "counts as 1", type=count)
    add("print_freq", "steps between log lines", type=positive)
    add_run_time_flags(parser.add_argument_group("run time (the same in every main.py)"),
                       names.get("resume", ()))


def add_run_time_flags(group, resume):
    """Add the flags of the machine, of resume, evaluation and pictures; resume: its other names."""
    add = group.add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU, if any")
    add("--amp", choices=["off", "bf16", "fp16"], default="off", help="autocast; off: fp32, on "
        "GPUs with TF32, unless NVIDIA_TF32_OVERRIDE=0; fp16 needs a GPU")
    add_boolean(add, "--compile", False, "torch.compile the network and the mixing")
    add_boolean(add, "--channels_last", True, "memory format of the network (faster)")
    add("--loader", choices=["auto", "dali", "torch"], default="auto", help="auto: the faster")
    add("--resume", *resume, type=path, metavar="auto|PATH",
        help="continue from this checkpoint; auto: from the run's newest valid one, if any")
    either = group.add_mutually_exclusive_group().add_argument
    either("--evaluate", nargs="?", const="auto", type=path, metavar="CHECKPOINT",
           help="evaluate and exit: this file, or --resume's, or the run's best.pt")
    either("--preview", type=picture, metavar="FILE.png",
           help="draw a mixed batch with its label shares (by --resume's network), and exit")
    either("--cam", type=picture, metavar="FILE.png",
           help="draw what --target_layer looks at (Grad-CAM) in test images, and exit")
    add("--target_layer", metavar="layerN.M", help="--cam: block M of stage N, or a module's "
        "name (default: the last with a feature map)")
    add("--corruptions", metavar="DIR", type=folder, help="CIFAR-10-C, CIFAR-100-C or "
        "Tiny-ImageNet-C: evaluate on these too, with --evaluate or after training")
    add("--max_steps", type=positive, metavar="N", help="a trial: stop after N training steps and "
        "N evaluation batches; evaluation, plots and checkpoint follow")
    add_boolean(add, "--tensorboard", False, "write TensorBoard events into the run folder")
    add("--debug", action="store_true", help="show the traceback of an unforeseen error")


def chosen(args, names: str, prefix: str = "") -> dict:
    """Return the values of the flags `prefix` + name as keyword arguments of these names."""
    return {name: getattr(args, prefix + name) for name in names.split()}
