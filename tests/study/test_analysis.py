"""The analysis of a user study: published examples of kappa, brute force for the bootstrap, and every bad input."""

from __future__ import annotations

import csv
import itertools
import json
import math

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study.agreement import (
    bootstrap_kappa,
    bootstrap_means,
    fleiss_kappa,
    interval,
    quadratic_weights,
)
from flowvqtalker_eval.study.analysis import analyse
from flowvqtalker_eval.study.answers import Answer, collect, read_file, write_file
from flowvqtalker_eval.study.commands import Analyse
from flowvqtalker_eval.study.key import Key
from flowvqtalker_eval.study.report import as_json, as_markdown, write_reports

from .study_help import answer, answers_of, make_key

# Diagnoses of 30 patients by 6 psychiatrists each: depression, personality disorder, schizophrenia, neurosis, other
# (Fleiss 1971, table 1; kappa 0.430, by category 0.245 0.245 0.520 0.471 0.566).
FLEISS_1971 = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
"""
# The worked example of the encyclopedias: 10 subjects, 14 raters, kappa 0.210.
FOURTEEN = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def fleiss_table() -> np.ndarray:
    return np.array([[int(digit) for digit in row] for row in FLEISS_1971.split()], float)


def test_kappa_of_fleiss_1971():
    counts = fleiss_table()
    assert counts.shape == (30, 5)
    assert set(counts.sum(1)) == {6}
    assert fleiss_kappa(counts) == pytest.approx(0.430, abs=5e-4)
    single = [fleiss_kappa(np.stack([counts[:, k], 6 - counts[:, k]], 1)) for k in range(5)]
    assert single == pytest.approx([0.245, 0.245, 0.520, 0.471, 0.566], abs=5e-4)


def test_kappa_of_fourteen_raters():
    assert fleiss_kappa(np.array(FOURTEEN)) == pytest.approx(0.210, abs=5e-4)


def brute_kappa(counts: np.ndarray, weights: np.ndarray) -> float:
    """Kappa from all pairs of raters of all subjects, and all pairs of categories."""
    observed, shares = [], []
    for row in counts.astype(int):
        answers = [k for k, count in enumerate(row) for _ in range(count)]
        pairs = list(itertools.permutations(range(len(answers)), 2))
        if pairs:
            observed.append(np.mean([weights[answers[a], answers[b]] for a, b in pairs]))
        if answers:
            shares.append(row / row.sum())
    p = np.mean(shares, axis=0)
    chance = sum(p[k] * p[m] * weights[k, m] for k in range(len(p)) for m in range(len(p)))
    return float((np.mean(observed) - chance) / (1 - chance))


@pytest.mark.parametrize("seed", range(4))
def test_kappa_is_that_of_all_pairs(seed):
    counts = np.random.default_rng(seed).multinomial(1, [0.1, 0.2, 0.4, 0.2, 0.1], (7, 9)).sum(1)
    counts[1] = 0  # nobody rated it
    counts[2] = np.eye(5)[seed]  # one did
    counts[3] //= 2
    assert fleiss_kappa(counts) == pytest.approx(brute_kappa(counts, np.eye(5)))
    weights = quadratic_weights(5)
    assert fleiss_kappa(counts, weights) == pytest.approx(brute_kappa(counts, weights))


def test_quadratic_weights():
    assert quadratic_weights(5)[0].tolist() == [1, 15 / 16, 12 / 16, 7 / 16, 0]


def test_kappa_at_its_ends():
    assert fleiss_kappa(np.array([[6, 0], [0, 6]])) == 1
    assert math.isnan(fleiss_kappa(np.array([[6, 0], [6, 0]])))  # nothing could have disagreed
    assert math.isnan(fleiss_kappa(np.array([[1, 0], [0, 1]])))  # one rater each
    assert math.isnan(fleiss_kappa(np.zeros((0, 8))))
    chance = np.random.default_rng(0).multinomial(40, [0.25] * 4, size=500)
    assert abs(fleiss_kappa(chance)) < 0.005


def test_kappa_over_drawn_subjects():
    counts = fleiss_table()
    draws = bootstrap_kappa(counts, 50, seed=3)
    times = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=50)
    expected = [fleiss_kappa(np.repeat(counts, row, axis=0)) for row in times]
    assert draws == pytest.approx(expected)


def incomplete(raters=5, items=4, methods=3, seed=0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 6, (raters, items, methods)).astype(float)
    values[generator.random(values.shape) < 0.3] = np.nan
    return values


@pytest.mark.parametrize("over", ["both", "raters", "items"])
def test_bootstrap_is_that_of_loops(over):
    values = incomplete()
    draws = bootstrap_means(values, 40, seed=1, over=over)
    rng = np.random.default_rng(1)
    raters = rng.multinomial(5, [0.2] * 5, size=40) if over != "items" else np.ones((40, 5), int)
    items = rng.multinomial(4, [0.25] * 4, size=40) if over != "raters" else np.ones((40, 4), int)
    for draw in range(40):
        for method in range(3):
            drawn = [
                values[rater, item, method]
                for rater in np.repeat(np.arange(5), raters[draw])
                for item in np.repeat(np.arange(4), items[draw])
                if np.isfinite(values[rater, item, method])
            ]
            expected = np.mean(drawn) if drawn else np.nan
            assert draws[draw, method] == pytest.approx(expected, nan_ok=True)


def test_bootstrap_of_three_raters_is_the_exact_one():
    values = np.array([1.0, 2.0, 5.0]).reshape(3, 1, 1)
    exact = sorted(np.mean(drawn) for drawn in itertools.product([1, 2, 5], repeat=3))  # all 27 equally likely
    draws = bootstrap_means(values, 40_000, seed=0, over="raters")[:, 0]
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(draws, share) == pytest.approx(np.quantile(exact, share), abs=1e-9)
    assert draws.mean() == pytest.approx(8 / 3, abs=0.02)
    assert draws.std() == pytest.approx(np.std([1, 2, 5]) / np.sqrt(3), rel=0.02)


def test_bootstrap_sees_both_raters_and_items():
    """Values a_r + b_i: the variance of the mean is var(a)/R + var(b)/I, each where its part is drawn."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=30), generator.normal(size=12)
    values = (a[:, None] + b)[..., None]
    parts = {"raters": a.var() / 30, "items": b.var() / 12}
    for over, variance in {**parts, "both": sum(parts.values())}.items():
        assert bootstrap_means(values, 20_000, 0, over).var() == pytest.approx(variance, rel=0.05)


def test_interval():
    values = incomplete()
    assert interval(np.arange(101.0)) == pytest.approx([2.5, 97.5])
    assert np.isnan(interval(np.full(5, np.nan))).all()
    with pytest.raises(UserError, match="choose both, raters or items"):
        bootstrap_means(values, 10, 0, "methods")


def changed(one: Answer, **values: object) -> Answer:
    """The answer with other values, valid or not."""
    return one.model_copy(update=values)


def rate(clip, rater):
    """Method A gets 4 and 5 and the right emotion, B gets 2 and 3 and the right one from the first rater alone."""
    if clip.method == "A":
        return 4, 5, clip.emotion if clip.emotion != "natural" else "neutral"
    return 2, 3, clip.emotion if rater == "P1" and clip.emotion != "natural" else "neutral"


def test_table_two_of_known_answers():
    key = make_key()
    result = analyse(answers_of(key, ["P1", "P2", "P3", "P4"], rate), key, draws=500)
    found, kappas = result.estimates, result.kappas
    first = found.loc[("A", "lip_sync")]
    assert (first["raters"], first["clips"]) == (4, 3)
    assert (first["value"], first["low"], first["high"], first["answers"]) == (4, 4, 4, 12)
    assert found.loc[("A", "quality"), "value"] == 5
    right = found.loc[("A", "emotion")]
    assert (right["value"], right["answers"]) == (1, 8)  # natural does not count
    accuracy = found.loc[("B", "emotion")]
    assert accuracy["value"] == pytest.approx(0.25)
    assert accuracy["low"] == 0
    assert 0.25 < accuracy["high"] < 1
    assert found.loc[("B", "quality"), ["difference", "difference_high"]].tolist() == [-2, -2]
    assert found.loc["A"]["difference"].isna().all()
    assert np.array(result.confusion["B"]).sum() == 8
    assert result.confusion["B"][4][4] == 1  # happy as happy
    assert kappas.loc[("A", "emotion"), ["value", "clips", "raters"]].tolist() == [1, 3, 4]
    assert math.isnan(kappas.loc[("A", "lip_sync"), "value"])  # always 4
    assert kappas.loc[("all", "lip_sync"), "value"] == 1  # 4 for A and 2 for B, from everybody
    assert kappas.loc[("all", "quality_quadratic"), "value"] == pytest.approx(1)
    assert result.excluded == {}


def test_against_another_method():
    key = make_key()
    result = analyse(answers_of(key, ["P1", "P2"], rate), key, draws=100, against="B")
    assert result.estimates.loc[("A", "lip_sync"), "difference"] == 2
    with pytest.raises(UserError, match="no method is called 'C'; choose one of A, B"):
        analyse([], key, against="C")
    with pytest.raises(UserError, match="too few"):
        analyse([], key, draws=10)


def test_attention_checks_exclude():
    key = make_key(checks=2)
    answers = answers_of(key, ["P1", "P2", "P3"], rate)
    checks = [clip.id for clip in key.clips if clip.kind == "check"]
    answers = [changed(one, quality=1) if (one.rater, one.clip) == ("P2", checks[0]) else one for one in answers]
    answers = [one for one in answers if (one.rater, one.clip) != ("P3", checks[1])]
    result = analyse(answers, key, draws=100)
    assert result.excluded == {"P2": 1}
    assert result.raters == ["P1", "P3"]
    assert result.unchecked == ["P3"]
    assert "P2 is left out: 1 attention check failed" in as_markdown(result)
    assert analyse(answers, key, draws=100, allowed_failures=1).raters == ["P1", "P2", "P3"]


def test_nothing_left_is_an_error():
    key = make_key()
    answers = [changed(one, quality=1) for one in answers_of(key, ["P1"], rate)]
    with pytest.raises(UserError, match="1 participants failed the attention checks"):
        analyse(answers, key, draws=100)
    with pytest.raises(UserError, match="no answer can be used: because"):
        analyse([], key, problems=["because"], draws=100)


def test_clips_that_do_not_play_are_counted_apart():
    key = make_key()
    answers = answers_of(key, ["P1", "P2"], rate)
    answers[0] = changed(answers[0], lip_sync=None, quality=None, emotion=None, problem=True)
    result = analyse(answers, key, draws=100)
    assert result.unplayable == 1
    assert result.estimates.loc[("A", "quality"), "answers"] == 5
    assert "1 answers say that the clip does not play" in as_markdown(result)


def test_silent_study_has_no_lip_sync():
    key = make_key(speech=False)
    answers = answers_of(key, ["P1", "P2"], lambda clip, rater: (None, 3, "sad"))
    result = analyse(answers, key, draws=100)
    assert set(result.estimates.index.unique("measure")) == {"quality", "emotion"}
    assert "Lip-sync" not in as_markdown(result)


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_answers_survive_a_file(tmp_path, suffix):
    key = make_key()
    answers = answers_of(key, ["P1", "P2"], rate)
    answers[0] = changed(answers[0], lip_sync=None, quality=None, emotion=None, problem=True)
    path = tmp_path / f"answers.{suffix}"
    write_file(answers, path)
    assert read_file(path) == (answers, [])
    assert collect([path, path], key) == (sorted(answers, key=lambda one: (one.rater, one.clip)), [])


def test_bad_answers_are_listed(tmp_path):
    key = make_key()
    good = answers_of(key, ["P1"], rate)
    bad = [
        changed(good[0], rater="P2", study="other"),
        changed(good[0], rater="P3", clip="ffffffffffff"),
        changed(good[0], rater="P4", quality=None),
        changed(good[0], rater="P5", lip_sync=6),
        changed(good[0], rater="P6", emotion="natural"),
        changed(good[0], rater="P7", seconds=math.nan),
        changed(good[0], rater="P8", position=0),
        changed(good[0], rater="P9", problem=True),
        changed(good[0], quality=1),  # the same revision and time, another value
    ]
    write_file([*good, *bad], tmp_path / "a.csv")
    answers, problems = collect([tmp_path / "a.csv"], key)
    assert {one.rater for one in answers} == {"P1"}
    text = "\n".join(problems)
    for part in (
        "answer 11 cannot be used (lip_sync: Input should be less than or equal to 5)",
        "emotion: Input should be",
        "seconds: Input should be a finite number",
        "position: Input should be greater than or equal to 1",
        "belongs to study other",
        "the study has no clip ffffffffffff",
        "answer 10 cannot be used (Value error, a clip has all its answers",
        "answer 15 cannot be used (Value error, a clip has all its answers",
        "answered twice",
    ):
        assert part in text
    assert len(problems) == len(bad)


def test_two_people_with_one_code(tmp_path):
    key = make_key()
    write_file(answers_of(key, ["P1", "P2"], rate), tmp_path / "a.json")
    other = [changed(one, session="z" * 16, quality=1) for one in answers_of(key, ["P1"], rate)][:2]
    write_file(other, tmp_path / "b.json")
    answers, problems = collect([tmp_path / "a.json", tmp_path / "b.json"], key)
    assert problems == ["P1: two people used this code, 2 clips that both answered are left out"]
    assert len(answers) == 2 * len(key.by_id) - 2


def test_later_change_wins(tmp_path):
    key = make_key()
    clip = next(iter(key.by_id.values()))
    first, second = (answer(key, clip, "P1", 1, value, "sad", revision=value) for value in (1, 2))
    for order in ([first, second], [second, first]):
        write_file(order, tmp_path / "a.json")
        answers, problems = collect([tmp_path / "a.json"], key)
        assert [one.quality for one in answers] == [2]
        assert len(problems) == 1


def test_unreadable_files(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"format": "other"}')
    (tmp_path / "c.csv").write_text("rater,clip\n1,2\n")
    (tmp_path / "d.sqlite").write_bytes(b"no database at all, but long enough to be looked at")
    (tmp_path / "e.json").write_text(json.dumps({"format": "flowvqtalker-study-answers/1", "answers": [{}]}))
    (tmp_path / "f.json").write_text(json.dumps({"format": "flowvqtalker-study-answers/1", "answers": []}))
    for name, part in {
        "a.json": "cannot be read",
        "b.json": "holds no answers of a study",
        "c.csv": "columns answered, emotion",
        "d.sqlite": "cannot be read",
        "e.json": "clip: Field required",
        "f.json": "holds no answer",
    }.items():
        answers, problems = read_file(tmp_path / name)
        assert answers == []
        assert part in problems[0]
    with pytest.raises(UserError, match="does not exist"):
        read_file(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"must end in one of \.sqlite"):
        read_file(__file__)
    with pytest.raises(UserError, match="folder without answers"):
        read_file(tmp_path)


def test_reports(tmp_path):
    key = make_key(methods=("A|1", "B"))
    answers = answers_of(key, ["P1", "P2"], lambda clip, rater: (3, 4, "happy"))
    result = analyse(answers, key, draws=100, problems=["x.json: cannot be read"])
    assert [path.name for path in write_reports(result, tmp_path)] == ["table2.md", "table2.csv", "table2.json"]
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert "|  | A\\|1 | B |" in text
    assert "| Lip-sync ↑ | 3.00 [3.00, 3.00] | 3.00 [3.00, 3.00] |" in text
    assert "| Acc_emo ↑ | 50.0 % [0.0, 100.0] | 50.0 % [0.0, 100.0] |" in text
    assert "n/a" in text  # kappa of answers that never vary
    assert "Not used: x.json: cannot be read." in text
    content = json.loads(as_json(result))
    (kappa,) = (row for row in content["kappas"] if (row["method"], row["measure"]) == ("all", "quality"))
    assert kappa["value"] is None
    assert content["settings"]["over"] == "both"
    with open(tmp_path / "table2.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    (row,) = [row for row in rows if (row["method"], row["measure"]) == ("B", "quality")]
    assert (row["value"], row["answers"], row["raters"], row["clips"]) == ("4", "6", "2", "3")


def test_command(tmp_path, capsys):
    key = make_key()
    key.save(tmp_path / "key.json")
    write_file(answers_of(key, ["P1", "P2"], rate), tmp_path / "a.json")
    shared = {"key": tmp_path, "output": tmp_path / "out", "draws": 200}
    Analyse(answers=(tmp_path / "a.json",), **shared).run()
    printed = capsys.readouterr().out
    assert "| Image quality ↑ | 5.00 [5.00, 5.00] | 3.00 [3.00, 3.00] |" in printed
    assert (tmp_path / "out" / "table2.json").is_file()
    with pytest.raises(UserError, match="no answers were given"):
        Analyse(answers=(), **shared).run()
    with pytest.raises(UserError, match="is a file; give a folder"):
        Analyse(answers=(tmp_path / "a.json",), **{**shared, "output": tmp_path / "a.json"}).run()


def test_keys_that_cannot_be_read(tmp_path):
    key = make_key()
    key.save(tmp_path / "key.json")
    assert Key.load(tmp_path) == key
    assert (tmp_path / "key.json").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="does not exist"):
        Key.load(tmp_path / "none.json")
    content = json.loads((tmp_path / "key.json").read_text())
    for change in ({"format": "x"}, {"clips": 3}, {"methods": ["A"]}, {"clips": [{}]}, {"more": 1}, {"plan": None}):
        (tmp_path / "bad.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=r"bad\.json"):
            Key.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        Key.load(tmp_path / "bad.json")
