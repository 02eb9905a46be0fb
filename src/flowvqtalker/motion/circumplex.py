"""Valence and arousal as a mixture of the emotions and its intensity.

References:
    Russell, A circumplex model of affect, Journal of Personality and Social Psychology 39, 1980.
    Russell and Mehrabian, Evidence for a three-factor theory of emotions, Journal of Research in Personality 11, 1977.
"""

from __future__ import annotations

import math

__all__ = ["PLACES", "place_emotion"]

#: Mean pleasure and arousal in [-1, 1] of each emotion (Russell and Mehrabian, table 1). Contempt is not among them.
PLACES = {
    "angry": (-0.51, 0.59),
    "disgusted": (-0.60, 0.35),
    "fear": (-0.64, 0.60),
    "happy": (0.81, 0.51),
    "sad": (-0.63, -0.27),
    "surprised": (0.40, 0.67),
}
#: Largest intensity of an extreme point, and the angle (radians) below which an emotion counts as met.
_STRONGEST, _NEAR = 1.5, 0.01


def place_emotion(valence: float, arousal: float) -> tuple[str, float]:
    """The mixture of emotions at a point of the circumplex, and its intensity; both are continuous in the point.

    The direction of the point chooses the mixture: weights fall with the fourth power of the angle to each emotion. The
    intensity is the point's projection on the mixture's place, so (0, 0) is neutral, an emotion's own place is that
    emotion at intensity 1, and calm, which no face of ours shows, is nearly neutral.

    Arguments:
        valence, arousal: in [-1, 1].

    Returns:
        a mixture as :func:`~flowvqtalker.motion.emotion.parse_emotion` reads it, and an intensity from 0 to 1.5.
    """
    if valence == arousal == 0:
        return "neutral", 0.0
    angle = math.atan2(arousal, valence)
    weights = {}
    for name, (pleasure, activity) in PLACES.items():
        apart = math.remainder(angle - math.atan2(activity, pleasure), 2 * math.pi)
        weights[name] = 1 / (apart**2 + _NEAR**2) ** 2
    total = sum(weights.values())
    centre = [sum(weight * PLACES[name][axis] for name, weight in weights.items()) / total for axis in (0, 1)]
    along = (valence * centre[0] + arousal * centre[1]) / (centre[0] ** 2 + centre[1] ** 2)
    mixture = ",".join(f"{name}:{weight / total:.6f}" for name, weight in weights.items() if weight > 1e-3 * total)
    return mixture, min(max(along, 0.0), _STRONGEST)
