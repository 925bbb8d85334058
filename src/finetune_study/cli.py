"""The command `finetune-study`."""

import contextlib
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console, Group
from rich.table import Column, Table

from finetune_study import config as config_module
from finetune_study import study as study_module
from finetune_study.errors import StudyError
from finetune_study.paths import RESULTS_FOLDER, Results
from finetune_study.study import Study

app = typer.Typer(
    help="Which optimizations fit your GPUs when you fine-tune a language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    list[Path] | None,
    typer.Option(
        "--config", "-c", help="The study's configuration; may be repeated, a later file adds to those before it."
    ),
]
ResultsFolder = Annotated[Path, typer.Option("--results", "-r", help="The study's results.")]

CONFIG = Path(study_module.CONFIG_FILE)
UNLIMITED = 2**16
"""Columns that no table of ours has."""
MIN_WIDTH = 120
"""Columns of a terminal that tables are made for; a narrower one wraps them."""


def _open(config: list[Path] | None, results: Path) -> Study:
    files = config or [CONFIG]
    names = [str(file) for file in files]
    if results != RESULTS_FOLDER and not results.is_dir():
        raise StudyError(
            "There are no such results",
            where="--results",
            given=str(results),
            allowed="the results folder of a study, that Snakemake made",
            do="name it with -r, or leave that out: then it is `results` in the folder where you are",
        )
    return study_module.open_study(config_module.read_all(files), Results(results), ", ".join(names), names)


@app.command()
def plan(config: ConfigFile = None, results: ResultsFolder = RESULTS_FOLDER) -> None:
    """List every run of the study and what became of it, then how many there are of each, with the reason."""
    study = _open(config, results)
    counts: Counter[str] = Counter()
    table = Table(Column("run", overflow="fold"), "state", "techniques")
    for run_id, planned in study.planned.items():
        state = (
            "measured" if run_id in study.recorded
            else f"unsupported: {planned.unsupported}" if planned.unsupported
            else f"implied out of memory by {study.implied[run_id]}" if run_id in study.implied
            else "given up" if run_id in study.given_up
            else "to train"
        )  # fmt: skip
        table.add_row(run_id, state, "+".join(planned.run.parsed_techniques))
        counts[state.partition(" by ")[0] if run_id in study.implied else state] += 1
    # What reads a pipe or a file looks for whole run_ids.
    Console(width=None if sys.stdout.isatty() else UNLIMITED).print(table)
    for state, count in counts.most_common():
        print(f"{count} {state}")
    print(study.summary())


@app.command()
def summary(config: ConfigFile = None, results: ResultsFolder = RESULTS_FOLDER) -> None:
    """Print a short table of all runs, the answer so far, and where the report lies."""
    from finetune_study.cells import cells
    from finetune_study.report import gather
    from finetune_study.report import summary as texts
    from finetune_study.report.tables import summary_text

    study = _open(config, results)
    frame = cells(list(study.planned.values()), study.results, study.config.hardware)
    print(summary_text(frame))
    width = max(MIN_WIDTH, Console().width)
    print(texts.terminal(gather(study.config, frame, study.options), width, colour=sys.stdout.isatty()))
    if study.results.report.exists():
        print(f"report: {study.results.report.absolute()}")


@app.command()
def status(
    config: ConfigFile = None,
    results: ResultsFolder = RESULTS_FOLDER,
    ledger: Annotated[Path | None, typer.Option(help="The executor's ledger.jsonl.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks of `--watch`.", min=1)] = 30,
) -> None:
    """Say how the study stands: runs by status, jobs and why they wait, GPU-hours, the last failures."""
    from rich.live import Live

    from finetune_study import status as status_module

    if ledger is not None and not ledger.is_file():
        raise StudyError(
            "There is no such ledger",
            where="--ledger",
            given=str(ledger),
            allowed="the ledger.jsonl of an executor",
            do=f"leave it out where Snakemake works in this folder: then it is {status_module.LEDGER}",
        )

    def look() -> Group:
        seen = status_module.look(_open(config, results), ledger or status_module.LEDGER)
        return status_module.render(seen)

    console = Console()
    console.print(look(), soft_wrap=True)
    try:
        with Live(console=console, auto_refresh=False) as live:
            while watch:
                time.sleep(every)
                if console.is_terminal:
                    live.update(look(), refresh=True)
                else:  # a log: one look after the other
                    console.print(look(), soft_wrap=True)
    except KeyboardInterrupt:
        return


@app.command()
def export(
    target: Annotated[str, typer.Argument(help="An entry under `models`.")],
    hardware: Annotated[str, typer.Argument(help="An entry under `hardware`.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: export/TARGET_HARDWARE.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(help="Devices; default: where the default recipe was chosen.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes that they are on; default: likewise, or one.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Context; default: likewise.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Another recipe that fits there.")] = None,
    config: ConfigFile = None,
    results: ResultsFolder = RESULTS_FOLDER,
) -> None:
    """Write the recommended recipe for data of your own: settings, training script, resumable sbatch script."""
    from finetune_study import export as exporter
    from finetune_study.cells import cells

    study = _open(config, results)
    frame = cells(list(study.planned.values()), study.results, study.config.hardware)
    one = exporter.choose(study, frame, target, hardware, num_gpus, sequence_length, nodes, recipe)
    for path in exporter.export(study, one, output or Path("export") / f"{target}_{hardware}"):
        print(path)


@app.command()
def figures(
    target: Annotated[str, typer.Argument(help="An entry under `models`.")],
    hardware: Annotated[str, typer.Argument(help="An entry under `hardware`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder.")] = Path("figures"),
    config: ConfigFile = None,
    results: ResultsFolder = RESULTS_FOLDER,
) -> None:
    """Draw the report's figures of one target on one hardware entry as SVG and PNG, from what runs there are."""
    from finetune_study.cells import cells
    from finetune_study.report import draw_pair

    study = _open(config, results)
    frame = cells(list(study.planned.values()), study.results, study.config.hardware)
    for path in draw_pair(study.config, frame, target, hardware, output):
        print(path)


@app.command()
def compare(
    now: Annotated[Path, typer.Argument(help="outcomes.parquet of a study.")],
    earlier: Annotated[Path, typer.Argument(help="outcomes.parquet of an earlier one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the table as CSV.")] = None,
) -> None:
    """Say what got better or worse beyond the noise since an earlier study."""
    from finetune_study import changes

    found = changes.of_files(now, earlier)
    print(changes.text(found))
    if output is not None:
        changes.write(found, output)


@app.command()
def report(config: ConfigFile = None, results: ResultsFolder = RESULTS_FOLDER) -> None:
    """Build outcomes, comparisons and the report from whatever runs there are."""
    study = _open(config, results)
    study_module.report_what_there_is(study)
    print(f"report: {study.results.report.absolute()}")


@app.command()
def prepare(
    run_yaml: Path,
    results: ResultsFolder = RESULTS_FOLDER,
    cache: Annotated[str | None, typer.Option(help="Folder of downloads; default: the results' own.")] = None,
) -> None:
    """Prepare model and data of one run, as `snakemake` does, to repeat it elsewhere."""
    from finetune_study import data, model_source, places
    from finetune_study import run as run_module

    run, where = run_module.load(run_yaml), Results(results)
    places.enter(config_module.Places(cache=cache), where)
    for model, key in ((run.tokenizer, run.tokenizer_key), (run.model, run.model_key)):
        model_source.prepare(model, where.model(key))
    data.prepare(run, run.num_train_samples, where.model(run.tokenizer_key), where.data(run.data_key))


@app.command()
def after_kill(results: ResultsFolder = RESULTS_FOLDER) -> None:
    """Give a run its outcome after SLURM killed its job; the job comes as JSON on standard input."""
    from finetune_study.after_kill import after_kill as conclude

    print(conclude(sys.stdin.read(), Results(results)))


@app.command()
def before_submit(results: ResultsFolder = RESULTS_FOLDER) -> None:
    """Answer which jobs to submit, hold, or take as resolved; the jobs come as JSON on standard input."""
    from finetune_study.before_submit import before_submit as answer

    print(answer(sys.stdin.read(), Results(results)))


@app.command()
def doctor(
    config: ConfigFile = None,
    results: ResultsFolder = RESULTS_FOLDER,
    hardware: Annotated[list[str] | None, typer.Option(help="Only this hardware entry; may be repeated.")] = None,
    jobs: Annotated[bool, typer.Option(help="Submit a short job for each hardware entry.")] = True,
    wait_minutes: Annotated[float, typer.Option(min=0, help="How long a job may wait in the queue.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
    describe: Annotated[
        bool, typer.Option("--describe", help="Write hardware entries for all GPUs of the cluster to FILE.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Argument(help="With --describe. Default: slurm/<name of the cluster>.yaml.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE; else a new one is written beside it.")] = False,
) -> None:
    """Examine the cluster: is all there that the study needs, and if not, how is it mended?"""
    from finetune_study.doctor import command

    files = config or [CONFIG]
    there = not describe or any(file.exists() for file in files)
    raw = config_module.parse(config_module.read_all(files), ", ".join(map(str, files))) if there else None
    is_well = command.run(
        raw,
        Results(results),
        only=hardware or [],
        with_jobs=jobs,
        wait_minutes=wait_minutes,
        as_json=as_json,
        describe=describe,
        file=file,
        force=force,
    )
    sys.exit(0 if is_well else 1)


@app.command()
def predict(
    rows: Annotated[str, typer.Argument(help="File of JSON lines, one row each; `-` for standard input.")],
    cache: Annotated[Path | None, typer.Option(help="Where traces are kept. Default: the user's cache folder.")] = None,
    allow_code: Annotated[
        list[str] | None, typer.Option(help="A `model` of the rows whose own code may be run; may be repeated.")
    ] = None,
) -> None:
    """Predict memory, time and whether it fits, for each JSON line; needs no GPU. docs/predict.md explains the keys."""
    from finetune_study.errors import ConfigError
    from finetune_study.forecast import predict as predictor

    traces = predictor.Traces(cache or predictor.default_cache())
    with contextlib.ExitStack() as stack:
        try:
            # As bytes: a line that is not UTF-8 is one line's error, and nothing but a line feed ends one.
            lines: IO[bytes] = sys.stdin.buffer if rows == "-" else stack.enter_context(Path(rows).open("rb"))
        except OSError as error:
            raise ConfigError("The rows can't be read", where=rows, given=error) from None
        try:
            for line in predictor.answer_lines(lines, traces, allow_code or ()):
                print(line, flush=rows == "-")
            sys.stdout.flush()
        except BrokenPipeError:  # who read has enough; what is left is not to be flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def config_docs(
    folder: Annotated[Path, typer.Argument(help="Where the schema and the README go.")] = Path("config"),
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where a file is out of step.")] = False,
) -> None:
    """Generate config/config.schema.json and config/README.md from the configuration's types."""
    from finetune_study import config_docs as generator

    generator.generate(folder, check=check)


@app.command()
def techniques_docs(
    page: Annotated[Path, typer.Argument(help="Where the page goes.")] = Path("docs/techniques.md"),
    results: Annotated[Path, typer.Option(help="Stored results.")] = Path("benchmarks/results"),
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where the page is out of step.")] = False,
) -> None:
    """Generate docs/techniques.md from the techniques and from what was really run."""
    from finetune_study import techniques_docs as generator

    generator.generate(page, results, check=check)


def main() -> None:
    """The console script: errors of users are messages, not tracebacks."""
    try:
        app()
    except StudyError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
