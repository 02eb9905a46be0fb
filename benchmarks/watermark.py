"""What the watermark survives, what it costs, and how often unmarked clips are taken for marked ones.

    python benchmarks/watermark.py CLIP... [--unmarked CLIP...] [--frames 50]

Each clip is marked and written as the product writes it (H.264, crf 18), then damaged and encoded again. Prints the
mean bit accuracy before error correction, on how many clips the mark was found with the right 64 bits, and the z-score
of the known bits.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np

from flowvqtalker.errors import UserError
from flowvqtalker.io.image import read_image
from flowvqtalker.io.video import VideoWriter, probe, read_video
from flowvqtalker.provenance.code import encode
from flowvqtalker.provenance.watermark import Watermark, detect, payload, to_luma

Frames = list[np.ndarray]
_MESSAGE = payload(0x1234_5678_9ABC)


def recode(frames: Frames, codec: str = "libx264", fps: int = 25, **options: str) -> Frames:
    """Encode and decode RGB frames."""
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def h264(frames: Frames, crf: int, fps: int = 25) -> Frames:
    return recode(frames, fps=fps, crf=str(crf), preset="veryfast")


def scaled(frames: Frames, factor: float) -> Frames:
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return [cv2.resize(frame, None, fx=factor, fy=factor, interpolation=method) for frame in frames]


def brighter(frames: Frames, gain: float) -> Frames:
    return [np.clip(frame * gain, 0, 255).astype(np.uint8) for frame in frames]


def cropped(frames: Frames, share: float) -> Frames:
    top, left = (round(side * share / 2) for side in frames[0].shape[:2])
    return [frame[top : frame.shape[0] - top, left : frame.shape[1] - left] for frame in frames]


DAMAGE: dict[str, Callable[[Frames], Frames]] = {
    "as written (crf 18)": lambda frames: frames,
    "one frame of it": lambda frames: frames[len(frames) // 2 :][:1],
    "H.264 crf 23": lambda frames: h264(frames, 23),
    "H.264 crf 28": lambda frames: h264(frames, 28),
    "H.264 crf 33": lambda frames: h264(frames, 33),
    "HEVC crf 28": lambda frames: recode(
        frames, "libx265", crf="28", preset="veryfast", **{"x265-params": "log-level=0"}
    ),
    "VP9 crf 35": lambda frames: recode(frames, "libvpx-vp9", crf="35", **{"b:v": "0", "cpu-used": "8"}),
    "half size, crf 23": lambda frames: h264(scaled(frames, 0.5), 23),
    "half size and back, crf 23": lambda frames: h264(scaled(scaled(frames, 0.5), 2), 23),
    "every sixth frame lost (30 to 25 fps), crf 23": lambda frames: h264(
        [f for k, f in enumerate(frames) if k % 6], 23
    ),
    "10 % darker, crf 23": lambda frames: h264(brighter(frames, 0.9), 23),
    "10 % brighter, crf 23": lambda frames: h264(brighter(frames, 1.1), 23),
    "messenger (three quarters, crf 28, then crf 28)": lambda frames: h264(h264(scaled(frames, 0.75), 28), 28),
    "10 % cropped, crf 23": lambda frames: h264(cropped(frames, 0.1), 23),
    "mirrored": lambda frames: [frame[:, ::-1] for frame in frames],
}


def take(path: Path, count: int) -> Frames:
    if probe(path).kind == "image":
        return [read_image(path)]
    return list(itertools.islice(read_video(path), count))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", type=Path)
    parser.add_argument("--unmarked", nargs="*", type=Path, default=[])
    parser.add_argument("--frames", type=int, default=50)
    options = parser.parse_args()
    cv2.setNumThreads(1)

    results: dict[str, list[tuple[float, bool, float]]] = {name: [] for name in DAMAGE}
    costs, noises = [], []
    word = encode(_MESSAGE)
    for path in options.clips:
        frames = take(path, options.frames)
        mark = Watermark(_MESSAGE)
        for frame in frames:
            plain = to_luma(frame)
            luma = plain.copy()
            started = time.process_time()
            mark(luma)
            costs.append(time.process_time() - started)
            noises.append(10 * np.log10(255**2 / np.mean((luma.astype(float) - plain) ** 2)))
        with tempfile.TemporaryDirectory() as folder:
            with VideoWriter(Path(folder) / "out.mp4", mark=Watermark(_MESSAGE)) as writer:
                for frame in frames:
                    writer.write(frame)
            written = list(read_video(Path(folder) / "out.mp4"))
        for name, damage in DAMAGE.items():
            found = detect(to_luma(frame) for frame in damage(written))
            right = found.found and found.message == _MESSAGE
            results[name].append((float((np.sign(found.soft) == word).mean()), right, found.score))
    if costs:
        print(f"{len(options.clips)} clips, {len(costs)} frames: {1e3 * np.median(costs):.2f} ms a frame (median)")
        print(f"PSNR {np.mean(noises):.1f} dB (lowest {min(noises):.1f})")
        print("\n| after | bit accuracy | lowest | found | score |\n|---|---|---|---|---|")
        for name, rows in results.items():
            accuracy, right, score = (np.array(column, float) for column in zip(*rows, strict=True))
            print(
                f"| {name} | {100 * accuracy.mean():.1f} % | {100 * accuracy.min():.1f} % "
                f"| {int(right.sum())} of {len(right)} | {score.mean():.1f} |"
            )
    scores, wrong = [], 0
    for path in options.unmarked:
        try:
            found = detect(map(to_luma, take(path, options.frames)))
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        scores.append(found.score)
        wrong += found.found
    if scores:
        print(f"\n{len(scores)} unmarked files: {wrong} taken for marked")
        print(f"score {np.mean(scores):.2f} ± {np.std(scores):.2f}, highest {max(scores):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
