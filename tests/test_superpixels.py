"""Batched SLIC against scikit-image's, on photographs and the trial set."""
import numpy as np
import pytest
import torch
from skimage import color, data, measure
from skimage.util import regular_grid
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2.functional import resize

from safuse import superpixels
from safuse.superpixels import components, grid, most_superpixels, slic, slic_skimage


def batch(pictures, size):
    """Central squares of (H, W, 3) uint8 pictures as (B, 3, size, size) in [0, 1]."""
    squares = []
    for picture in pictures:
        side = min(picture.shape[:2])
        top, left = ((length - side) // 2 for length in picture.shape[:2])
        square = torch.from_numpy(picture[top:top + side, left:left + side].copy())
        squares.append(resize(square.permute(2, 0, 1), [size, size]))
    return torch.stack(squares).float() / 255


@pytest.fixture(scope="module")
def photographs():
    return batch([data.astronaut(), data.chelsea(), data.coffee(), data.rocket(),
                  data.retina(), *load_sample_images().images], 224)


def within_share(image, labels) -> float:
    """Share of an image's colour variance that is left within its superpixels."""
    pixels, labels = image.flatten(1).double().numpy(), labels.ravel()
    sizes = np.bincount(labels)
    means = np.stack([np.bincount(labels, channel) / sizes for channel in pixels])
    return (((pixels - means[:, labels]) ** 2).sum()
            / ((pixels - pixels.mean(1, keepdims=True)) ** 2).sum())


def check(labels, most):
    """Every image's labels run from 0 without a gap below `most`, each of them connected."""
    assert labels.dtype == np.int64
    for one in labels:
        count = one.max() + 1
        assert (np.bincount(one.ravel()) > 0).all() and one.min() == 0 and count <= most
        assert measure.label(one, connectivity=1, background=-1).max() == count


def compare(images, n, compactness, device):
    """Ratios of ours to scikit-image's: unexplained colour, number of superpixels."""
    ours = slic(images.to(device), n, compactness).cpu().numpy()
    theirs = slic_skimage(images, n, compactness).numpy()
    check(ours, most_superpixels(n, *images.shape[2:]))
    shares = [np.mean([within_share(*pair) for pair in zip(images, labels, strict=True)])
              for labels in (ours, theirs)]
    counts = [np.mean([one.max() + 1 for one in labels]) for labels in (ours, theirs)]
    return shares[0] / shares[1], counts[0] / counts[1]


@pytest.mark.parametrize("compactness", [8.0, 10.0])
def test_photographs(photographs, compactness, device):
    n = torch.tensor([30, 32, 34, 36, 38, 40, 35])
    variance, count = compare(photographs, n, compactness, device)
    assert variance <= 1.05 and 0.9 <= count <= 1.1


@pytest.mark.parametrize("low, high, compactness", [(25, 30, 8.0), (20, 40, 10.0)])
def test_cifar(s20, low, high, compactness, device):
    with np.load(s20) as arrays:
        images = torch.from_numpy(arrays["train_images"][::40]).permute(0, 3, 1, 2).float() / 255
    n = torch.randint(low, high + 1, (len(images),), generator=torch.Generator().manual_seed(1))
    variance, count = compare(images, n, compactness, device)
    assert variance <= 1.05 and 0.9 <= count <= 1.1


def test_small_photographs(photographs, device):
    """The same at 32² without any other data."""
    images = resize(photographs, [32, 32])
    variance, count = compare(images, 28, 8.0, device)
    assert variance <= 1.05 and 0.9 <= count <= 1.1


def test_each_image_alone(photographs, device):
    """An image's superpixels depend neither on the batch nor on the stretch of its values."""
    images, n = resize(photographs, [64, 64]).to(device), torch.tensor([30, 31, 44, 50, 35, 60, 70])
    together = slic(images, n)
    for i in (0, 3, 6):
        alone = slic(images[i:i + 1] * 0.5 + 0.2, int(n[i]))
        assert (alone[0] == together[i]).float().mean() > 0.99


@pytest.mark.parametrize("height, width", [(32, 32), (224, 224), (20, 70), (90, 5), (8, 8)])
def test_grid_is_scikit_images(height, width):
    for n in range(1, height * width // 4, 3):
        first, step, cells = (t[0].tolist() for t in grid(n, 1, height, width))
        theirs = regular_grid((1, height, width), n)[1:]
        for i, (cut, length) in enumerate(zip(theirs, (height, width), strict=True)):
            places = range(length)[cut]
            assert (first[i], cells[i]) == (places[0], len(places))
            assert len(places) == 1 or step[i] == places.step


def test_lab():
    colours = torch.rand(2, 3, 500, generator=torch.Generator().manual_seed(0))
    expected = color.rgb2lab(colours.numpy(), channel_axis=1)
    torch.testing.assert_close(superpixels.rgb_to_lab(colours), torch.from_numpy(expected),
                               rtol=1e-4, atol=2e-3)


def test_simple_picture(device):
    """Four coloured quarters and four wanted superpixels: the quarters."""
    images = torch.zeros(1, 3, 32, 32, device=device)
    images[:, 0, :16, 16:] = images[:, 1, 16:, :16] = images[:, :, 16:, 16:] = 1
    quarters = torch.arange(2, device=device).repeat_interleave(16)
    expected = quarters[:, None] * 2 + quarters
    assert torch.equal(slic(images, 4)[0], expected)


@pytest.mark.parametrize("size", [(8, 8), (33, 20), (64, 64)])
def test_hard_pictures(size, device):
    """Noise, stripes, one colour, a spiral, extreme numbers: still numbered and connected."""
    height, width = size
    spiral = torch.zeros(size)
    y, x, dy, dx = 0, 0, 0, 1
    for _ in range(height * width):                          # a path that never touches itself
        spiral[y, x] = 1
        for _ in range(2):
            ny, nx, my, mx = y + dy, x + dx, y + 2 * dy, x + 2 * dx
            if 0 <= ny < height and 0 <= nx < width and not spiral[ny, nx] and not (
                    0 <= my < height and 0 <= mx < width and spiral[my, mx]):
                break
            dy, dx = dx, -dy
        else:
            break
        y, x = ny, nx
    pictures = [torch.rand(3, *size, generator=torch.Generator().manual_seed(2)),
                (torch.arange(width) % 2).float().expand(3, *size),
                torch.full((3, *size), 0.3), spiral.expand(3, *size)]
    images = torch.stack(pictures).to(device)
    for n in (1, 6, 30):
        for compactness in (0.01, 10.0):
            labels = slic(images, n, compactness).cpu().numpy()
            check(labels, most_superpixels(n, *size))
    same = spiral.long()[None].to(device)
    expected = measure.label(same[0].cpu().numpy(), connectivity=1, background=-1)
    assert len(components(same).unique()) == expected.max()


def test_fragments_join_the_most_similar(device):
    """A small component between two large ones joins that of its colour; what lies inside it
    follows."""
    labels = torch.zeros(1, 8, 10, dtype=torch.long, device=device)
    labels[:, :, 6:] = 1
    labels[:, 1:4, 3:6], labels[:, 2, 4] = 2, 0              # touches both, mostly label 0
    colour = torch.zeros(1, 3, 8, 10, device=device)
    colour[:, :, :, 6:], colour[:, :, 1:4, 3:6] = 1.0, 0.8
    expected = labels.clone()
    expected[:, 1:4, 3:6] = 1
    least = torch.tensor([20], device=device)
    assert torch.equal(superpixels.connect(labels, colour.flatten(2), least), expected)


def test_components_against_scikit_image(device):
    labels = torch.randint(0, 3, (4, 41, 30), generator=torch.Generator().manual_seed(0))
    roots = components(labels.to(device)).cpu().view(labels.shape)
    for one, root in zip(labels, roots, strict=True):
        expected = measure.label(one.numpy(), connectivity=1, background=-1)
        pairs = np.unique(np.stack([expected.ravel(), root.numpy().ravel()]), axis=1)
        assert pairs.shape[1] == expected.max() == len(root.unique())


def test_one_superpixel(device):
    assert (slic(torch.rand(2, 3, 16, 16, device=device), 1) == 0).all()


@pytest.mark.parametrize("n", [9, torch.tensor([9, 12, 20])])
def test_compiles_whole(n, device):
    """Dynamo takes SLIC without a graph break, and other numbers without another graph."""
    images = torch.rand(3, 3, 16, 20, generator=torch.Generator().manual_seed(3)).to(device)
    compiled = torch.compile(slic, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, n, 5.0), slic(images, n, 5.0))
    if torch.is_tensor(n):
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(images, n + 15, 5.0), slic(images, n + 15, 5.0))


def test_scale_of_the_images(photographs):
    """Bytes give what [0, 1] gives; normalised images are refused (on a CPU, where looking is
    free)."""
    images = resize(photographs, [32, 32])
    assert torch.equal(slic((images * 255).round().byte(), 20), slic((images * 255).round() / 255,
                                                                     20))
    with pytest.raises(ValueError, match="not normalised ones .*: these go from -2.00 to"):
        slic(images * 4 - 2, 20)
