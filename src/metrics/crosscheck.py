"""The same Frechet distance by the packages that others use, on the same features: whether this project's number is theirs.

Both are slow: minutes for 2048 features, where `frechet_distance` takes seconds. Legend: N, M features (rows), F their width.
"""

import importlib.util
import math

import numpy as np

from src.metrics.frechet import frechet_distance

AGREE = 1e-4  # relative: their roots of near-singular products are good to about this where N < F


def by_cleanfid(a_NF: np.ndarray, b_MF: np.ndarray) -> float | str:
    """clean-fid's `fid_from_feats`; a text that says why where it cannot be had."""
    if importlib.util.find_spec("cleanfid") is None:
        return "clean-fid is not installed: pip install 'controlbench[fid]'"
    from cleanfid.fid import fid_from_feats

    try:
        return float(fid_from_feats(np.asarray(a_NF, np.float64), np.asarray(b_MF, np.float64)))
    except TypeError as error:  # SciPy 1.18 dropped an argument that clean-fid gives
        return f"clean-fid does not work with this SciPy ({error}): pip install 'scipy<1.18'"
    except ValueError as error:  # its root of a singular product can come out complex
        return f"clean-fid gives up on these features ({error})"


def by_torchmetrics(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
    """torchmetrics' `FrechetInceptionDistance`, with features in the place of pictures and no network."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    through = torch.nn.Identity()
    through.num_features = a_NF.shape[1]
    found = FrechetInceptionDistance(feature=through).set_dtype(torch.float64)
    for features, real in ((b_MF, True), (a_NF, False)):
        found.update(torch.from_numpy(np.asarray(features, np.float64)), real=real)
    return float(found.compute())


def cross_checked(a_NF: np.ndarray, b_MF: np.ndarray) -> dict[str, float | str | bool]:
    """{ours, clean-fid, torchmetrics, agree}: three numbers, or why one is not there, and whether those that are there agree
    to `AGREE` of the larger."""
    found = {
        "ours": frechet_distance(a_NF, b_MF),
        "clean-fid": by_cleanfid(a_NF, b_MF),
        "torchmetrics": by_torchmetrics(a_NF, b_MF),
    }
    found = {name: x if isinstance(x, str) or math.isfinite(x) else f"{x}" for name, x in found.items()}
    numbers = [x for x in found.values() if not isinstance(x, str)]
    scale = max(map(abs, numbers))
    return {**found, "agree": max(numbers) - min(numbers) <= AGREE * scale}
