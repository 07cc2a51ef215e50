"""The paper's configurations and methods: values of main.py's flags; the command line wins."""

CIFAR = {"epochs": 200, "batch_size": 256, "warmup_epochs": 5, "image_size": 32}
WIDE_RESNET = CIFAR | {"arch": "wresnet28_10", "lr": 0.2, "weight_decay": 5e-4}
SHAKE_SHAKE = CIFAR | {"arch": "shakeshake26_2x96d", "lr": 0.04, "weight_decay": 1e-4,
                       "epochs": 1800}
CONFIGS = {
    "cifar10_wrs": WIDE_RESNET | {"dataset": "cifar10"},
    "cifar100_wrs": WIDE_RESNET | {"dataset": "cifar100"},
    "cifar10_ss": SHAKE_SHAKE | {"dataset": "cifar10"},
    "cifar100_ss": SHAKE_SHAKE | {"dataset": "cifar100"},
    "imagenet_res": {
        "dataset": "imagenet", "arch": "resnet101", "epochs": 300, "lr": 0.5, "weight_decay": 4e-5,
        "batch_size": 512, "warmup_epochs": 0, "image_size": 224}}     # 64 on each of 8 GPUs
METHODS = {                             # the rows of the paper's tables
    "baseline": {"resizemix": False},
    "cutout": {"resizemix": False, "cutout": 16},
    "cutmix": {"resizemix": False, "cutmix_prob": 0.5},
    "randaugment": {"resizemix": False, "randaugment": True},
    "autoaugment": {"resizemix": False, "autoaugment": True},
    "resizemix": {},
    "resizemix+": {"randaugment": True}}
TITLES = {"baseline": "Plain training", "cutmix": "CutMix", "cutout": "Cutout",
          "randaugment": "RandAugment", "autoaugment": "AutoAugment", "resizemix": "ResizeMix",
          "batch_aug": "batch augmentation"}                # in pictures
