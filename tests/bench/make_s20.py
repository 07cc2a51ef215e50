#!/usr/bin/env python3
"""Make the trial set S20 from CIFAR-100: 20 classes, 200 training and 100 test images of each.

    python tests/bench/make_s20.py data s20.npz

CIFAR is a folder or file as sage/main.py --dataset cifar100 --data_dir takes it (torchvision's
archive, downloaded where it is missing; image folders without loss; an .npz), in any order. Its
images are found by the digests of their pixels, which s20.npy holds in the order of S20.
"""
import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common import files, runtime
from common.data import sources
from common.errors import RunError

CLASSES = ("apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
           "butterfly camel can castle caterpillar cattle").split()
TRAIN, TEST = 200, 100                  # images of a class
DIGEST = "be83ed2d9236c773b73d7133298e2262"             # of the arrays, one after another


def make(cifar: str) -> dict[str, np.ndarray]:
    """The arrays of S20. Raises RunError when an image is missing or differs."""
    train, test, _ = sources.read("cifar100", Path(cifar), None, 4)
    images = [*train.images, *test.images]
    places = {hashlib.blake2b(image, digest_size=8).digest(): n for n, image in enumerate(images)}
    wanted = [n.tobytes() for n in np.load(Path(__file__).with_name("s20.npy"))]
    missing = [n for n, digest in enumerate(wanted) if digest not in places]
    if missing:
        first, start = missing[0], len(CLASSES) * TRAIN
        part, name = ("training", first // TRAIN) if first < start else \
            ("test", (first - start) // TEST)
        raise RunError(f"{cifar}: {len(missing)} of S20's {len(wanted)} images are not there "
                       f"pixel by pixel, first a {part} image of {CLASSES[name]}; is it all of "
                       "CIFAR-100, and never compressed with loss?")
    found = np.stack([images[places[digest]] for digest in wanted])
    labels, count = np.arange(len(CLASSES), dtype=np.uint8), len(CLASSES) * TRAIN
    arrays = {"train_images": found[:count], "train_labels": labels.repeat(TRAIN),
              "test_images": found[count:], "test_labels": labels.repeat(TEST),
              "classes": np.array(CLASSES)}
    whole = hashlib.blake2b(digest_size=16)
    for array in arrays.values():
        whole.update(array.tobytes())
    if whole.hexdigest() != DIGEST:
        raise RunError(f"{cifar}: the images do not make S20: digest {whole.hexdigest()}")
    return arrays


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", metavar="CIFAR")
    parser.add_argument("out", metavar="OUT.npz", type=Path)
    args = parser.parse_args(argv)
    if args.out.suffix != ".npz":
        parser.error(f"{args.out} does not end with .npz")
    arrays = make(args.cifar)
    with files.whole(args.out) as new, open(new, "wb") as file:
        np.savez(file, **arrays)
    print(f"{args.out}: {len(arrays['train_labels'])} training and {len(arrays['test_labels'])} "
          f"test images of {len(CLASSES)} classes")


if __name__ == "__main__":
    runtime.launch(main)
