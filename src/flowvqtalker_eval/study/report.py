"""A study's result as Markdown, csv and JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from flowvqtalker_eval.study.analysis import MEASURES, Estimate, Kappa, Result
from flowvqtalker_eval.study.key import CHOICES

__all__ = ["as_csv", "as_json", "as_markdown", "write_reports"]

_OVER = {
    "both": "raters and items (contents) drawn independently",
    "raters": "raters drawn, items fixed",
    "items": "items (contents) drawn, raters fixed",
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
    """Table 2 as the paper prints it (measures down, methods across), followed by what it rests on."""
    methods, settings = result.methods, result.settings
    measures = list(methods[0].estimates)
    names = [method.name for method in methods]
    rows = [[f"{MEASURES[one]} ↑", *(_show(method.estimates[one], one) for method in methods)] for one in measures]
    rows += [[name, *(str(getattr(method, name)) for method in methods)] for name in ("raters", "clips")]
    rows.append(["answers", *(str(method.estimates["quality"].answers) for method in methods)])
    lines = [
        *("# User study", "", *_table(names, rows), ""),
        f"Mean over all answers [95 % interval]: percentile bootstrap, {_OVER[str(settings['over'])]}, "
        f"{settings['draws']} draws, seed {settings['seed']}. Ratings from 1 (worst) to 5 (best); "
        "Acc_emo: share of answers that name the intended one of eight emotions (chance 12.5 %).",
        "",
    ]
    if others := [method for method in methods if method.differences]:
        rows = [[MEASURES[one], *(_show(method.differences[one], one, "+") for method in others)] for one in measures]
        lines += [f"## Difference to {result.against}", "", *_table([method.name for method in others], rows)]
        lines += ["", "Intervals from the same draws: one without 0 is a difference at the 5 % level.", ""]
    groups = [result.kappas, *(method.kappas for method in methods)]
    rows = [[_KAPPA_NAMES[name], *(_kappa(group[name]) for group in groups)] for name in result.kappas]
    lines += ["## Agreement between raters: Fleiss' kappa", "", *_table(["all", *names], rows)]
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
    rows: list[dict[str, Any]] = [
        {"method": method.name, "measure": name, "raters": method.raters, "clips": method.clips, **asdict(one)}
        for method in result.methods
        for name, one in method.estimates.items()
    ]
    for label, kappas in [("all", result.kappas), *((method.name, method.kappas) for method in result.methods)]:
        rows += [{"method": label, "measure": f"kappa_{name}", **asdict(one)} for name, one in kappas.items()]
    columns = ["method", "measure", "value", "low", "high", "answers", "raters", "clips"]
    table = pd.DataFrame(rows, columns=columns).astype({"answers": "Int64", "clips": "Int64"})
    return table.to_csv(index=False, float_format="%.6g")


def as_json(result: Result) -> str:
    """Everything, with null where a number is undefined."""
    return json.dumps(_finite({**asdict(result), "emotions": CHOICES}), indent=1, ensure_ascii=False) + "\n"


def _finite(content: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _table(names: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose first column has no heading."""
    cells = [["", *names], ["---"] * (len(names) + 1), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def _show(one: Estimate, measure: str, sign: str = "") -> str:
    if not math.isfinite(one.value):
        return "n/a"
    scale, digits, unit = (100, 1, " points" if sign else " %") if measure == "emotion" else (1, 2, "")
    value, low, high = (f"{number * scale:{sign}.{digits}f}" for number in (one.value, one.low, one.high))
    return f"{value}{unit} [{low}, {high}]"


def _kappa(kappa: Kappa) -> str:
    return f"{kappa.value:.3f} [{kappa.low:.3f}, {kappa.high:.3f}]" if math.isfinite(kappa.value) else "n/a"
