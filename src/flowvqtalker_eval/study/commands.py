"""``flowvqtalker evaluate study build | serve | export | analyse``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flowvqtalker.errors import UserError

__all__ = ["Analyse", "Build", "Export", "Serve", "Study"]


@dataclass(frozen=True, kw_only=True)
class Build:
    """Build the page of a blind study from videos that bear the same names in each method's folder."""

    methods: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="METHOD=FOLDER")]
    """Methods to compare, in the order of the table."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to make: page/ for the participants, key.json for nobody else."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Real videos of the same names, the column GT."""
    emotions: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Csv with the columns name and emotion. Default: the emotion is a word of the name, as in M003_happy_12.mp4."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Names to take, without the ending. Default: all."""
    speech: Literal["yes", "no"] = "yes"
    """Whether the videos speak; no leaves out the question about the lips."""
    per_rater: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Clips each participant rates. Default: all."""
    raters: int = 100
    """Number of different orders: at least as many as participants are expected."""
    checks: int = 1
    """Attention checks, shown to everybody."""
    practice: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Clip to practise with, none of the study's. Default: a drawn face."""
    title: str = "Talking faces"
    """Heading of the page."""
    contact: str = ""
    """Whom participants may ask, for instance an address."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Of names and orders. Default: a new one, kept in the key."""

    def run(self) -> None:
        from tqdm import tqdm

        from flowvqtalker_eval.study.key import KEY_FILE, PAGE_FOLDER
        from flowvqtalker_eval.study.page import build
        from flowvqtalker_eval.study.sources import find_sources, method_folders

        folders = method_folders(self.methods, self.real)
        for file in (self.emotions, self.practice):
            if file is not None and not file.is_file():
                raise UserError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}; check the name")
        speech = self.speech == "yes"
        table = find_sources(folders, self.emotions, self.only, speech)
        with tqdm(desc="study", unit="clip", disable=None, dynamic_ncols=True, leave=False) as bar:

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            key = build(
                table,
                self.output,
                title=self.title,
                contact=self.contact,
                per_rater=self.per_rater,
                raters=self.raters,
                checks=self.checks,
                practice=self.practice,
                speech=speech,
                seed=self.seed,
                progress=advance,
            )
        print(f"{self.output / PAGE_FOLDER / 'index.html'}: {len(key.plan[0])} clips for each participant")
        print(f"{self.output / KEY_FILE}: keep it to yourself, it tells which clip is whose")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a study's page and keep the answers in SQLite; stop with Ctrl-C."""

    study: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder that `study build` made."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine need a server with HTTPS in front of it."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""

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
        from flowvqtalker.io.media import check_output
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
    """Of the draws."""
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
        self.command.run()
