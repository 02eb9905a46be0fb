"""Make ``docs/demo.png``: the bundled portrait and frames of it speaking with different emotions.

python tools/demo_picture.py [--output docs/demo.png]
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import skimage.data

from flowvqtalker import Talker
from flowvqtalker.io.image import ImageArray

SPEECH = Path(__file__).parents[1] / "src" / "flowvqtalker" / "assets" / "sample_speech.ogg"
EMOTIONS = ("neutral", "happy", "angry", "surprised")
SIDE = 180


def labelled(picture: ImageArray, text: str) -> np.ndarray:
    """The picture at the sheet's size with a line of text."""
    small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    for shift, level in ((1, 0), (0, 255)):  # with its shadow
        place = (8 + shift, SIDE - 10 + shift)
        cv2.putText(small, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, (level,) * 3, 1, cv2.LINE_AA)
    return small


def main() -> None:
    """Animate the portrait and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"))
    options = parser.parse_args()
    talker = Talker.from_pretrained(device="cpu")
    portrait = talker.portrait(skimage.data.astronaut())
    rows = []
    for emotion in EMOTIONS:
        motion = talker.motion(SPEECH, portrait, emotion=emotion, seed=1)
        frames = list(islice(talker.render(portrait, motion), 0, 100))
        rows.append([labelled(portrait.image, "portrait")] + [labelled(frames[t], emotion) for t in (30, 45, 62, 80)])
    sheet = np.vstack([np.hstack(row) for row in rows])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(options.output), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    main()
