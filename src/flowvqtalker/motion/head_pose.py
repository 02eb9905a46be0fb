"""Head motion from a tracked clip, extended to any length."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.motion.emotion import smoothstep

__all__ = ["CROSSFADE", "PoseTrack"]

#: Frames at 25 fps over which the end of a clip is cross-faded into its beginning.
CROSSFADE = 25


class PoseTrack:
    """Head motion around a clip's mean pose, without end.

    A clip shorter than the speech repeats, its last second cross-faded into its first, so neither pose nor speed jumps.
    (Played back and forth, the head would bounce off each end.) A single pose, as from an image, holds still.

    Arguments:
        poses: (T, 6) at 25 fps.
        crossfade: frames of the cross-fade, at most half the clip.
    """

    def __init__(self, poses: Tensor, crossfade: int = CROSSFADE) -> None:
        if poses.ndim != 2 or poses.shape[1] != 6 or len(poses) == 0 or not bool(torch.isfinite(poses).all()):
            raise UserError(f"head motion must be (T, 6) finite numbers, T at least 1, got {tuple(poses.shape)}")
        poses = poses.detach().to("cpu", torch.float32)
        self.motion = poses - poses.mean(0)
        self.fade = min(crossfade, len(poses) // 2)
        self.period = len(poses) - self.fade

    @classmethod
    def still(cls) -> PoseTrack:
        """A fixed head."""
        return cls(torch.zeros(1, 6))

    def at(self, frame: int) -> Tensor:
        """Difference (1, 6) to the mean pose at a frame number."""
        lap, place = divmod(frame, self.period)
        motion = self.motion[place : place + 1]
        if lap and place < self.fade:
            former = self.motion[self.period + place]
            motion = torch.lerp(former, motion, smoothstep((place + 1) / (self.fade + 1)))
        return motion
