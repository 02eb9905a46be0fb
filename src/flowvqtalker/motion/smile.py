"""What a smiling portrait needs so that another emotion shows (ours).

The flow starts from the person's neutral face, but the image is drawn from the portrait: raised cheeks, folds and bared
teeth stay in its texture, and some of the smile in the identity. Viewers read a smile even where the mouth is neutral.
So its corners, the upper lip and the cheeks go a little further than neutral, in proportion to the smile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.model import FaceModel
from flowvqtalker.motion.gaps import ridge_inverse

__all__ = ["smile_correction"]

_SMILE = [arkit_index("mouthSmileLeft"), arkit_index("mouthSmileRight")]
#: A smile below this is a neutral face's.
_LEAST = 0.2
#: Vertices of corner, upper lip and cheek on the side left in the image, those of the other side, and how far they move
#: inwards and down for a full smile, in distances between the outer eye corners.
_LEFT, _RIGHT = (61, 57, 43, 37, 39, 40, 50, 205), (291, 287, 273, 267, 269, 270, 280, 425)
_MOVES = ((0.03, 0.07), (0.024, 0.063), (0.024, 0.063), *3 * ((0.01, 0.03),), *2 * ((0.003, 0.03),))
#: Vertices that stay (lids, brows, nose and chin), and pairs whose distance does: lips follow the speech.
_KEPT, _UPPER, _LOWER = (159, 145, 386, 374, 105, 334, 55, 285, 1, 152), (13, 82, 312), (14, 87, 317)
_RIDGE = 1e-3


def smile_correction(model: FaceModel, expression: Tensor) -> Tensor:
    """Difference of β (64,) that takes off what the image keeps of a portrait's smile; zeros without a smile.

    Arguments:
        model: the face model.
        expression: (64,) β of the portrait.
    """
    smile = float(model.blendshapes(expression.to(model.mean))[_SMILE].mean())
    share = min(max((smile - _LEAST) / (1 - _LEAST), 0.0), 1.0)
    basis = model.expression.cpu().double()
    moved = torch.tensor(_MOVES, dtype=torch.float64)
    target = torch.cat([moved, moved * moved.new_tensor([-1.0, 1.0])]).flatten()
    rows = basis[:, [*_LEFT, *_RIGHT], :2].flatten(1).T
    gap = (basis[:, _LOWER, 1] - basis[:, _UPPER, 1]).T
    kept = basis[:, _KEPT].flatten(1).T
    solved = ridge_inverse(torch.cat([rows, gap, kept]), _RIDGE)[:, : len(target)] @ target
    return (share * solved).to(expression)
