"""Are emotions recognised by networks that nobody here trained? Generated frames and real clips, side by side.

    python benchmarks/emotion.py DATA [--portraits 20] [--seeds 1] [--intensity 1 ...] [--real]

DATA holds `faces/`, `faces.csv`, `clips/` and `clips.csv` (`flowvqtalker prepare --help`). Held-out portraits, half of
them smiling, speak the sample sentence in seven emotions; two frames at each of three moments are rendered and judged
by both networks of flowvqtalker_eval.metrics.expression_networks, whose probabilities are averaged. Several intensities
also give the mean probability of the wanted emotion at each. `--real` judges every emotional clip and one neutral clip
per person instead: what the networks recognise at best. `--save` writes one frame of each portrait and emotion, to look
at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.resources import as_file, files
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import confusion_matrix

from flowvqtalker import Talker
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.face.tracker import FaceTracker
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.video import read_video
from flowvqtalker_eval.metrics.expression_networks import CLASSES, NETWORKS, ExpressionNetwork, load_network

#: First frames of the pieces that are rendered, and their length.
MOMENTS, PIECE = (25, 45, 65), 2
SMILES = (arkit_index("mouthSmileLeft"), arkit_index("mouthSmileRight"))


def judge(networks: list[ExpressionNetwork], images: list[np.ndarray], landmarks: list[np.ndarray]) -> np.ndarray:
    """Mean probabilities (7,) of some frames of one clip."""
    return np.mean([network(images, landmarks).mean(0) for network in networks], axis=0)


def portraits(talker: Talker, data: Path, count: int) -> Iterator[tuple[str, bool, Portrait]]:
    """Held-out people, half of them smiling: name of the file, whether it smiles, and the portrait."""
    table = pd.read_csv(data / "faces.csv").sample(frac=1, random_state=0)
    wanted = {True: count // 2, False: count - count // 2}
    for row in table[[split_of(who) == "val" for who in table.identity]].drop_duplicates("identity").itertuples():
        if not any(wanted.values()):
            return
        try:
            portrait = talker.portrait(data / "faces" / row.file)
        except UserError:
            continue
        shapes = talker.face_model.blendshapes(portrait.expression).numpy()
        smile, opening = float(shapes[list(SMILES)].mean()), float(shapes[arkit_index("jawOpen")])
        smiles = smile > 0.45
        neutral = smile < 0.2 and opening < 0.1
        if portrait.pose[:2].abs().max() < 0.35 and (smiles or neutral) and wanted[smiles]:
            wanted[smiles] -= 1
            yield row.file, smiles, portrait


def pieces(talker: Talker, speech: Path, portrait: Portrait, **keywords: Any) -> list[Motion]:
    """The motion at the moments that are judged."""
    expression, pose = [], []
    for block in talker.motion(speech, portrait, **keywords):
        expression.append(block.expression)
        pose.append(block.pose)
        if sum(map(len, pose)) >= MOMENTS[-1] + PIECE:
            break
    beta, rho = torch.cat(expression), torch.cat(pose)
    return [Motion(beta[first : first + PIECE], rho[first : first + PIECE]) for first in MOMENTS]


def generated(talker: Talker, options: argparse.Namespace, networks: list[ExpressionNetwork]) -> pd.DataFrame:
    """One row for each portrait, seed, intensity and emotion: what is seen, and how probable the wanted one is."""
    rows = []
    with as_file(files("flowvqtalker") / "assets" / "sample_speech.ogg") as speech:
        for name, smiles, portrait in portraits(talker, options.data, options.portraits):
            for seed, intensity in product(range(options.seeds), options.intensity):
                shown = [cv2.resize(portrait.image, (256, 256), interpolation=cv2.INTER_AREA)]
                for emotion in CLASSES:
                    images, landmarks = [], []
                    for piece in pieces(talker, speech, portrait, emotion=emotion, seed=seed, intensity=intensity):
                        images += list(talker.render(portrait, [piece]))
                        points = talker.face_model.project(portrait.identity, piece.expression, piece.pose)
                        landmarks += list(points.numpy())
                    found = judge(networks, images, landmarks)
                    row = {"portrait": name, "smiles": smiles, "seed": seed, "intensity": intensity, "asked": emotion}
                    seen = CLASSES[int(found.argmax())]
                    rows.append({**row, "seen": seen, "probability": found[CLASSES.index(emotion)]})
                    shown.append(cv2.resize(images[PIECE], (256, 256), interpolation=cv2.INTER_AREA))
                if options.save is not None:
                    options.save.mkdir(parents=True, exist_ok=True)
                    file = options.save / f"{Path(name).stem}_{seed}_{intensity:g}.png"
                    cv2.imwrite(str(file), np.hstack(shown)[..., ::-1])
    return pd.DataFrame(rows)


def real(data: Path, networks: list[ExpressionNetwork], frames: int = 8) -> pd.DataFrame:
    """The same for real clips: every emotional one, and one neutral clip of each person."""
    table = pd.read_csv(data / "clips.csv")
    neutral = table[table.emotion == "neutral"].drop_duplicates("identity").head(70)
    emotional = table[table.emotion.isin(set(CLASSES) - {"neutral"})]
    rows = []
    with FaceTracker() as tracker:
        for row in pd.concat([emotional, neutral]).itertuples():
            clip = list(read_video(data / "clips" / row.file))
            chosen = np.unique(np.linspace(0.15 * len(clip), 0.9 * len(clip) - 1, frames).astype(int))
            found = [(clip[i], faces[0].landmarks) for i in chosen if (faces := tracker.detect(clip[i]))]
            if found:
                seen = CLASSES[int(judge(networks, *map(list, zip(*found, strict=True))).argmax())]
                rows.append({"smiles": False, "asked": row.emotion, "seen": seen})
    return pd.DataFrame(rows)


def report(title: str, table: pd.DataFrame) -> None:
    """Print the confusion matrix and the mean recall."""
    matrix = confusion_matrix(table.asked, table.seen, labels=CLASSES)
    recall = matrix.diagonal() / matrix.sum(1).clip(1)
    frame = pd.DataFrame(matrix, CLASSES, CLASSES).assign(recall=np.round(recall, 2))
    print(f"\n{title}: {len(table)} clips, mean recall {recall.mean():.3f}\n{frame.to_markdown()}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, help="folder of weights; default: inside the package")
    parser.add_argument("--portraits", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--intensity", type=float, nargs="+", default=[1.0])
    parser.add_argument("--save", type=Path, help="folder for pictures")
    parser.add_argument("--real", action="store_true", help="judge real clips instead")
    options = parser.parse_args()
    networks = [load_network(name) for name in NETWORKS]
    if options.real:
        report("real clips", real(options.data, networks))
        return
    table = generated(Talker.from_pretrained(options.weights), options, networks)
    if len(options.intensity) > 1:
        means = table.pivot_table(values="probability", index="asked", columns="intensity")
        print(f"\nmean probability of the wanted emotion\n{means.round(3).to_markdown()}")
    for intensity, part in table.groupby("intensity"):
        for smiles, title in ((False, "neutral"), (True, "smiling")):
            report(f"intensity {intensity:g}, {title} portraits", part[part.smiles == smiles])
        report(f"intensity {intensity:g}, all", part)


if __name__ == "__main__":
    main()
