"""resizemix/ against the recorded originals, and the properties that training relies on."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Golden, golden_cases
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as TF

from common.randaugment import BLENDS
from resizemix import configs, mixing, randaugment
from resizemix.main import step_rate

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def weighted_loss(logits, case, ratio, labels):
    other = labels[case.tensor("perm", labels.device)]
    losses = [F.cross_entropy(logits, target, reduction="none") for target in (labels, other)]
    return (ratio * losses[0] + (1 - ratio) * losses[1]).mean()


# ----------------------------------------------------------------------------------------- mixing

@pytest.mark.parametrize("path", golden_cases("resizemix", "trainstep_resizemix_s"))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_resize_mix_golden(path, layout, device):
    case = Golden(path)
    images = case.tensor("x_norm", device).contiguous(memory_format=layout)
    before = images.clone()
    mixed, ratio = mixing.resize_mix(images, case.tensor("perm"), case.tensor("rate"),
                                     case.tensor("box_m1n1m2n2")[:, :2])
    assert torch.equal(mixed, case.tensor("mixed", device))
    assert mixed.stride() == images.stride() and torch.equal(images, before)
    torch.testing.assert_close(ratio, torch.full((len(images),), float(case["lam"])).to(device))
    labels, logits = case.tensor("labels", device), case.tensor("logits", device)
    loss = weighted_loss(logits, case, ratio, labels)
    assert math.isclose(loss.item(), case["loss"], rel_tol=1e-5)


@pytest.mark.parametrize("path", golden_cases("resizemix", "trainstep_cutmix"))
def test_cutmix_golden(path, device):
    case = Golden(path)
    images = case.tensor("x_norm", device)
    centre = torch.tensor([int(case["cx"]), int(case["cy"])])      # the original's x is the row
    mixed, ratio = mixing.cutmix(images, case.tensor("perm"), centre, float(case["lam_beta"]))
    assert torch.equal(mixed, case.tensor("mixed", device))
    torch.testing.assert_close(ratio, torch.full((len(images),), float(case["lam"])).to(device))


@pytest.mark.parametrize("path", golden_cases("resizemix", "boxes_sizes"))
def test_sizes_indices_and_boxes_golden(path):
    case = Golden(path)
    for number, rate in enumerate(case["rates"]):
        for side in (32, 224, 33):
            size = int(case[f"size_{side}"][number])
            assert mixing.box_size((side, side), rate) == (size, size)
            index = mixing.nearest_index(size, side, rate, "cpu").numpy()
            assert (index == case[f"srcidx_{side}"][number][:size]).all()
    for name in (name for name in case if name.startswith("box_") and not name.endswith("cxcy")):
        image_size, size = (tuple(map(int, part.split("x"))) for part in name.split("_")[1:])
        boxes, centres = case.tensor(name).long(), case.tensor(name + "_cxcy").long()
        corners = mixing.clip_corners(centres, size, image_size)
        assert torch.equal(torch.cat([corners, corners + torch.tensor(size)], 1), boxes)
    for row, box in zip(case["randbbox_in_HW_lam_cx_cy"], case["randbbox_out_x1y1x2y2"],
                        strict=True):
        shape, lam, centre = tuple(row[:2].astype(int)), row[2], torch.tensor(row[3:]).long()
        images = torch.stack([torch.zeros(1, *shape), torch.ones(1, *shape)])
        mixed, _ = mixing.cutmix(images, torch.tensor([1, 0]), centre, lam)
        expected = torch.zeros(shape)
        expected[box[0]:box[2], box[1]:box[3]] = 1
        assert torch.equal(mixed[0, 0], expected)


@pytest.mark.parametrize("scale", [0.1, 0.37, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (4, 1, 20, 33)])
def test_resize_mix_equals_a_loop(shape, scale, device):
    images = torch.randn(shape, generator=seeded()).to(device)
    perm = torch.randperm(len(images), generator=seeded(1))
    corners = mixing.draw_corners(len(images), shape[2:], scale, seeded(2))
    mixed, ratio = mixing.resize_mix(images, perm, scale, corners)
    small = F.interpolate(images, scale_factor=scale)
    expected = images.clone()
    for i, (y, x) in enumerate(corners.tolist()):
        expected[i, :, y:y + small.shape[2], x:x + small.shape[3]] = small[perm[i]]
    assert torch.equal(mixed, expected)
    assert ratio[0].item() == pytest.approx(1 - small[0, 0].numel() / images[0, 0].numel())


@pytest.mark.parametrize("mix", [
    lambda images, perm: mixing.resize_mix(images, perm, 0.4, torch.tensor([[3, 5]] * 4))[0],
    lambda images, perm: mixing.cutmix(images, perm, torch.tensor([3, 9]), torch.tensor(0.6))[0],
    lambda images, perm: randaugment.batch_randaugment(
        images, [(number, -1) for number in range(14)], mean=MEAN, std=STD)],
    ids=["resize_mix", "cutmix", "batch_randaugment"])
def test_mixing_compiles_whole(mix, device):
    images = torch.randn(4, 3, 16, 16, generator=seeded()).to(device)
    perm = torch.tensor([2, 0, 3, 1])
    compiled = torch.compile(mix, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, perm), mix(images, perm))


def test_smallest_image_is_one_pixel():
    images = torch.arange(2 * 64.0).view(2, 1, 8, 8)
    corners = mixing.draw_corners(2, (8, 8), 0.1, seeded())
    mixed, ratio = mixing.resize_mix(images, torch.tensor([1, 0]), 0.1, corners)
    assert (mixed != images).sum() == 2 and ratio.tolist() == [1 - 1 / 64] * 2


def test_draws():
    scales = [mixing.draw_scale(generator) for generator in [seeded()] for _ in range(2000)]
    assert 0.1 <= min(scales) < 0.11 and 0.79 < max(scales) < 0.8
    assert np.mean(scales) == pytest.approx(0.45, abs=0.015)
    corners = mixing.draw_corners(20000, (32, 32), 0.5, seeded())
    share = torch.bincount(corners.flatten(), minlength=17).double() / corners.numel()
    expected = torch.tensor([9, *[1] * 15, 8]).double() / 32        # section 1, rule 4 of the spec
    torch.testing.assert_close(share, expected, rtol=0, atol=0.006)
    assert torch.equal(mixing.draw_corners(9, (32, 32), 0.5, seeded(5)),
                       mixing.draw_corners(9, (32, 32), 0.5, seeded(5)))


@pytest.mark.parametrize("path", golden_cases("resizemix", "crop_test"))
def test_crop_test_golden(path, device):
    case = Golden(path)
    pixels = case.tensor("images_u8", device).permute(0, 3, 1, 2).float() / 255
    mean, std = (case.tensor(name, device).view(3, 1, 1) for name in ("mean", "std"))
    images = (pixels - mean) / std
    cropped, share = mixing.keep_centre(images)
    assert share == case["alpha"]
    torch.testing.assert_close(cropped[:len(case["cropped"])], case.tensor("cropped", device),
                               rtol=1e-4, atol=1e-5)
    for size in ((32, 32), (224, 224), (20, 33)):
        name = f"{size[0]}x{size[1]}"
        mask, share = mixing.keep_centre(torch.ones(1, 1, *size, device=device))
        assert torch.equal(mask[0, 0].byte(), case.tensor(f"mask_{name}", device))
        assert share == pytest.approx(float(case[f"alpha_{name}"]))

    class Net(torch.nn.Module):
        def forward(self, x):
            return F.adaptive_avg_pool2d(x, 2).flatten(1) @ case.tensor("w", device)

    torch.testing.assert_close(mixing.CropTest(Net())(images), case.tensor("crop1_logits", device),
                               rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ RandAugment

@pytest.mark.parametrize("path", golden_cases("resizemix", "rand_ops"))
def test_batch_operations_golden(path, device):
    """Where the original left [0, 1] ours is clipped; its sharpness darkened the border."""
    case = Golden(path)
    pixels = (case.tensor("images_u8").permute(0, 3, 1, 2) / 255).to(device)
    operations = {"contrast": 0, "brightness": 0, "sharpness": 1}
    for name, border in operations.items():
        for setting in ("0.1", "0.94", "1.9"):
            expected = case.tensor(f"{name}_{setting}", device).clamp(0, 1)
            found = randaugment.PER_BATCH[name][2](pixels[:len(expected)], float(setting))
            inner = (..., slice(border, 32 - border), slice(border, 32 - border))
            torch.testing.assert_close(found[inner], expected[inner], rtol=1e-4, atol=1e-4)
    inverted = case.tensor("invert", device)
    assert torch.equal(randaugment.PER_BATCH["invert"][2](pixels[:len(inverted)], 0), inverted)
    table = {name: (low, high) for name, (low, high, _) in randaugment.PER_BATCH.items()}
    assert list(table.values()) == [tuple(row) for row in case["op_min_max"]]
    np.testing.assert_allclose([randaugment.value(*row, 14) for row in table.values()],
                               case["op_val_M14"])
    names = [name.lower().replace("_cuda", "").replace("_", "") for name in case["op_names"]]
    assert [name.replace("_", "") for name in table] == names


def photographs():
    case = Golden(golden_cases("resizemix", "rand_ops_s7")[0].values[0])
    return case["images_u8"]


def pil_operation(image, name, value):
    """The operation as Pillow does it."""
    if name in BLENDS:
        return getattr(ImageEnhance, name)(image).enhance(value)
    return {"Identity": lambda: image, "AutoContrast": lambda: ImageOps.autocontrast(image),
            "Invert": lambda: ImageOps.invert(image), "Equalize": lambda: ImageOps.equalize(image),
            "Solarize": lambda: ImageOps.solarize(image, value),
            "Posterize": lambda: ImageOps.posterize(image, int(value))}[name]()


@pytest.mark.parametrize("name", list(randaugment.PER_IMAGE))
@pytest.mark.parametrize("magnitude", [5, 14, 28])
def test_loader_operations_equal_pillow(name, magnitude, device):
    index = list(randaugment.PER_IMAGE).index(name)
    low, high = randaugment.PER_IMAGE[name]
    pictures = photographs()
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
    chosen = torch.full((len(images), 1), index)
    found = randaugment.randaugment(images, chosen, magnitude).permute(0, 2, 3, 1).cpu().numpy()
    setting = randaugment.value(low, high, magnitude)
    for picture, result in zip(pictures, found, strict=True):
        expected = np.asarray(pil_operation(Image.fromarray(picture), name, setting))
        assert np.abs(result.astype(int) - expected).max() <= 1        # roundings of Pillow


def test_each_image_gets_its_own_operations(device):
    images = torch.from_numpy(photographs()).permute(0, 3, 1, 2).to(device)
    operations = torch.randint(10, (len(images), 2), generator=seeded(3))
    together = randaugment.randaugment(images, operations)
    for i, row in enumerate(operations):
        alone = randaugment.randaugment(images[i:i + 1], row[None], 14)
        assert torch.equal(together[i:i + 1], alone)
    assert torch.equal(randaugment.transform(images, seeded(3)), together)
    assert len(randaugment.PER_IMAGE) == 10


def normalised(device):
    pixels = torch.from_numpy(photographs()).permute(0, 3, 1, 2).to(device).float() / 255
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return pixels, (pixels - mean) / std, mean, std


@pytest.mark.parametrize("name", list(randaugment.PER_BATCH))
def test_batch_operations(name, device):
    pixels, images, mean, std = normalised(device)
    index = list(randaugment.PER_BATCH).index(name)
    found = [randaugment.batch_randaugment(images, [(index, sign)], mean=MEAN, std=STD)
             for sign in (1, -1)]
    back = found[0] * std + mean
    assert back.min() > -1e-6 and back.max() < 1 + 1e-6
    assert torch.allclose(back, pixels, atol=1e-6) == (name == "identity")
    assert torch.equal(*found) == (name not in randaugment.GEOMETRIC)
    if name == "translate_x":                       # 7 = round(0.233·32) pixels
        torch.testing.assert_close(back[..., 7:], pixels[..., :-7])
    if name in ("shear_x", "shear_y", "rotate"):    # as torchvision's affine has them
        shear = math.degrees(math.atan(0.5 * 14 / 30))
        options = {"rotate": {"angle": 21, "shear": [0.0, 0.0]},
                   "shear_x": {"angle": 0, "shear": [shear, 0.0], "center": [0, 0]},
                   "shear_y": {"angle": 0, "shear": [0.0, shear], "center": [0, 0]}}[name]
        expected = TF.affine(pixels, translate=[0, 0], scale=1.0, **options,
                             interpolation=TF.InterpolationMode.BILINEAR)
        torch.testing.assert_close(back, expected, rtol=0, atol=1e-5)
    if name == "autocontrast":                      # of each image and channel, unlike a batch's
        assert (back.amax((2, 3)) > 1 - 1e-5).all() and (back.amin((2, 3)) < 1e-5).all()


def test_batch_aug_makes_two_views(device):
    _, images, _, _ = normalised(device)
    views = randaugment.batch_aug(images, seeded(1), mean=MEAN, std=STD)
    assert views.shape == (2 * len(images), *images.shape[1:])
    again = randaugment.batch_aug(images, seeded(1), mean=MEAN, std=STD)
    assert torch.equal(views, again) and not torch.equal(*views.chunk(2))
    generator = seeded(1)
    drawn = randaugment.draw_batch_operations(generator)
    first = randaugment.batch_randaugment(images, drawn, mean=MEAN, std=STD)
    assert torch.equal(views[:len(images)], first)


@pytest.mark.parametrize("path", golden_cases("resizemix", "trainstep_resizemix_batchaug_identity"))
def test_batch_aug_step_golden(path):
    """Two identity views: both halves of the doubled batch are the mixed batch."""
    case = Golden(path)
    mixed, ratio = mixing.resize_mix(case.tensor("x_norm"), case.tensor("perm"), case["rate"],
                                     case.tensor("box_m1n1m2n2")[:, :2])
    views = torch.cat([randaugment.batch_randaugment(mixed, [(0, 1)], mean=MEAN, std=STD)] * 2)
    assert len(views) == case["n_model_input"]
    torch.testing.assert_close(views, case.tensor("mixed").repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)
    labels, other = (case.tensor("labels")[index].repeat(2)
                     for index in (slice(None), case.tensor("perm")))
    losses = [F.cross_entropy(case.tensor("logits"), target) for target in (labels, other)]
    assert float(ratio[0] * losses[0] + (1 - ratio[0]) * losses[1]) == pytest.approx(
        float(case["loss"]), rel=1e-5)


# -------------------------------------------------------------------- schedule and configurations

COSINE = {"lr_schedule": "cosine", "min_lr": 1e-5, "warmup_epochs": 0, "warmup_start_lr": 1e-5,
          "restart_epochs": ()}


@pytest.mark.parametrize("path", golden_cases("resizemix", "lr_schedule"))
@pytest.mark.parametrize("name, epochs, init_lr, options", [
    ("wrs", 200, 0.2, {"warmup_epochs": 5}), ("ss", 1800, 0.04, {"warmup_epochs": 5}),
    ("res_8gpu", 300, 0.5, {}), ("tiny_warm", 20, 0.5, {"warmup_epochs": 5}),
    ("tiny_restart", 70, 0.5, {"restart_epochs": (10, 20, 40, 80, 160, 320)})])
def test_learning_rate_golden(path, name, epochs, init_lr, options):
    case = Golden(path)
    args = SimpleNamespace(**{"epochs": epochs, "lr": init_lr, **COSINE, **options})
    found = [step_rate(args, step, int(case[f"{name}_epoch_steps"]))
             for step in case[f"{name}_i"].tolist()]
    np.testing.assert_allclose(found, case[f"{name}_lr"], rtol=1e-12)


def test_learning_rate_ends_at_its_lowest():
    args = SimpleNamespace(**COSINE | {"epochs": 4, "lr": 1, "min_lr": 0.1, "warmup_epochs": 1})
    rate = [step_rate(args, step, 10) for step in range(60)]
    assert rate[0] == 1e-5 and rate[10] == 1 and max(rate) == 1
    assert rate[39] > 0.1 and rate[40:] == [0.1] * 20


def test_configurations():
    assert list(configs.CONFIGS) == ["cifar10_wrs", "cifar100_wrs", "cifar10_ss", "cifar100_ss",
                                     "imagenet_res"]
    table = {name: [config[key] for key in ("arch", "epochs", "lr", "weight_decay", "batch_size")]
             for name, config in configs.CONFIGS.items()}
    assert table["cifar100_wrs"] == ["wresnet28_10", 200, 0.2, 5e-4, 256]
    assert table["cifar10_ss"] == ["shakeshake26_2x96d", 1800, 0.04, 1e-4, 256]
    assert table["imagenet_res"] == ["resnet101", 300, 0.5, 4e-5, 512]
