"""Peak memory for one and for ten minutes of speech; it must not grow with the length.

    python benchmarks/memory.py             speech to motion (decoding, features, both flows)
    python benchmarks/memory.py --video     speech to video, end to end (slow: every frame is rendered)
    python benchmarks/memory.py --minutes 1 10 120

Each length runs in a process of its own; the peak is what the kernel reports (ru_maxrss).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import wave
from importlib.resources import files
from pathlib import Path

import numpy as np

from flowvqtalker.constants import SAMPLE_RATE


def long_speech(path: Path, minutes: float) -> None:
    """Write the bundled speech repeatedly as WAV, block by block."""
    from flowvqtalker.io import audio as decode

    sample = decode.load(Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg")))
    block = (np.clip(sample, -1, 1) * 32767).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        left = round(minutes * 60 * SAMPLE_RATE) * 2
        while left > 0:
            file.writeframes(block[:left])
            left -= len(block)


def measure(minutes: float, video: bool, weights: str | None) -> None:
    """Run one length in this process and print a line."""
    import skimage.data

    from flowvqtalker.pipeline import Talker

    with tempfile.TemporaryDirectory() as folder:
        speech = Path(folder) / "speech.wav"
        long_speech(speech, minutes)
        parts = ("face", "motion", "render") if video else ("face", "motion")
        talker = Talker.from_pretrained(weights, components=parts)
        started = time.monotonic()
        if video:
            frames = talker.animate(skimage.data.astronaut(), speech, Path(folder) / "out.mp4").frames
        else:
            frames = sum(map(len, talker.motion(speech)))
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    speed = f"{frames} frames in {seconds:.1f} s, {frames / seconds:.1f} a second"
    print(f"{minutes:6.1f} min: peak {peak:7.0f} MiB, {speed}")


def main() -> None:
    """Run every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 10])
    parser.add_argument("--video", action="store_true")
    parser.add_argument("--weights")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one, options.video, options.weights)
        return
    for minutes in options.minutes:
        line = [sys.executable, __file__, "--one", str(minutes)]
        line += ["--video"] * options.video + (["--weights", options.weights] if options.weights else [])
        subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
