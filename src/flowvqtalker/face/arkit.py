"""The 52 ARKit blendshapes: their names, and the linear map from expression coefficients to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["ARKIT_NAMES", "arkit_index", "fit_arkit"]

#: Names in the order of MediaPipe's Face Landmarker: ARKit's, with ``_neutral`` first and without ``tongueOut``, which
#: MediaPipe does not detect.
ARKIT_NAMES = (
    "_neutral",
    *("browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff"),
    *("cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight"),
    *("eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight"),
    *("eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen", "jawRight"),
    *("mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel"),
    *("mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker"),
    *("mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft"),
    *("mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight"),
    *("noseSneerLeft", "noseSneerRight"),
)

Floats = npt.NDArray[np.floating]


def arkit_index(name: str) -> int:
    """Index of a blendshape by its ARKit name.

    Raises:
        KeyError: if there is no such blendshape; the message lists all.
    """
    if name not in ARKIT_NAMES:
        raise KeyError(f"no blendshape {name!r}; choose one of {', '.join(ARKIT_NAMES)}")
    return ARKIT_NAMES.index(name)


def fit_arkit(expression: Floats, blendshapes: Floats, weights: Floats, ridge: float = 1e-3) -> Floats:
    """Ridge regression from β to blendshapes.

    Arguments:
        expression: (N, 64) in standard deviations.
        blendshapes: (N, 52) of the tracker.
        weights: (N,) weight of each sample.
        ridge: penalty on the squared map, relative to weights that sum to one.

    Returns:
        (52, 65): the map from [β, 1].
    """
    design = np.concatenate([expression, np.ones((len(expression), 1))], axis=1).astype(np.float64)
    weighted = design * (weights / weights.sum())[:, None]
    penalty = ridge * np.eye(design.shape[1])
    penalty[-1, -1] = 0.0
    return np.linalg.solve(weighted.T @ design + penalty, weighted.T @ blendshapes).T
