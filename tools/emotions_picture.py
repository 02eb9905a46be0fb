"""Make ``docs/emotions.jpg``: portraits by emotions, one frame of real output each.

    python tools/emotions_picture.py PORTRAIT ... [--frame 60] [--output docs/emotions.jpg]
    python tools/emotions_picture.py PORTRAIT --buttons src/flowvqtalker/serve/page/emotions

The second form writes the faces on the emotion buttons of the web page. Both show people of the Face Research Lab
London set (DeBruine and Jones, CC BY 4.0) who are held out of the training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch

from flowvqtalker import EMOTIONS, Talker
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.io.coefficients import Motion

SPEECH = Path(__file__).parents[1] / "src" / "flowvqtalker" / "assets" / "sample_speech.ogg"
SIDE, BAR = 200, 26
BUTTON = 128


def labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """The picture at the sheet's size above a line of text."""
    small = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    bar = np.full((BAR, SIDE, 3), 255, np.uint8)
    cv2.putText(bar, text, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([small, bar])


def frame_of(talker: Talker, portrait: Portrait, emotion: str, intensity: float, seed: int, frame: int) -> np.ndarray:
    """One frame of the bundled speech."""
    blocks = talker.motion(SPEECH, portrait, emotion=emotion, intensity=intensity, seed=seed)
    every = [(block.expression, block.pose) for block in blocks]
    expression, pose = (torch.cat(part) for part in zip(*every, strict=True))
    first, last = max(0, frame - 3), frame + 4  # the generator looks to both sides
    return list(talker.render(portrait, [Motion(expression[first:last], pose[first:last])]))[frame - first]


def main() -> None:
    """Animate the portraits and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portraits", type=Path, nargs="+")
    parser.add_argument("--frame", type=int, default=60)
    parser.add_argument("--intensity", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/emotions.jpg"))
    parser.add_argument("--buttons", type=Path, help="write one small picture per emotion into this folder instead")
    options = parser.parse_args()
    talker = Talker.from_pretrained(device="cpu")
    choices = options.intensity, options.seed, options.frame
    if options.buttons:
        portrait = talker.portrait(options.portraits[0])
        options.buttons.mkdir(parents=True, exist_ok=True)
        for emotion in EMOTIONS:
            face = frame_of(talker, portrait, emotion, *choices)[80:492, 50:462]
            small = cv2.cvtColor(cv2.resize(face, (BUTTON, BUTTON), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
            cv2.imwrite(str(options.buttons / f"{emotion}.jpg"), small, [cv2.IMWRITE_JPEG_QUALITY, 82])
        return
    rows = []
    for path in options.portraits:
        portrait = talker.portrait(path)
        names = [name for name in EMOTIONS if name != "natural"]
        row = [labelled(frame_of(talker, portrait, name, *choices), name) for name in names]
        rows.append(np.hstack([labelled(portrait.image, "portrait"), *row]))
    sheet = cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR)
    cv2.imwrite(str(options.output), sheet)


if __name__ == "__main__":
    main()
