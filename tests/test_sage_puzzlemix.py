"""Puzzle Mix against the original's recorded arrays, and what must hold for any input."""
import pytest
import torch
from conftest import Golden, golden_cases

from sage import graphcut, puzzlemix

CIFAR100 = {"mean": [v / 255 for v in (129.3, 124.1, 112.4)],
            "std": [v / 255 for v in (68.2, 65.4, 70.4)]}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def options(case: Golden) -> dict:
    """Hyper-parameters of a golden case as `puzzle_mix` takes them."""
    names = {"beta": float, "gamma": float, "eta": float, "n_labels": int, "neigh_size": int,
             "transport": bool, "t_eps": float, "t_size": int}
    return {name: kind(case[name]) for name, kind in names.items()}


def inputs(case: Golden, device) -> tuple:
    return (*(case.tensor(name, device) for name in ("x", "unary", "perm")), float(case["alpha"]),
            int(case["block_num"]))


def terms(case: Golden, device):
    """The recorded graph's terms for `graphcut.solve`."""
    parts = [case.tensor(f"gc_{name}", device) for name in ("unary_first", "unary_second",
                                                            "pw_x", "pw_y")]
    return puzzlemix.label_terms(*parts, float(case["alpha"]), beta=float(case["beta"]),
                                 eta=float(case["eta"]), n_labels=int(case["n_labels"]))


@pytest.mark.parametrize("path", golden_cases("sage", "puzzle_"))
def test_graph_terms(path, device):
    case = Golden(path)
    images, saliency, perm, _, block_num = inputs(case, device)
    found = puzzlemix.graph_terms(images, saliency, perm, block_num, beta=float(case["beta"]),
                                  gamma=float(case["gamma"]), std=CIFAR100["std"],
                                  neigh_size=int(case["neigh_size"]))
    for name, term in zip(("unary_first", "unary_second", "pw_x", "pw_y"), found, strict=True):
        torch.testing.assert_close(term, case.tensor(f"gc_{name}", device), rtol=1e-4, atol=1e-7)
