"""The published configurations, by alias and by the file names of the authors' collection: values
of main.py's flags, whose defaults are ImageNet's. drop_path, nowhere published, is our choice."""
COMMON = {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR = {                               # the MixBlock's rates: the network's
    "dataset": "cifar100", "image_size": 32, "crop": "reflect", "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.201), "neg_weight": 0.5, "lam_mul_k": 0.25, "dropout": 0.0,
    "mask_anneal": False, "batch_size": 100, "epochs": 400, "min_lr": 0.05, "block_lr": None,
    "block_min_lr": None, "ema_end": 0.999999}
TINY = {
    "dataset": "tiny-imagenet-200", "image_size": 64, "neg_weight": 0.5, "dropout": 0.0,
    "mask_anneal": False, "batch_size": 100, "epochs": 400, "lr": 0.2, "min_lr": 0.05,
    "ema_end": 0.999999}
CUB = {                                 # from ImageNet weights
    "dataset": "cub200", "pretrained": "torchvision", "lam_mul_k": 1.0, "batch_size": 16,
    "drop_last": True, "epochs": 200, "lr": 1e-3, "weight_decay": 5e-4, "block_lr": 0.01,
    "block_min_lr": 5e-4, "no_repeat": True, "crop_scale": 0.5, "resize_first": True}
AIRCRAFT = {**CUB, "dataset": "imagenet", "ema_end": 0.99996}
LARGE = {"dataset": "imagenet", "block_min_lr": 1e-4}     # image folders laid out like ImageNet
VIT = {                                 # the originals say switch_off 1.0, which took no effect
    "dataset": "cifar100", "optimizer": "adamw", "weight_decay": 0.05, "clip_grad": 20.0,
    "lr_every": "step", "warmup_epochs": 20, "batch_size": 100, "epochs": 200, "min_lr": 1e-4,
    "block_min_lr": 1e-4, "ema_end": 0.99996, "ema_start": 0.25, "label_smoothing": 0.1,
    "crop_scale": 0.8, "randaugment": True, "mean": CIFAR["mean"], "std": CIFAR["std"]}
NETS = {"r18": "resnet18", "r34": "resnet34", "r50": "resnet50", "r101": "resnet101",
        "rx50": "resnext50_32x4d", "rx101": "resnext101_32x4d"}

FAMILIES = {
    "imagenet": ({"dataset": "imagenet"}, "r18 r34 r50 r101 rx101"),
    "cifar100": (CIFAR, "r18 rx50"), "tiny": (TINY, "r18 rx50"), "cub": (CUB, "r18 rx50"),
    "aircraft": (AIRCRAFT, "r18 rx50"), "inat2017": (LARGE, "r50"), "places205": (LARGE, "r50")}
CONFIGS = {f"{family}_{net}": {**values, "arch": NETS[net]}
           for family, (values, nets) in FAMILIES.items() for net in nets.split()}
CONFIGS["tiny_rx50"]["lam_mul_k"] = 0.25
CONFIGS |= {
    "cifar100_wrn28_8": {
        **CIFAR, "arch": "wrn28_8", "layer": 2, "lr": 0.03, "min_lr": 1e-3, "weight_decay": 1e-3,
        "block_momentum": 0.0},
    "cifar100_deit_s": {**VIT, "arch": "deit_s", "layer": 6, "mode": ("nearest",), "lr": 7.5e-4,
                        "block_lr": 7.5e-4, "drop_path": 0.1},
    "cifar100_swin_t": {**VIT, "arch": "swin_t", "mode": ("nearest",), "lr": 5e-4,
                        "block_lr": 5e-4, "drop_path": 0.2},
    "cifar100_convnext_t": {**VIT, "arch": "convnext_t", "image_size": 32, "lr": 1e-3,
                            "block_lr": 7.5e-4, "drop_path": 0.1}}

# The authors' folders, our name of each; their files, behind the network's name; what a file has
# beside the alias. Tiny's file that promises mask_adjust 0.25 has 0, as in its table.
FILES = {
    ("imagenet", "imagenet"): {
        "l2_a2_bili_val_dp01_mul_mb_mlr1e_3_bb_mlr0_4xb64": {},
        "l2_a2_bili_val_dp01_mul_mb_mlr1e_3_m0_bb_mlr0_4xb64_ep100": {"block_momentum": 0.0},
        "l2_a2_bili_val_dp01_mul_mb_mlr1e_3_m0_bb_mlr0_4xb64_fp16_ep100": {
            "block_momentum": 0.0, "amp": "fp16"},
        "l2_a2_bili_val_dp01_mul_mb_mlr1e_3_m09_bb_mlr0_4xb64_ep300": {
            "epochs": 300, "block_momentum": 0.9}},
    ("cifar100", "cifar100"): {
        "l2_a2_bili_val_dp0_mul_x_cat_L1_var_01_mlr5e_2": {},
        "l2_a2_bili_val_dp0_mul_x_cat_L1_var_01_mlr5e_2_lam_mul_k0_25_mask_adjust0_25_ep800": {
            "epochs": 800, "mask_adjust": 0.25},
        "l1_a2_bili_val_dp0_mul_x_cat_L1_var_01_mlr1e_3": {},
        "l6_a2_near_val_dp01_sz224_mlr1e_4_bs100_ep200": {},
        "l6_a2_near_val_dp01_sz224_mlr1e_4_bs100_ep600": {"epochs": 600},
        "l3_a2_near_val_dp01_sz224_mlr1e_4_bs100_ep200": {},
        "l3_a2_near_bili_val_dp01_sz224_mlr2e_4_bs100_ep600": {
            "epochs": 600, "mode": ("bilinear", "nearest"), "min_lr": 2e-4, "block_lr": 7.5e-4},
        "l2_a2_bili_val_dp01_lr2e_3_mlr1e_4_bs100_ep200": {},
        "l2_a2_bili_val_dp01_lr2e_3_mlr1e_4_bs100_ep600": {
            "epochs": 600, "lr": 2e-3, "block_lr": 1e-3}},
    ("tiny_imagenet", "tiny"): {
        "l2_a2_bili_val_dp0_mul_mb_mlr1e_3_bb_mlr5e_2": {},
        "l2_a2_bili_val_dp0_mul_mb_mlr1e_3_bb_mlr5e_2_ep400": {},
        "l2_a2_bili_val_dp0_mul_mb_mlr1e_3_bb_mlr5e_2_2xb50": {},
        "l2_a2_bili_val_dp0_mul_mb_mlr1e_3_bb_mlr5e_2_2xb50_lam_mul_k0_25_mask_adjust0_25_ep400":
            {}},
    ("cub200", "cub"): {"l2_a2_bili_val_dp01_mb_mlr5e_4_1xb16_ep200": {}},
    ("aircrafts", "aircraft"): {"l2_a2_bili_val_dp01_mb_mlr5e_4_1xb16_ep200": {}},
    ("inaturalist2017", "inat2017"): {"l2_a2_bili_val_dp01_mb_mlr1e_4_bb_mlr0_4xb64_ep100": {}},
    ("place205", "places205"): {"l2_a2_bili_val_dp01_mb_mlr1e_4_bb_mlr0_4xb64_ep100": {}}}

# What --method changes: AutoMix's settings, of all and by alias; Mixup's and CutMix's alpha
METHODS = {"samix": "SAMix", "automix": "AutoMix", "mixup": "Mixup", "cutmix": "CutMix",
           "vanilla": "Plain training"}
AUTOMIX = {"mask_loss_kind": "l1", "mode": ("nearest",), "dropout": 0.0,
           "mask_adjust": 0.0, "label_smoothing": 0.0}
VIT_RATES = {"lr": 5e-4, "block_lr": 1e-3, "clip_grad": 10.0}
AUTOMIX_OWN = {
    "imagenet_r50": {"block_momentum": 0.0},            # as its 100-epoch file
    **dict.fromkeys(["cifar100_r18", "cifar100_rx50", "cifar100_wrn28_8", "tiny_r18", "tiny_rx50"],
                    {"lam_concat": False}),
    "cub_rx50": {"mask_loss_kind": "l1_variance"}, "aircraft_r18": {"ema_end": 0.99999},
    "aircraft_rx50": {"ema_end": 0.99999, "mask_loss_kind": "l1_variance"},
    "places205_r50": {"block_min_lr": 1e-3},
    "cifar100_deit_s": {**VIT_RATES, "warmup_epochs": 5}, "cifar100_swin_t": VIT_RATES,
    "cifar100_convnext_t": {"lr": 2e-3, "block_lr": 1e-3, "clip_grad": 0.0}}
ALPHAS = {"imagenet": (0.2, 1.0), "cifar100": (1.0, 0.2), "tiny-imagenet-200": (1.0, 1.0),
          "cub200": (0.2, 1.0)}         # mixup, cutmix


def find(name: str) -> tuple[str, dict]:
    """Return alias and overrides of an alias or file name, with or without path and `.py`; for
    another name, or one that several folders have, ValueError."""
    *path, file = name.removesuffix(".py").split("/")
    found = {name: {}} if name in CONFIGS else {}
    for (folder, family), files in FILES.items():
        for alias in CONFIGS:
            own = files.get(file.removeprefix(alias.removeprefix(f"{family}_") + "_"))
            if alias.startswith(family) and own is not None and (not path or folder in path):
                found[alias] = own
    if len(found) != 1:
        raise ValueError(f"{name!r} is one of {', '.join(found)}: give the path" if found else
                         f"{name!r} is none of {', '.join(CONFIGS)}")
    return found.popitem()


def config(name: str, method: str = "samix") -> dict:
    """Return configuration `name` (see `find`) under `method`, a fresh dict of flags' values."""
    alias, own = find(name)
    values = COMMON | CONFIGS[alias]
    if method == "automix":
        values |= AUTOMIX | AUTOMIX_OWN.get(alias, {})
        own = {key: value for key, value in own.items() if key != "mask_adjust"}
    values |= own
    if method in ("mixup", "cutmix"):
        values["alpha"] = ALPHAS[values["dataset"]][method == "cutmix"]
    return values
