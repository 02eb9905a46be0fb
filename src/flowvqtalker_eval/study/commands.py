"""``flowvqtalker evaluate study build | serve | export | analyse``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study.page import Build

__all__ = ["Analyse", "Build", "Export", "Serve", "Study"]


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a study's page and keep the answers in SQLite; stop with Ctrl-C."""

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder that `study build` made."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine need a server with HTTPS in front of it."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""

    def run(self) -> None:
        from flowvqtalker_eval.study.server import serve

        serve(self.study, self.host, self.port, lambda address: print(f"{address}?rater=P1", flush=True))


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the answers that a server has kept as .json or .csv."""

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder that `study build` made, or the database itself."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """File to write (.json or .csv)."""

    def run(self) -> None:
        from flowvqtalker.io.atomic import check_output
        from flowvqtalker_eval.study.answers import read_file, write_file

        check_output(self.output, (".json", ".csv"))
        answers, problems = read_file(self.study)
        if not answers:
            raise UserError(f"{self.study} holds no answers ({problems[0]})")
        write_file(answers, self.output)
        print(f"{self.output}: {len(answers)} answers of {len({one.rater for one in answers})} participants")


@dataclass(frozen=True, kw_only=True)
class Analyse:
    """Table 2: means and emotion accuracy with 95 % intervals, Fleiss' kappa, and what was left out."""

    answers: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="ANSWERS")]
    """Databases, downloads of participants (.json, .csv), exports, or study folders."""
    key: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The key.json of the study."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder for table2.md, table2.csv and table2.json."""
    over: Literal["both", "raters", "items"] = "both"
    """What the bootstrap draws anew: raters and items (contents), or one of them."""
    draws: int = 10_000
    """Draws of the bootstrap."""
    seed: int = 0
    """Seed of the draws."""
    allowed_failures: int = 0
    """Attention checks that a participant may fail and still count."""
    against: Annotated[str | None, tyro.conf.arg(metavar="METHOD")] = None
    """Method that the differences are to. Default: the first."""

    def run(self) -> None:
        from flowvqtalker_eval.study.analysis import analyse
        from flowvqtalker_eval.study.answers import collect
        from flowvqtalker_eval.study.key import Key
        from flowvqtalker_eval.study.report import as_markdown, write_reports

        if not self.answers:
            raise UserError("no answers were given; name the database, downloads or the study's folder")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"output {self.output} is a file; give a folder")
        key = Key.load(self.key)
        answers, problems = collect(self.answers, key)
        result = analyse(
            answers,
            key,
            problems=problems,
            allowed_failures=self.allowed_failures,
            over=self.over,
            draws=self.draws,
            seed=self.seed,
            against=self.against,
        )
        paths = write_reports(result, self.output)
        print(as_markdown(result))
        print(*paths, sep="\n")


@dataclass(frozen=True)
class Study:
    """A user study as in the paper's Table 2: build a blind page, serve it, export the answers, analyse them."""

    command: Annotated[
        Annotated[Build, tyro.conf.subcommand("build")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Analyse, tyro.conf.subcommand("analyse")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        """Run the chosen command."""
        self.command.run()
