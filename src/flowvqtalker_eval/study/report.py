"""A study's result as Markdown, csv and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowvqtalker_eval.study.analysis import MEASURES, Estimate, Kappa, Result
from flowvqtalker_eval.study.key import CHOICES

__all__ = ["as_csv", "as_json", "as_markdown", "write_reports"]

_OVER = {
    "both": "raters and items (contents) drawn independently",
    "raters": "raters drawn, the items taken as given",
    "items": "items (contents) drawn, the raters taken as given",
}
_KAPPA_NAMES = {
    "emotion": "emotion (8 unordered categories)",
    "lip_sync": "lip-sync (5 unordered categories)",
    "lip_sync_quadratic": "lip-sync (5 ordered categories, quadratic weights)",
    "quality": "image quality (5 unordered categories)",
    "quality_quadratic": "image quality (5 ordered categories, quadratic weights)",
}


def write_reports(result: Result, folder: Path) -> list[Path]:
    """Write ``table2.md``, ``table2.csv`` and ``table2.json`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in (("md", as_markdown(result)), ("csv", as_csv(result)), ("json", as_json(result))):
        paths.append(folder / f"table2.{suffix}")
        part = folder / f".table2.{suffix}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(paths[-1])
    return paths


def as_markdown(result: Result) -> str:
    """Table 2 as the paper prints it (measures down, methods across), and under it what it rests on."""
    measures = [name for name in MEASURES if name in result.methods[0].estimates]
    names = [method.name for method in result.methods]
    lines = ["# User study", ""]
    lines += _row(["", *names]) + _row(["---"] * (len(names) + 1))
    for measure in measures:
        lines += _row(
            [f"{MEASURES[measure]} ↑", *(_show(method.estimates[measure], measure) for method in result.methods)]
        )
    lines += _row(["raters", *(str(method.raters) for method in result.methods)])
    lines += _row(["clips", *(str(method.clips) for method in result.methods)])
    lines += _row(["answers", *(str(method.estimates["quality"].answers) for method in result.methods)])
    settings = result.settings
    lines += [
        "",
        f"Mean over all answers [95 % interval]: percentile bootstrap, {_OVER[str(settings['over'])]}, "
        f"{settings['draws']} draws, seed {settings['seed']}. Ratings from 1 (worst) to 5 (best); "
        "Acc_emo: share of answers that name the intended one of eight emotions (chance 12.5 %).",
        "",
    ]
    if len(names) > 1:
        lines += [f"## Difference to {result.against}", ""]
        others = [method for method in result.methods if method.differences]
        lines += _row(["", *(method.name for method in others)]) + _row(["---"] * (len(others) + 1))
        for measure in measures:
            cells = [_show(method.differences[measure], measure, signed=True) for method in others]
            lines += _row([MEASURES[measure], *cells])
        lines += ["", "Intervals from the same draws: one that leaves out 0 is a difference at the 5 % level.", ""]
    lines += ["## Agreement between raters: Fleiss' kappa", ""]
    lines += _row(["", "all", *names]) + _row(["---"] * (len(names) + 2))
    for name in result.kappas:
        cells = [_kappa(result.kappas[name]), *(_kappa(method.kappas[name]) for method in result.methods)]
        lines += _row([_KAPPA_NAMES[name], *cells])
    lines += ["", "[95 % interval]: percentile bootstrap over clips. Clips with one rater do not count.", ""]
    lines += ["## Answers", "", f"- {len(result.raters)} participants count."]
    for rater, count in result.excluded.items():
        lines.append(f"- {rater} is left out: {count} attention {'check' if count == 1 else 'checks'} failed.")
    if not result.excluded:
        lines.append("- Nobody is left out.")
    if result.unchecked:
        lines.append(f"- Attention checks not all answered, but counted: {', '.join(result.unchecked)}.")
    if result.unplayable:
        lines.append(f"- {result.unplayable} answers say that the clip does not play.")
    lines += [f"- Not used: {problem}." for problem in result.problems]
    return "\n".join(lines) + "\n"


def as_csv(result: Result) -> str:
    """One line for each method and measure, kappas included."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "measure", "value", "low", "high", "answers", "raters", "clips"])
    for method in result.methods:
        for name, one in method.estimates.items():
            numbers = [_number(one.value), _number(one.low), _number(one.high)]
            writer.writerow([method.name, name, *numbers, one.answers, method.raters, method.clips])
    for label, kappas in [("all", result.kappas), *((method.name, method.kappas) for method in result.methods)]:
        for name, kappa in kappas.items():
            numbers = [_number(kappa.value), _number(kappa.low), _number(kappa.high)]
            writer.writerow([label, f"kappa_{name}", *numbers, "", f"{kappa.raters:.2f}", kappa.clips])
    return buffer.getvalue()


def as_json(result: Result) -> str:
    """Everything, with null where a number is not defined."""
    content = {
        "study": result.key.study,
        "title": result.key.title,
        "settings": result.settings,
        "against": result.against,
        "emotions": CHOICES,
        "methods": [asdict(method) for method in result.methods],
        "kappas": {name: asdict(kappa) for name, kappa in result.kappas.items()},
        "raters": result.raters,
        "excluded": result.excluded,
        "unchecked": result.unchecked,
        "unplayable": result.unplayable,
        "problems": result.problems,
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _row(cells: list[str]) -> list[str]:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return [f"| {' | '.join(escaped)} |"]


def _show(one: Estimate, measure: str, signed: bool = False) -> str:
    if not math.isfinite(one.value):
        return "n/a"
    scale, digits, unit = (100, 1, " %") if measure == "emotion" else (1, 2, "")
    sign = "+" if signed else ""
    unit = " points" if signed and unit else unit
    value, low, high = (f"{number * scale:{sign}.{digits}f}" for number in (one.value, one.low, one.high))
    return f"{value}{unit} [{low}, {high}]"


def _kappa(kappa: Kappa) -> str:
    if not math.isfinite(kappa.value):
        return "n/a"
    return f"{kappa.value:.3f} [{kappa.low:.3f}, {kappa.high:.3f}]"


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""
