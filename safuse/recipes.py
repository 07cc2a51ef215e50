"""The papers' settings for each method, data set and architecture, and their learning rates."""

# The first row that gives a flag for (method, data set, architecture) decides; None fits all,
# "large" all images of 64 pixels and more (by --image_size, of your own sets). What came without a
# script follows its kin.
ROWS = [
    ("safuse", None, "resnet18", {"loss_gamma_CE": 0.03, "loss_gamma_SCL": 0.05}),
    ("safuse", "small", "resnext50", {"topN_local_ratio": 0.764}),
    ("safuse", None, None, {"loss_gamma_CE": 0.8, "loss_gamma_SCL": 0.08}),
    ("lgcoamix", "cub200", "resnet18", {"loss_gamma_CE": 0.05, "epochs": 300, "schedule": "C"}),
    ("lgcoamix", "cub200", "deit_b16", {"N_max": 38}),
    (None, None, "deit_b16", {"schedule": "A"}),
    ("lgcoamix", "stanford_dogs", None, {"loss_gamma_CE": 0.03, "schedule": "B"}),
    ("lgcoamix", None, None, {"loss_gamma_CE": 0.1}),
    ("lgcoamix", "small", None, {"N_min": 30, "N_max": 35}),
    ("lgcoamix", "large", None, {"compactness": 10.0, "label_share": "attention"}),
    ("occamix", "small", None, {"N_min": 20, "N_max": 40}),
    ("occamix", "large", None, {"N_min": 30, "N_max": 60}),
    ("occamix", None, None, {"compactness": 10.0}),
    (None, "cub200", None, {"lr": 0.001, "batch_size": 8, "pretrained": "torchvision"}),
    (None, "stanford_dogs", None, {"lr": 0.01, "batch_size": 16, "N_min": 40, "N_max": 60}),
    ("lgcoamix", "tiny-imagenet-200", None, {"schedule": "B"}),
    ("occamix", "tiny-imagenet-200", None, {"schedule": "B"}),
    (None, "tiny-imagenet-200", None, {"batch_size": 100}),
    (None, "large", None, {"N_min": 30, "N_max": 40}),
    (None, None, None, {
        "epochs": 600, "schedule": "A", "lr": 0.02, "batch_size": 32, "topN_local_ratio": 0.7,
        "loss_gamma_CE": 0.03, "loss_gamma_SCL": 0.05, "N_min": 25, "N_max": 30,
        "compactness": 8.0, "label_share": "both", "pretrained": "none"})]
LARGE = ("tiny-imagenet-200", "cub200", "stanford_dogs", "imagenet")

# How streamed sets are cropped: fields of common.data.Recipe.
CROPS = {"cub200": {"crop": "random", "resize": "square", "test_crop": "whole"},
         "stanford_dogs": {"ratio": (1, 1.3), "test_crop": "whole"}}

# (first epoch, divisor of the learning rate)
SCHEDULES = {
    "A": [(10, 1), (160, 2), (200, 4), (250, 8), (300, 10), (350, 20), (400, 50), (450, 100),
          (500, 500), (550, 1000)],
    "B": [(10, 1), (130, 2), (170, 4), (220, 8), (260, 10), (310, 20), (350, 40), (390, 80),
          (420, 100), (470, 200), (500, 400), (530, 800), (560, 1000), (580, 5000)],
    "C": [(0, 1), (60, 2), (90, 4), (110, 8), (120, 10), (140, 20), (160, 40), (170, 80),
          (180, 100), (210, 200), (230, 400), (250, 800), (270, 1000), (290, 5000)],
}


def defaults(method: str, dataset: str, arch: str, image_size: int | None = None) -> dict:
    """Return the paper's settings for a method, data set and architecture."""
    size = "large" if dataset in LARGE or (image_size or 0) >= 64 else "small"
    chosen = {}
    for *conditions, values in reversed(ROWS):
        if {None, method, dataset, size, arch}.issuperset(conditions):
            chosen |= values
    return chosen


def learning_rate(epoch: int, base: float, schedule: str, milestones=(), gamma=0.1) -> float:
    """Return the learning rate of an epoch, from 0, by SCHEDULES or "step"."""
    if schedule == "step":
        return base * gamma ** sum(epoch >= start for start in milestones)
    steps = SCHEDULES[schedule]
    if epoch < steps[0][0]:
        return base * (epoch + 1) / steps[0][0]             # warm-up
    return base / [divisor for start, divisor in steps if start <= epoch][-1]
