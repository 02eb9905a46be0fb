"""Vertex groups and triangles of the 478-point MediaPipe face mesh."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "EYES",
    "EYE_CORNERS",
    "INNER_LIPS",
    "IRISES",
    "LEFT_EYE",
    "LIDS",
    "LIPS",
    "MOUTH_CORNERS",
    "RIGHT_EYE",
    "RIGID",
    "VERTICES",
    "strip",
    "surface_triangles",
]

VERTICES = 478

#: Outer eye corners, left and right in the image; their distance is the unit of length.
EYE_CORNERS = (33, 263)
MOUTH_CORNERS = (61, 291)

#: Rims of the eyes, in order around each eye from its left corner in the image. The "right" eye is the person's own, so
#: it lies at the left of the image.
RIGHT_EYE = (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)
LEFT_EYE = (362, 398, 384, 385, 386, 387, 388, 466, 263, 249, 390, 373, 374, 380, 381, 382)

#: The six points per eye of the 68-point annotation; their means define FFHQ's crop.
EYES = ((33, 160, 158, 133, 153, 144), (362, 385, 387, 263, 373, 380))

#: The inner rim of the lips, in order from the left corner in the image along the upper lip.
INNER_LIPS = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)

#: Both lips: outer contour, inner contour and the vertices between.
LIPS = tuple(
    sorted(
        {
            *INNER_LIPS,
            *(61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185),
            *(76, 77, 90, 180, 85, 16, 315, 404, 320, 307, 306, 408, 304, 303, 302, 11, 72, 73, 74, 184),
            *(62, 96, 89, 179, 86, 15, 316, 403, 319, 325, 292, 407, 272, 271, 268, 12, 38, 41, 42, 183),
        }
    )
)
LIDS = tuple(sorted({*RIGHT_EYE, *LEFT_EYE}))

#: Centre and four rim points of both irises.
IRISES = ((468, 469, 470, 471, 472), (473, 474, 475, 476, 477))

#: Vertices over bone that expressions hardly move (standard deviation within clips below 1.3 % of the eye distance):
#: forehead, temples, bridge of the nose, eye corners.
RIGID = (
    *(103, 54, 21, 284, 251, 151, 108, 69, 104, 68, 71, 337, 299, 333, 298, 301),
    *(162, 389, 139, 34, 368, 264, 143, 372, 156, 383),
    *(168, 6, 197, 195, 122, 351, 196, 419, 3, 248, 188, 412, 193, 417, 174, 399, 33, 263, 133, 362),
)


def surface_triangles() -> npt.NDArray[np.int32]:
    """Triangles (852, 3) of the skin from MediaPipe's tesselation, which lists three edges per triangle.

    The mouth and the eyes are holes. Needs mediapipe; a saved face model holds the result.
    """
    from mediapipe.tasks.python.vision.face_landmarker import FaceLandmarksConnections

    edges = FaceLandmarksConnections.FACE_LANDMARKS_TESSELATION
    return np.array([[edge.start for edge in edges[i : i + 3]] for i in range(0, len(edges), 3)], dtype=np.int32)


def strip(ring: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Triangles that fill the hole with rim ``ring``, as a strip between its upper and lower halves.

    Unlike a fan around one vertex, a strip does not fold over when the two halves meet.

    Arguments:
        ring: an even number of vertices in order, from one corner along the upper half to the other corner and back
            along the lower half.

    Returns:
        (len(ring) - 2, 3) int32, wound as the skin's triangles are.
    """
    half = len(ring) // 2
    upper, lower = ring[: half + 1], (ring[0], *ring[: half - 1 : -1])
    triangles: list[tuple[int, int, int]] = []
    for i in range(half):
        if i < half - 1:
            triangles.append((upper[i], lower[i + 1], upper[i + 1]))
        if i > 0:
            triangles.append((upper[i], lower[i], lower[i + 1]))
    return np.array(triangles, dtype=np.int32)
