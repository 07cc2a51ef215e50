"""The paper's configurations: dictionaries whose keys are main.py's flags.

batch_size counts the images of one step over all processes. Every value can be overridden on the
command line by the flag of its name.
"""

COMMON = {
    "min_lr": 1e-5,
    "warmup_start_lr": 1e-5,
    "clip_grad": 0.0,           # largest norm of the gradients; 0: not clipped
    "cutout": 0,                # side of the erased square in pixels; 0: none
    "randaugment": False,
    "autoaugment": False,
    "cutmix_prob": 0.0,
    "cutmix_beta": 1.0,
    "resizemix": True,
    "resizemix_low": 0.1,       # scales are uniform between the two
    "resizemix_high": 0.8,
    "batch_aug": False,
    "crop_test": False,
}

CIFAR = COMMON | {
    "epochs": 200,
    "batch_size": 256,
    "warmup_epochs": 5,
    "image_size": 32,
}

WIDE_RESNET = CIFAR | {"arch": "wresnet28_10", "lr": 0.2, "weight_decay": 5e-4}

SHAKE_SHAKE = CIFAR | {"arch": "shakeshake26_2x96d", "lr": 0.04, "weight_decay": 1e-4,
                       "epochs": 1800}

CONFIGS = {
    "cifar10_wrs": WIDE_RESNET | {"dataset": "cifar10"},
    "cifar100_wrs": WIDE_RESNET | {"dataset": "cifar100"},
    "cifar10_ss": SHAKE_SHAKE | {"dataset": "cifar10"},
    "cifar100_ss": SHAKE_SHAKE | {"dataset": "cifar100"},
    "imagenet_res": COMMON | {
        "dataset": "imagenet",
        "arch": "resnet101",
        "epochs": 300,
        "batch_size": 512,      # 64 on each of 8 GPUs
        "lr": 0.5,
        "weight_decay": 4e-5,
        "warmup_epochs": 0,
        "image_size": 224,
    },
}


def get(name: str) -> dict:
    """A copy of the configuration `name`, with or without `.py`; ValueError names the others."""
    try:
        return dict(CONFIGS[name.removesuffix(".py")])
    except KeyError:
        raise ValueError(f"no configuration '{name}'; there are {', '.join(CONFIGS)}") from None
