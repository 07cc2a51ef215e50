"""SaliencyMix against golden vectors, and its borders."""
import numpy as np
import pytest
import torch
from conftest import Golden, golden_cases

from sage.saliencymix import draw_box_lambda, fine_grained_saliency, saliency_mix


@pytest.mark.parametrize("path", golden_cases("sage", "saliencymix_"))
def test_saliency_and_box_equal_the_original(path, device):
    case = Golden(path)
    names = [key.removesuffix("_sal_u8") for key in case if key.endswith("_sal_u8")]
    assert len(names) >= 6
    for name in names:
        image = case.tensor(f"{name}_img", device).permute(2, 0, 1)[None]
        saliency = fine_grained_saliency(image, "BGR")       # the original never converted to BGR
        eight_bit = (saliency[0] * 255).round().byte().cpu()
        assert torch.equal(eight_bit, case.tensor(f"{name}_sal_u8"))
        images = torch.stack([torch.zeros_like(image[0]), torch.ones_like(image[0])]).float()
        mixed, ratio = saliency_mix(images, torch.tensor([1, 0]), float(case[f"{name}_lam"]),
                                    saliency[0])
        assert ratio.tolist() == pytest.approx([float(case[f"{name}_lam_adj"])] * 2, abs=1e-6)
        top, left, bottom, right = case[f"{name}_bbox"].tolist()
        box = torch.zeros(image.shape[2:], device=device)
        box[top:bottom, left:right] = 1
        assert torch.equal(mixed[0, 0], box) and torch.equal(mixed[1, 0], 1 - box)


def test_channel_order_matters_and_grey_does_not(device):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)).to(device)
    rgb, bgr = fine_grained_saliency(image), fine_grained_saliency(image, "BGR")
    assert torch.equal(fine_grained_saliency(image.flip(1), "BGR"), rgb)
    assert not torch.equal(rgb, bgr)
    grey = image[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(fine_grained_saliency(grey), fine_grained_saliency(grey, "BGR"))
    alone = fine_grained_saliency(image[1:])
    assert torch.equal(alone[0], rgb[1])                     # images of a batch are independent


def test_one_colour_has_no_saliency(device):
    flat = torch.full((1, 3, 20, 32), 90, dtype=torch.uint8, device=device)
    assert not fine_grained_saliency(flat).any()
    flat[0, :, 4:9, 20:27] = 200
    spot = fine_grained_saliency(flat)
    assert spot.max() == 1 and spot[0, 6, 23] > 0.9


def test_half_of_the_batches_get_a_box():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_box_lambda(generator) for _ in range(400)])
    assert 0.4 < (draws == 1).float().mean() < 0.6
    images = torch.randn(3, 3, 16, 16)
    mixed, ratio = saliency_mix(images, torch.tensor([1, 2, 0]), torch.tensor(1.0), images[0, 0])
    assert torch.equal(mixed, images) and ratio.tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [(2, 9), (3, 2)])
def test_tiny_images(size, device):
    """Borders mirror what there is."""
    image = torch.randint(256, (1, 3, *size), generator=torch.Generator().manual_seed(0)).byte()
    saliency = fine_grained_saliency(image.to(device))[0]
    assert saliency.shape == size and saliency.isfinite().all() and saliency.max() == 1
    mixed, _ = saliency_mix(image.float(), torch.tensor([0]), 0.5, saliency.cpu())
    assert torch.equal(mixed, image.float())


def test_only_bytes_have_this_saliency():
    with pytest.raises(TypeError, match="uint8 images, not torch.float32"):
        fine_grained_saliency(torch.rand(1, 3, 8, 8))


def test_dynamo_takes_it_whole():
    image, images = torch.randint(256, (1, 3, 16, 16)).byte(), torch.randn(3, 3, 16, 16)

    def mix(image, images, perm, lam):
        return saliency_mix(images, perm, lam, fine_grained_saliency(image)[0])
    words = image, images, torch.tensor([1, 2, 0]), torch.tensor(0.4)
    whole = torch.compile(mix, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(*words), mix(*words))
