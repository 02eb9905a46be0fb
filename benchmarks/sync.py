"""How well does the sync expert find known offsets on people it has not seen, and what does it score real clips?

    python benchmarks/sync.py SHARD [--weights FOLDER] [--split val]

SHARD holds mouths (``flowvqtalker prepare-mouths``). The sound of each clip, or of each piece of it, is moved by
a known number of frames in [-8, 8]; an offset counts as found if the smallest distance lies within a frame of it,
measured from where the whole clip's own smallest distance lies without the move (a shard knows the lag of a collection
better than that of each clip). Chance is 3 of the 31 shifts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from flowvqtalker_eval.evaluators.sync_data import SpeechClip, load_speech_clips
from flowvqtalker_eval.evaluators.sync_expert import SyncExpert, load_sync_expert
from flowvqtalker_eval.evaluators.sync_training import exchanged_score, offset_scores

MOST = 8


def found(expert: SyncExpert, clips: list[SpeechClip], frames: int | None) -> list[bool]:
    """Whether known offsets are found on whole clips (None) or on pieces of ``frames`` frames."""
    hits = []
    for number, clip in enumerate(clips):
        own = offset_scores(expert, clip, 0).offset
        size = frames or len(clip)
        for start in range(0, len(clip) - size + 1, max(1, size // 2)):
            late = int(np.random.default_rng([2, 1000 * number + start]).integers(-MOST, MOST + 1))
            piece = clip.part(start, start + size)
            hits.append(abs(offset_scores(expert, piece, late).offset - own + late) <= 1)
    return hits


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path, help="folder of weights; default: inside the package")
    parser.add_argument("--split", default="val", choices=("train", "val"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    expert = load_sync_expert(options.weights)
    clips = load_speech_clips([options.shard], options.split, 25)
    short = [clip for clip in clips if len(clip) < 50]
    long = [clip for clip in clips if len(clip) >= 50]
    print(f"{options.split}: {len(clips)} clips, {len({clip.identity for clip in clips})} people; chance {3 / 31:.3f}")
    print("\n| | offsets | found within a frame |\n|---|---|---|")
    for name, group, frames in (
        ("clips of about 1.1 s", short, None),
        ("1.1-s pieces of longer clips", long, 28),
        ("2-s pieces of longer clips", long, 50),
        ("longer clips (2 s and more)", long, None),
    ):
        hits = found(expert, group, frames)
        if hits:
            print(f"| {name} | {len(hits)} | {np.mean(hits):.3f} |")
    scores = [offset_scores(expert, clip, 0) for clip in clips]
    shares = [np.mean([abs(score.offset) <= reach for score in scores]) for reach in (1, 3)]
    print(f"\nunmoved, within 1 / 3 frames of the shard's lag: {shares[0]:.3f} / {shares[1]:.3f}")
    print("\n| sound | Sync-expert C | Sync-expert D |\n|---|---|---|")
    others = [clips[(i + len(clips) // 2) % len(clips)] for i in range(len(clips))]
    exchanged = [exchanged_score(expert, *pair) for pair in zip(clips, others, strict=True)]
    for name, group in (("its own", scores), ("another clip's", exchanged)):
        confidence, distance = (np.mean([getattr(s, key) for s in group]) for key in ("confidence", "distance"))
        print(f"| {name} | {confidence:.3f} | {distance:.3f} |")
    better = np.mean([a.confidence > b.confidence for a, b in zip(scores, exchanged, strict=True)])
    print(f"\nC of a clip's own sound is above that of another's: {better:.3f} of the clips")


if __name__ == "__main__":
    main()
