"""The page of a study: one HTML file and a folder of clips under opaque names, with the key kept apart.

The page works from a disk, a web space or :mod:`flowvqtalker_eval.study.server`. It asks no other site for anything;
its content security policy enforces that. Neither its source nor the clips' names and tags tell the methods. Orders are
drawn beforehand (:mod:`flowvqtalker_eval.study.plan`), so the page need not know which clips belong together.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import random
import re
import secrets
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_folder
from flowvqtalker_eval.study.clips import blind_copy, write_check, write_practice
from flowvqtalker_eval.study.key import CHOICES, KEY_FILE, LABELS, PAGE_FOLDER, SCALE, Clip, Expected, Key
from flowvqtalker_eval.study.plan import make_plan
from flowvqtalker_eval.study.sources import Source, differences, find_sources, method_folders

__all__ = ["Build", "page_source"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Build:
    """Build the page of a blind study from videos that have the same names in each method's folder."""

    methods: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="METHOD=FOLDER")]
    """Methods to compare, in the order of the table."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to make: page/ for the participants, key.json for nobody else."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Real videos of the same names, the column GT."""
    emotions: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Csv with the columns name and emotion. Default: the emotion is a word of the name, as in M003_happy_12.mp4."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Names to include, without the ending. Default: all."""
    speech: Literal["yes", "no"] = "yes"
    """Whether the videos have speech; no leaves out the question about the lips."""
    per_rater: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Clips each participant rates. Default: all."""
    raters: int = 100
    """Number of different orders: at least as many as participants are expected."""
    checks: int = 1
    """Attention checks, shown to everybody."""
    practice: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Clip to practise with, not one of the study's. Default: a drawn face."""
    title: str = "Talking faces"
    """Heading of the page."""
    contact: str = ""
    """Whom participants may ask, for instance an email address."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Seed of names and orders. Default: a new one, stored in the key."""

    def run(self) -> Key:
        """Write the study; the folder appears complete or not at all.

        Raises:
            UserError: if an option is out of range, videos do not match, or the folder exists.
        """
        folders = method_folders(self.methods, self.real)
        for file in (self.emotions, self.practice):
            if file is not None and not file.is_file():
                raise UserError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}; check the name")
        table = find_sources(folders, self.emotions, self.only, self.speech == "yes")
        self._check(tuple(folders), len(table) * len(folders))
        for note in differences(table):
            logger.warning("%s", note)
        key = self._draw_key(table, tuple(folders))
        with atomic_folder(self.output) as part:
            (part / PAGE_FOLDER / "clips").mkdir(parents=True)
            encoded = _write_clips(key, part / PAGE_FOLDER / "clips")
            infos = [source.info for row in table for source in row]
            seconds = round(statistics.mean(info.seconds for info in infos), 1)
            shape = round(statistics.median(info.width / info.height for info in infos), 3)
            page = page_source(key, seconds, shape, self.contact)
            (part / PAGE_FOLDER / "index.html").write_text(page, encoding="utf-8")
            key.save(part / KEY_FILE)
        if encoded:
            total = len(key.clips)
            logger.warning("%d of %d clips were re-encoded, because browsers do not play their format", encoded, total)
        print(f"{self.output / PAGE_FOLDER / 'index.html'}: {len(key.plan[0])} clips for each participant")
        print(f"{self.output / KEY_FILE}: keep it to yourself, it tells which clip is whose")
        return key

    def _check(self, methods: Sequence[str], total: int) -> None:
        if self.output.exists():
            raise UserError(
                f"{self.output} exists already; a study's key must not be lost: choose another folder or remove it"
            )
        per_rater = total if self.per_rater is None else self.per_rater
        ranges = {
            "per-rater": (per_rater, 1, total),
            "raters": (self.raters, 1, 10_000),
            "checks": (self.checks, 0, 20),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                note = f"there are {total} clips, " if name == "per-rater" else ""
                raise UserError(f"--{name} {value} is out of range; {note}give {low} to {high}")
        if not self.title.strip():
            raise UserError("the title is empty; give participants a few plain words, for instance 'Talking faces'")
        for method in methods:
            if re.search(rf"(?<!\w){re.escape(method)}(?!\w)", f"{self.title} {self.contact}", re.IGNORECASE):
                raise UserError(f"the title or the contact names the method {method}; change it, the study is blind")

    def _draw_key(self, table: list[list[Source]], methods: tuple[str, ...]) -> Key:
        seed = secrets.randbits(32) if self.seed is None else self.seed
        sources = [source for row in table for source in row]
        # Other videos give other names, even with the same seed: answers never fit the wrong study.
        rng = random.Random(repr((seed, self.title, methods, [source.item for source in sources])))
        names = (f"{number:012x}" for number in rng.sample(range(16**12), len(sources) + self.checks + 1))
        rated = [
            Clip(
                id=next(names),
                kind="rated",
                source=str(one.path),
                method=one.method,
                item=one.item,
                emotion=one.emotion,
            )
            for one in sources
        ]
        checks = [
            Clip(id=next(names), kind="check", source=str(one.path), expected=_expected(self.speech == "yes", rng))
            for one in rng.choices(sources, k=self.checks)
        ]
        practice = Clip(id=next(names), kind="practice", source=str(self.practice or ""))
        width = len(methods)
        ids = [[clip.id for clip in rated[start : start + width]] for start in range(0, len(rated), width)]
        return Key(
            study=f"{rng.getrandbits(40):010x}",
            title=self.title,
            seed=seed,
            speech=self.speech == "yes",
            methods=methods,
            clips=(*rated, *checks, practice),
            plan=make_plan(ids, [clip.id for clip in checks], self.raters, self.per_rater or len(rated), rng),
        )


def _expected(speech: bool, rng: random.Random) -> Expected:
    """Answers that nobody would give by choosing the same row everywhere."""
    lip_sync, quality = rng.sample(SCALE, 2)
    return Expected(lip_sync=lip_sync if speech else None, quality=quality, emotion=rng.choice(CHOICES))


def _write_clips(key: Key, folder: Path) -> int:
    """Write all clips; returns how many had to be re-encoded."""
    from tqdm import tqdm

    encoded = 0
    for clip in tqdm(key.clips, desc="study", unit="clip", disable=None, leave=False):
        target = folder / f"{clip.id}.mp4"
        if clip.kind == "practice" and not clip.source:
            write_practice(target)
        elif clip.expected is not None:
            write_check(Path(clip.source), target, clip.expected)
        else:
            encoded += not blind_copy(Path(clip.source), target)
    return encoded


def page_source(key: Key, seconds: float, shape: float, contact: str) -> str:
    """The HTML of a study's page: style, script and the script's data in one file.

    Arguments:
        key: of the study; only its identifiers go into the page.
        seconds: mean length of a clip.
        shape: width to height of the clips.
        contact: whom participants may ask.
    """
    ids = sorted(key.by_id)  # the order of the names tells nothing
    places = {name: place for place, name in enumerate(ids)}
    study: dict[str, Any] = {
        "study": key.study,
        "speech": key.speech,
        "emotions": [[name, LABELS[name]] for name in CHOICES],
        "clips": ids,
        "practice": next(clip.id for clip in key.clips if clip.kind == "practice"),
        "checks": bool(key.checks),
        "plan": [[places[name] for name in row] for row in key.plan],
        "seconds": seconds,
        "shape": shape,
        "contact": contact,
    }
    assets = files("flowvqtalker_eval.study") / "assets"
    style, script, page = ((assets / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    parts = {
        "POLICY": f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; img-src "
        "data:; media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'",
        "TITLE": html.escape(key.title),
        "STYLE": style,
        "SCRIPT": script,
        "STUDY": json.dumps(study, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    }
    return re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], page)
