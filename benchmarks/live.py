"""The live engine in real time: latency, pace, drift, memory, and the mouth in silence.

    python benchmarks/live.py --seconds 300 [--json OUT] [--portrait FILE] [--speech FILE] [--fps 25] [--threads 2]

Pushes the speech in blocks of 20 ms as a microphone would, sentence by sentence with pauses of 1 to 4 s, and takes the
frames as they come. Latency: from the moment at which the first sample of a sentence is pushed to the moment at which
the sound that holds it and the image that shows it are both out. Sound and image of a tick come out together, so the
offset is how far their common clock strays from the machine's: the range of the median delay over all minutes. Mouth:
the share of frames with shut lips among those more than 250 ms inside silence.
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from pathlib import Path

import numpy as np
import torch

from flowvqtalker.io import audio as decode
from flowvqtalker.live import LiveTalker
from flowvqtalker.motion.mouth import CLOSED, MouthCloser
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.pipeline import Talker

_RATE, _BLOCK = 16_000, 320
#: A click at the beginning of each sentence tells when its first sample came out; speech stays below.
_CLICK, _LOUD = 0.95, 0.85


class Speaker(threading.Thread):
    """Pushes speech with pauses at the pace of its samples; notes when each sentence began."""

    def __init__(self, live: LiveTalker, wave: np.ndarray, seconds: float, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self.live, self.wave, self.seconds, self.random = live, wave, seconds, np.random.default_rng(seed)
        self.begun: list[float] = []
        self.done = threading.Event()

    def run(self) -> None:
        start, sent, at = time.monotonic(), 0, 0
        while time.monotonic() - start < self.seconds:
            length = int(self.random.uniform(1.5, 5.0) * _RATE)
            part = np.resize(np.roll(self.wave, -at), length).astype(np.float32).copy()
            part[0], at = _CLICK, at + length
            for first in range(0, length, _BLOCK):
                due = start + (sent + _BLOCK) / _RATE  # a block is there when its last sample was spoken
                time.sleep(max(0.0, due - time.monotonic()))
                if first == 0:
                    self.begun.append(time.monotonic())
                if self.done.is_set():
                    return
                self.live.push(part[first : first + _BLOCK], _RATE)
                sent += _BLOCK
            self.live.end_of_utterance()
            sent += int(self.random.uniform(1.0, 4.0) * _RATE) // _BLOCK * _BLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--portrait", type=Path)
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--fps", type=float, default=25.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    talker = Talker.from_pretrained(options.weights, components=LiveTalker.COMPONENTS)
    if options.portrait is None:
        import skimage.data

        portrait = talker.portrait(np.asarray(skimage.data.astronaut()))
    else:
        portrait = talker.portrait(options.portrait)
    sample = Path(decode.__file__).parents[1] / "assets" / "sample_speech.ogg"
    wave = decode.load(options.speech or sample)
    live = LiveTalker(talker, portrait, MotionOptions(emotion="happy"), audio_rate=_RATE, fps=options.fps)
    closer = live._engine._stream.gate.closer
    speaker = Speaker(live, 0.7 * wave / np.abs(wave).max(), options.seconds)
    print(json.dumps(result := measure(live, speaker, closer, options.seconds), indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def resident() -> float:
    """Memory of this process in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(live: LiveTalker, speaker: Speaker, closer: MouthCloser, seconds: float) -> dict[str, float]:
    """Run the stream for some seconds beside the speaker."""
    late, latency, shut, memory = [], [], [], []
    images = silence = heard = 0
    waiting: float | None = None  # when the click was pushed whose image has not come
    with live:
        frames = live.frames()
        next(frames)
        speaker.start()
        begin = time.monotonic()
        for frame in frames:
            now = time.monotonic()
            if now - begin > seconds:
                speaker.done.set()
                speaker.join()
                break
            late.append(now - frame.pts)
            images += frame.image is not None
            if np.abs(frame.audio).max() > _LOUD:
                waiting, heard = speaker.begun[heard], heard + 1
            if waiting is not None and frame.image is not None:
                latency.append(1e3 * (now - waiting))
                waiting = None
            silence = 0 if np.abs(frame.audio).max() > 1e-4 else silence + 1
            if silence > 7:  # more than 250 ms
                shut.append(float(closer.gap(frame.motion.expression)) <= CLOSED)
            if len(late) % 250 == 0:
                memory.append(resident())
    minutes = [np.median(late[i : i + 250]) for i in range(0, max(1, len(late) - 250), 1500)]
    return {
        "seconds": round(now - begin, 1),
        "latency_p50_ms": float(np.percentile(latency, 50)),
        "latency_p95_ms": float(np.percentile(latency, 95)),
        "sentences": len(latency),
        "fps": live.fps,
        "images_per_second": images / (now - begin),
        "dropped_share": live.dropped / max(1, live.dropped + images),
        "offset_ms": 1e3 * float(np.ptp(minutes)),
        "memory_growth_mib": float(np.median(memory[-3:]) - np.median(memory[1:4])) if len(memory) > 6 else 0.0,
        "mouth_shut_share": float(np.mean(shut)),
        "silent_frames": len(shut),
    }


if __name__ == "__main__":
    main()
