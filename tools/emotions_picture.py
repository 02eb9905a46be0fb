"""Make ``docs/emotions.jpg``: portraits by emotions, one frame of real output each.

    python tools/emotions_picture.py PORTRAIT ... [--frame 60] [--output docs/emotions.jpg]

The page shows a neutral and a smiling picture of held-out people of the Face Research Lab London set (CC BY 4.0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch

from flowvqtalker import EMOTIONS, Talker
from flowvqtalker.io.coefficients import Motion

SPEECH = Path(__file__).parents[1] / "src" / "flowvqtalker" / "assets" / "sample_speech.ogg"
SIDE, BAR = 200, 26


def labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture at the sheet's size above a line of text."""
    small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    bar = np.full((BAR, SIDE, 3), 255, np.uint8)
    cv2.putText(bar, text, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([small, bar])


def main() -> None:
    """Animate the portraits and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path, nargs="+")
    parser.add_argument("--frame", type=int, default=60)
    parser.add_argument("--intensity", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/emotions.jpg"))
    options = parser.parse_args()
    talker = Talker.from_pretrained(device="cpu")
    rows = []
    for path in options.portraits:
        portrait = talker.portrait(path)
        row = [labelled(portrait.image, "portrait")]
        for emotion in [name for name in EMOTIONS if name != "natural"]:
            blocks = talker.motion(SPEECH, portrait, emotion=emotion, intensity=options.intensity, seed=options.seed)
            every = [(block.expression, block.pose) for block in blocks]
            expression, pose = (torch.cat(part) for part in zip(*every, strict=True))
            first, last = max(0, options.frame - 3), options.frame + 4  # the generator looks to both sides
            piece = Motion(expression[first:last], pose[first:last])
            frames = list(talker.render(portrait, [piece]))
            row.append(labelled(frames[options.frame - first], emotion))
        rows.append(np.hstack(row))
    sheet = cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(options.output), sheet)


if __name__ == "__main__":
    main()
