"""The page of a study: one HTML file and a folder of clips under opaque names, with the key kept apart.

The page works from a disk, a web space or :mod:`flowvqtalker_eval.study.server`. It asks no other site for anything, which
its own content security policy enforces. Neither its source nor the clips' names and tags tell the methods; orders are
drawn beforehand (:mod:`flowvqtalker_eval.study.plan`), so that the page need not know which clips belong together.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import os
import random
import re
import secrets
import shutil
import statistics
import uuid
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study.clips import blind_copy, write_check, write_practice
from flowvqtalker_eval.study.key import CHOICES, KEY_FILE, LABELS, PAGE_FOLDER, SCALE, Clip, Expected, Key
from flowvqtalker_eval.study.plan import make_plan
from flowvqtalker_eval.study.sources import Source, differences

__all__ = ["build", "page_source"]

logger = logging.getLogger(__name__)


def build(
    table: Sequence[Sequence[Source]],
    out: Path,
    *,
    title: str = "Talking faces",
    contact: str = "",
    per_rater: int | None = None,
    raters: int = 100,
    checks: int = 1,
    practice: Path | None = None,
    speech: bool = True,
    seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Key:
    """Build a study; the folder appears whole or not at all.

    Arguments:
        table: sources by item and method, from :func:`flowvqtalker_eval.study.sources.find_sources`.
        out: folder to make: ``page/`` for the participants, ``key.json`` for nobody else.
        title: heading of the page.
        contact: whom participants may ask; empty leaves it out.
        per_rater: rated clips a participant; None is all of them.
        raters: number of orders; give at least as many as participants are expected.
        checks: attention checks, shown to everybody.
        practice: clip to practise with; None draws one.
        speech: whether to ask for lip synchronisation.
        seed: of names and orders; None draws one.
        progress: called with (clips done, clips in all).

    Returns:
        the key, as stored.

    Raises:
        UserError: if a number is out of range, the title names a method, or the folder exists.
    """
    methods = tuple(source.method for source in table[0])
    total = len(table) * len(methods)
    _check_options(out, title, contact, methods, total, per_rater, raters, checks)
    seed = secrets.randbits(32) if seed is None else seed
    # Other videos give other names, even with the same seed: answers never fit the wrong study.
    rng = random.Random(repr((seed, title, methods, [source.item for row in table for source in row])))
    names = iter(_names(total + checks + 1, rng))
    clips = [
        Clip(next(names), "rated", str(source.path), source.method, source.item, source.emotion)
        for row in table
        for source in row
    ]
    for source in rng.choices([source for row in table for source in row], k=checks):
        clips.append(Clip(next(names), "check", str(source.path), expected=_expected(speech, rng)))
    clips.append(Clip(next(names), "practice", str(practice or "")))
    ids = [[clips[row * len(methods) + column].id for column in range(len(methods))] for row in range(len(table))]
    check_ids = [clip.id for clip in clips if clip.kind == "check"]
    plan = make_plan(ids, check_ids, raters, per_rater or total, rng)
    key = Key(f"{rng.getrandbits(40):010x}", title, seed, speech, methods, tuple(clips), plan)

    for note in differences(table):
        logger.warning("%s", note)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        (part / PAGE_FOLDER / "clips").mkdir(parents=True)
        encoded = _write_clips(key, part / PAGE_FOLDER / "clips", progress)
        infos = [source.info for row in table for source in row]
        about = {
            "seconds": round(statistics.mean(info.seconds for info in infos), 1),
            "shape": round(statistics.median(info.width / info.height for info in infos), 3),
            "contact": contact,
        }
        (part / PAGE_FOLDER / "index.html").write_text(page_source(key, about), encoding="utf-8")
        key.save(part / KEY_FILE)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if encoded:
        logger.warning("%d of %d clips were encoded anew, since browsers do not play their format", encoded, len(clips))
    return key


def page_source(key: Key, about: dict[str, Any]) -> str:
    """The HTML of a study's page: style, script and what the script needs to know, in one file.

    Arguments:
        key: of the study; of it the identifiers alone go into the page.
        about: ``seconds``, ``shape`` (width to height) and ``contact``.
    """
    ids = sorted(key.by_id)  # the order of the names tells nothing
    places = {name: place for place, name in enumerate(ids)}
    study = {
        "study": key.study,
        "speech": key.speech,
        "emotions": [[name, LABELS[name]] for name in CHOICES],
        "clips": ids,
        "practice": next(clip.id for clip in key.clips if clip.kind == "practice"),
        "checks": any(clip.kind == "check" for clip in key.clips),
        "plan": [[places[name] for name in row] for row in key.plan],
        **about,
    }
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(key.title),
        "STYLE": style,
        "SCRIPT": script,
        "STUDY": json.dumps(study, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    }
    return re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("flowvqtalker_eval.study") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(count: int, rng: random.Random) -> list[str]:
    """Opaque names, all different."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{rng.getrandbits(48):012x}"] = None
    return list(names)


def _expected(speech: bool, rng: random.Random) -> Expected:
    """Answers that nobody would give by pressing the same row everywhere."""
    lip_sync, quality = rng.sample(SCALE, 2)
    return Expected(lip_sync if speech else None, quality, rng.choice(CHOICES))


def _write_clips(key: Key, folder: Path, progress: Callable[[int, int], None]) -> int:
    """Write all clips; returns how many had to be encoded anew."""
    encoded = 0
    for done, clip in enumerate(key.clips):
        progress(done, len(key.clips))
        target = folder / f"{clip.id}.mp4"
        if clip.kind == "practice" and not clip.source:
            write_practice(target)
        elif clip.expected is not None:
            write_check(Path(clip.source), target, clip.expected)
        else:
            encoded += not blind_copy(Path(clip.source), target)
    progress(len(key.clips), len(key.clips))
    return encoded


def _check_options(
    out: Path,
    title: str,
    contact: str,
    methods: Sequence[str],
    total: int,
    per_rater: int | None,
    raters: int,
    checks: int,
) -> None:
    if out.exists():
        raise UserError(f"{out} exists already; a study's key must not be lost: choose another folder or remove it")
    if per_rater is not None and not 1 <= per_rater <= total:
        raise UserError(f"--per-rater {per_rater} is out of range; there are {total} clips, give 1 to {total}")
    if not 1 <= raters <= 10_000:
        raise UserError(f"--raters {raters} is out of range; give 1 to 10000")
    if not 0 <= checks <= 20:
        raise UserError(f"--checks {checks} is out of range; give 0 to 20")
    if not title.strip():
        raise UserError("the title is empty; give participants a few plain words, for instance 'Talking faces'")
    for method in methods:
        if re.search(rf"(?<!\w){re.escape(method)}(?!\w)", f"{title} {contact}", re.IGNORECASE):
            raise UserError(f"the title or the contact names the method {method}; a blind study must not, change it")
