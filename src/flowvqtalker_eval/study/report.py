"""A study's result as Markdown, csv and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from flowvqtalker.io.atomic import atomic_path
from flowvqtalker_eval.study.analysis import ALL, MEASURES, Result
from flowvqtalker_eval.study.key import CHOICES

__all__ = ["as_csv", "as_json", "as_markdown", "write_reports"]

_OVER = {
    "both": "raters and items (contents) drawn independently",
    "raters": "raters drawn, items fixed",
    "items": "items (contents) drawn, raters fixed",
}


def write_reports(result: Result, folder: Path) -> list[Path]:
    """Write ``table2.md``, ``table2.csv`` and ``table2.json`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in (("md", as_markdown(result)), ("csv", as_csv(result)), ("json", as_json(result))):
        paths.append(folder / f"table2.{suffix}")
        with atomic_path(paths[-1]) as part:
            part.write_text(text, encoding="utf-8")
    return paths


def as_markdown(result: Result) -> str:
    """Table 2 as the paper prints it (measures down, methods across), followed by what it rests on."""
    estimates, kappas, settings = result.estimates, result.kappas, result.settings
    methods = list(estimates.index.unique("method"))
    measures = [name for name in MEASURES if name in estimates.index.unique("measure")]

    def rows(names: list[str], show: Callable[[str, str], str], mark: str = "") -> list[list[str]]:
        return [[MEASURES[one] + mark, *(show(name, one) for name in names)] for one in measures]

    counts = [
        [count, *(str(estimates.loc[(name, "quality"), count]) for name in methods)]
        for count in ("raters", "clips", "answers")
    ]
    values = rows(methods, lambda method, measure: _show(estimates, method, measure), " ↑")
    lines = [
        *("# User study", "", *_table(methods, values + counts), ""),
        f"Mean over all answers [95 % interval]: percentile bootstrap, {_OVER[str(settings['over'])]}, "
        f"{settings['draws']} draws, seed {settings['seed']}. Ratings from 1 (worst) to 5 (best); "
        "Acc_emo: share of answers that name the intended one of eight emotions (chance 12.5 %).",
        "",
    ]
    if others := [name for name in methods if name != result.against]:
        gaps = rows(others, lambda method, measure: _show(estimates, method, measure, "difference"))
        lines += [f"## Difference to {result.against}", "", *_table(others, gaps), ""]
        lines += ["Intervals from the same draws: one without 0 is a difference at the 5 % level.", ""]
    agreement = [
        [_kappa_name(name), *(_cell(kappas.loc[[(group, name)]], "value", "{:.3f}") for group in (ALL, *methods))]
        for name in kappas.index.unique("measure")
    ]
    lines += ["## Agreement between raters: Fleiss' kappa", "", *_table([ALL, *methods], agreement), ""]
    lines += ["[95 % interval]: percentile bootstrap over clips. Clips with one rater do not count.", ""]
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
    kappas = result.kappas.reset_index()
    kappas["measure"] = "kappa_" + kappas["measure"]
    table = pd.concat([result.estimates.reset_index(), kappas]).astype({"answers": "Int64"})
    return table.to_csv(index=False, float_format="%.6g")


def as_json(result: Result) -> str:
    """Everything, with null where a number is undefined."""
    tables = {
        name: json.loads(getattr(result, name).reset_index().to_json(orient="records"))
        for name in ("estimates", "kappas")
    }
    content = {**asdict(result), **tables, "emotions": CHOICES}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _table(names: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose first column has no heading."""
    cells = [["", *names], ["---"] * (len(names) + 1), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def _show(estimates: pd.DataFrame, method: str, measure: str, name: str = "value") -> str:
    row, sign = estimates.loc[[(method, measure)]], "+" if name == "difference" else ""
    if measure != "emotion":
        return _cell(row, name, f"{{:{sign}.2f}}")
    return _cell(row, name, f"{{:{sign}.1f}}", " points" if sign else " %", 100)


def _cell(row: pd.DataFrame, name: str, form: str, unit: str = "", scale: float = 1) -> str:
    """A number and its interval, from a table of one row."""
    prefix = "" if name == "value" else f"{name}_"
    value, low, high = scale * row[[name, f"{prefix}low", f"{prefix}high"]].to_numpy(float)[0]
    if not math.isfinite(value):
        return "n/a"
    return f"{form.format(value)}{unit} [{form.format(low)}, {form.format(high)}]"


def _kappa_name(measure: str) -> str:
    """For instance ``image quality (5 ordered categories, quadratic weights)``."""
    name = measure.removesuffix("_quadratic")
    if name == "emotion":
        return "emotion (8 unordered categories)"
    kind = "unordered categories" if measure == name else "ordered categories, quadratic weights"
    return f"{MEASURES[name].lower()} (5 {kind})"
