"""The page of a user study: blind, balanced, complete, and every bad input. Its doings: test_study_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise
from math import gcd
from pathlib import Path

import av
import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.io.video import VideoWriter, probe, read_video
from flowvqtalker_eval.study import clips as clips_module
from flowvqtalker_eval.study.key import CHOICES, Expected, Key
from flowvqtalker_eval.study.page import Build
from flowvqtalker_eval.study.plan import assign, insert_checks, make_plan, order, williams
from flowvqtalker_eval.study.sources import differences, find_sources, method_folders

from .study_help import ITEMS, METHODS, quick_clips, write_methods, write_video


@pytest.fixture(scope="module")
def methods(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("methods")
    return folder, write_methods(folder)


@pytest.fixture(scope="module")
def built(methods, tmp_path_factory) -> Path:
    """A study with two methods, the real videos, two items and one attention check."""
    folder, given = methods
    out = tmp_path_factory.mktemp("built") / "study"
    practice = write_video(out.parent / "practice.mp4")
    with pytest.MonkeyPatch.context() as patch:
        quick_clips(patch)
        Build(methods=tuple(given), output=out, real=folder / "real", practice=practice, seed=4).run()
    return out


def config(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize("count", range(1, 9))
def test_williams_square(count):
    rows = williams(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    for place in range(count):
        assert set(Counter(row[place] for row in rows).values()) == {len(rows) // count}
    after = Counter(pair for row in rows for pair in pairwise(row))
    assert len(after) == count * (count - 1)
    assert len(set(after.values())) <= 1


@pytest.mark.parametrize("items,count_methods,count", [(20, 6, 120), (20, 6, 20), (6, 3, 4), (5, 4, 7), (2, 3, 1)])
def test_balance(items, count_methods, count):
    whole = items * count_methods
    people = whole // gcd(count, whole)
    seen: Counter[tuple[int, int]] = Counter()
    for rater in range(people):
        own = assign(rater, items, count_methods, count)
        assert len(set(own)) == count
        by_item = Counter(item for item, _ in own)
        assert max(by_item.values()) - min(by_item.get(item, 0) for item in range(items)) <= 1
        by_method = Counter(method for _, method in own)
        assert max(by_method.values()) - min(by_method.get(method, 0) for method in range(count_methods)) <= 4
        seen.update(own)
    assert len(seen) == whole
    assert set(seen.values()) == {people * count // whole}


def test_order_is_in_blocks_and_keeps_items_apart():
    rows = [order(assign(rater, 20, 6, 120), 6, rater, random.Random(rater)) for rater in range(6)]
    for row in rows:
        assert all(len({method for _, method in row[start : start + 6]}) == 6 for start in range(0, 120, 6))
        last: dict[int, int] = {}
        for place, (item, _) in enumerate(row):
            assert place - last.get(item, -100) >= 10
            last[item] = place
    assert len({tuple(row) for row in rows}) == 6
    first = Counter(row[0][1] for row in rows)
    assert set(first.values()) == {1}  # each method opens for one of six participants


def test_checks_are_spread():
    for seed in range(50):
        row = insert_checks([f"r{n}" for n in range(40)], ["c1", "c2"], random.Random(seed))
        assert [entry for entry in row if entry[0] == "r"] == [f"r{n}" for n in range(40)]
        first, second = (place for place, entry in enumerate(row) if entry[0] == "c")
        assert 5 <= first <= 16
        assert 25 <= second <= 37
    plan = make_plan([["a", "b"], ["c", "d"]], ["check"], 5, 3, random.Random(0))
    assert all(len(row) == len(set(row)) == 4 and "check" in row for row in plan)


def test_study_folder(built, methods):
    folder, _ = methods
    key = Key.load(built)
    assert key.methods == (*METHODS, "GT")
    assert key.items == tuple(sorted(ITEMS))
    rated = [clip for clip in key.clips if clip.kind == "rated"]
    assert {(clip.method, clip.item) for clip in rated} == {(m, i) for m in key.methods for i in ITEMS}
    assert {clip.emotion for clip in rated} == {"happy", "sad"}
    assert {Path(clip.source).parent.name for clip in rated if clip.method == "GT"} == {"real"}
    files = {path.stem for path in (built / "page" / "clips").iterdir()}
    assert files == {clip.id for clip in key.clips}
    assert sorted(path.name for path in built.iterdir()) == ["key.json", "page"]
    assert sorted(path.name for path in (built / "page").iterdir()) == ["clips", "index.html"]
    for clip in rated:  # the pictures are those of the source
        ours, theirs = (next(read_video(path)) for path in (built / "page" / "clips" / f"{clip.id}.mp4", clip.source))
        assert np.array_equal(ours, theirs)
    assert all(sorted(row) == sorted(key.by_id) for row in key.plan)
    assert folder.is_dir()


def test_nothing_on_the_page_tells_the_methods(built):
    """Neither names, nor paths, nor tags, nor the encoder's settings, nor dates; and the key is not among the files."""
    words = [word.lower().encode() for word in (*METHODS, *ITEMS, "happy_1", "x264", "lavf", str(built.parent), "fear")]
    stamps = set()
    for path in (built / "page").rglob("*"):
        assert not any(word in path.name.lower().encode() for word in words)
        if path.suffix == ".mp4":
            content = path.read_bytes().lower()
            assert not any(word in content for word in words)
            stamps.add(path.stat().st_mtime)
            with av.open(str(path)) as container:
                assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands"}
                tags = [(stream.type, tuple(stream.metadata.items())) for stream in container.streams]
                assert len({kind for kind, _ in tags}) == len(tags) == 2
    assert stamps == {0}
    text = (built / "page" / "index.html").read_text(encoding="utf-8").lower().encode()
    assert not any(word in text for word in words if word != b"fear")
    key = Key.load(built)
    given = config(built / "page" / "index.html")
    assert given["clips"] == sorted(key.by_id)  # in an order that tells nothing
    assert set(given) == {
        "study", "speech", "emotions", "clips", "practice", "checks", "plan", "seconds", "shape", "contact"
    }  # fmt: skip
    assert b"expected" not in text


def test_page_asks_nobody_else(built):
    text = (built / "page" / "index.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "@@" not in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert [name for name, _ in config(built / "page" / "index.html")["emotions"]] == list(CHOICES)


def test_title_and_contact_are_text(methods, tmp_path):
    title, contact = "<b>Faces</b> & \\1 @@STYLE@@", "</script><script>alert(1)</script>"
    practice = write_video(tmp_path / "p.mp4")
    options = {"practice": practice, "checks": 0, "raters": 2}
    Build(methods=tuple(methods[1]), output=tmp_path / "s", title=title, contact=contact, **options).run()
    page = tmp_path / "s" / "page" / "index.html"
    assert "<h1>&lt;b&gt;Faces&lt;/b&gt; &amp; \\1 @@STYLE@@</h1>" in page.read_text(encoding="utf-8")
    assert config(page)["contact"] == contact
    assert page.read_text(encoding="utf-8").count("<script") == 2


def test_seed_repeats_and_none_differs(methods, tmp_path):
    practice = write_video(tmp_path / "p.mp4")

    def key(name, **options):
        shared = {"practice": practice, "checks": 0, "raters": 3}
        return Build(methods=tuple(methods[1]), output=tmp_path / name, **shared, **options).run()

    assert key("a", seed=1) == key("b", seed=1)
    assert (tmp_path / "a/page/index.html").read_bytes() == (tmp_path / "b/page/index.html").read_bytes()
    others = [key("c", seed=2), key("d", seed=1, title="Other"), key("e"), key("f")]
    assert len({other.study for other in others} | {key("g", seed=1).study}) == 5
    fewer = key("h", per_rater=2)
    assert all(len(row) == 2 for row in fewer.plan)


def test_check_clip_says_what_to_answer(methods, tmp_path, monkeypatch):
    monkeypatch.setattr(clips_module, "_CHECK_SECONDS", 0.6)
    monkeypatch.setattr(clips_module, "_CHECK_FROM", 0.2)
    drawn = []
    monkeypatch.setattr(
        clips_module, "_text", lambda lines, w, h: drawn.append(lines) or np.zeros((h, w, 1), np.float32)
    )
    source = next((methods[0] / "real").glob("*.mp4"))
    clips_module.write_check(source, tmp_path / "c.mp4", Expected(lip_sync=2, quality=4, emotion="fear"))
    assert drawn == [
        [
            "Attention check",
            "",
            "Please answer this clip with:",
            "Lips and speech: 2",
            "Image quality: 4",
            "Emotion: Afraid",
        ]
    ]
    frames = list(read_video(tmp_path / "c.mp4"))
    assert len(frames) == 15  # longer than its source
    assert frames[0].mean() > 3 * frames[-1].mean()
    assert probe(tmp_path / "c.mp4").width == 512


def test_text_is_drawn():
    text = clips_module._text(["Attention check", "Emotion: Contemptuous"], 256, 200)
    assert text.shape == (200, 256, 1)
    assert text.max() == 1
    assert text[:, [0, -1]].max() == 0  # inside the picture


def test_drawn_practice_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(clips_module, "_PRACTICE_SECONDS", 0.8)
    clips_module.write_practice(tmp_path / "p.mp4")
    found = probe(tmp_path / "p.mp4")
    assert (found.width, found.height, found.sound) == (512, 512, True)
    mouth = [frame[350:400, 256].astype(int) for frame in read_video(tmp_path / "p.mp4")]
    assert len(mouth) == 20
    assert np.ptp([m.mean() for m in mouth]) > 20  # it moves


def test_other_formats_are_encoded_anew(tmp_path):
    source = tmp_path / "a.avi"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in (50, 100, 150):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    assert not clips_module.blind_copy(source, tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    assert len(list(read_video(tmp_path / "b.mp4"))) == 3
    assert b"x264" not in (tmp_path / "b.mp4").read_bytes()


def test_tags_are_left_behind(tmp_path):
    """Titles and names of tracks, which editors and some methods write."""
    plain = write_video(tmp_path / "a.mp4")
    with av.open(str(plain)) as inside, av.open(str(tmp_path / "b.mp4"), "w") as outside:
        outside.metadata["title"] = outside.metadata["comment"] = "SecretNet"
        copies = {stream.index: outside.add_stream_from_template(stream) for stream in inside.streams}
        for copy in copies.values():
            copy.metadata["handler_name"] = "SecretNet"
        for packet in inside.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                outside.mux(packet)
    assert (tmp_path / "b.mp4").read_bytes().count(b"SecretNet") >= 4
    assert clips_module.blind_copy(tmp_path / "b.mp4", tmp_path / "c.mp4")
    assert b"SecretNet" not in (tmp_path / "c.mp4").read_bytes()
    assert (tmp_path / "c.mp4").read_bytes().count(b"Handler") == 2  # the names that every file has


def test_differences_are_told(tmp_path):
    for name, options in {"a": {}, "b": {"frames": 15, "size": (96, 64), "sound": False}}.items():
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "x_happy.mp4", **options)
    with VideoWriter(tmp_path / "b" / "y_sad.mp4", fps=30) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    write_video(tmp_path / "a" / "y_sad.mp4", frames=1, sound=False)
    found = differences(find_sources({"a": tmp_path / "a", "b": tmp_path / "b"}, speech=False))
    assert found == [
        "the methods differ in length: x_happy (0.4-0.6 s)",
        "the methods differ in aspect ratio: x_happy (64x64, 96x64)",
        "the methods differ in having sound: x_happy",
        "the methods differ in frames per second: y_sad (25.0, 30.0)",
    ]


def test_emotions_from_a_table(methods, tmp_path):
    (tmp_path / "e.csv").write_text("name,emotion\nM003_happy_1.mp4,angry\nW009_sad_2, Natural\n", encoding="utf-8")
    table = find_sources(method_folders(methods[1], None), tmp_path / "e.csv")
    assert [row[0].emotion for row in table] == ["angry", "natural"]
    for text, part in {
        "name,feeling\na,b\n": "lacks the columns emotion",
        "name,emotion\nM003_happy_1,joy\n": "unknown emotion 'joy'",
        "name,emotion\nM003_happy_1,sad\n": "emotion of W009_sad_2 is not known",
    }.items():
        (tmp_path / "e.csv").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=part):
            find_sources(method_folders(methods[1], None), tmp_path / "e.csv")


def bad(tmp_path, made, **changes):
    usual = {"methods": tuple(made[1]), "output": tmp_path / "out", "real": made[0] / "real"}
    return Build(**{**usual, **changes}).run


BAD = {
    "a method without a folder": ({"methods": ("A",)}, "is not METHOD=FOLDER"),
    "a method twice": ({"methods": ("A=.", "a=.")}, "is given twice"),
    "the name of the real ones": ({"methods": ("gt=.",)}, "name of the real videos"),
    "no method": ({"methods": (), "real": None}, "no method was given"),
    "no such folder": ({"methods": ("A=nowhere",)}, "nowhere does not exist"),
    "no such list": ({"emotions": Path("nowhere.csv")}, "nowhere.csv does not exist"),
    "too many clips": ({"per_rater": 7}, "there are 6 clips, give 1 to 6"),
    "no clip": ({"per_rater": 0}, "--per-rater 0 is out of range"),
    "no order": ({"raters": 0}, "--raters 0 is out of range"),
    "too many checks": ({"checks": 21}, "--checks 21 is out of range"),
    "no title": ({"title": " "}, "the title is empty"),
    "a title that tells": ({"title": "Is secretnet good?"}, "names the method SecretNet"),
    "a name that is not there": (
        {"only": ("x", "M003_happy_1")},
        "no method has a video x; the names are M003_happy_1",
    ),
}


@pytest.mark.parametrize("changes,part", BAD.values(), ids=BAD)
def test_bad_options(methods, tmp_path, changes, part):
    with pytest.raises(UserError, match=part):
        bad(tmp_path, methods, **changes)()
    assert list(tmp_path.iterdir()) == []


def test_bad_folders(methods, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a holds no video"):
        bad(tmp_path, methods, methods=(f"A={tmp_path / 'a'}",))()
    write_video(tmp_path / "a" / "M003_happy_1.mp4", sound=False)
    with pytest.raises(UserError, match="A lacks W009_sad_2"):
        bad(tmp_path, methods, methods=(f"A={tmp_path / 'a'}",))()
    with pytest.raises(UserError, match=r"no sound in .*M003_happy_1\.mp4"):
        bad(tmp_path, methods, methods=(f"A={tmp_path / 'a'}",), only=("M003_happy_1",))()
    (tmp_path / "a" / "M003_happy_1.mov").write_bytes(b"")
    with pytest.raises(UserError, match="remove one of them"):
        bad(tmp_path, methods, methods=(f"A={tmp_path / 'a'}",))()
    (tmp_path / "a" / "M003_happy_1.mov").unlink()
    (tmp_path / "a" / "glad.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="intended emotion of glad"):
        find_sources({"A": tmp_path / "a"})
    (tmp_path / "a" / "glad.mp4").rename(tmp_path / "a" / "sad.mp4")
    with pytest.raises(UserError, match="neither an image nor a video"):
        find_sources({"A": tmp_path / "a"})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        bad(tmp_path, methods)()


def test_nothing_is_left_of_a_build_that_fails(methods, tmp_path, monkeypatch):
    monkeypatch.setattr("flowvqtalker_eval.study.page.blind_copy", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bad(tmp_path, methods)()
    assert list(tmp_path.iterdir()) == []
