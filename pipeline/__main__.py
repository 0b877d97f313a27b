"""The command line: `berth …` or `python -m pipeline …`. Exit codes: 0 complete, 2 bad input, 3 resumable, 1 a bug."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.errors import Incomplete, InputError
from pipeline import __version__
from pipeline.config import RunConfig, load_run
from pipeline.console import Screen

EPILOG = """Examples:

    berth run configs/quickstart.yaml

    berth run configs/hotpotqa.yaml --set data=dev.jsonl --limit 20 --out runs/try

    berth validate configs/gsm8k.yaml --show 1

    berth plan configs/hotpotqa.yaml --set model.id=Qwen/Qwen3-8B

    ray job submit --working-dir . -- python -m pipeline run configs/hotpotqa.yaml --set ray.address=auto
"""

app = typer.Typer(
    name="berth",
    epilog=EPILOG.replace("\n\n    ", "\n\n"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
init_app = typer.Typer(help="Start something of your own.", no_args_is_help=True)
app.add_typer(init_app, name="init")

Config = Annotated[Path, typer.Argument(help="Run config, a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a field: --set model.dtype=float16.")]
Limit = Annotated[int | None, typer.Option(min=1, help="First N tasks only.")]
Out = Annotated[str | None, typer.Option(help="Another run folder.")]
Json = Annotated[bool, typer.Option("--json", help="Summary as JSON on stdout; the story goes to stderr.")]
Folder = Annotated[str, typer.Argument(help="Run folder.")]


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"berth {__version__}\n")
        raise typer.Exit


@app.callback()
def berth(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Evaluate language models as ReAct agents: tasks in, Parquet tables out."""


@contextmanager
def spoken(screen: Screen) -> Generator[None]:
    """A person's mistake becomes a message and its exit code; anything else is a bug and shows its traceback."""
    try:
        yield
    except InputError as e:
        screen.error(str(e))
        raise typer.Exit(2) from e
    except Incomplete as e:
        screen.error(str(e))
        raise typer.Exit(3) from e


@app.command(epilog="Example: berth run configs/hotpotqa.yaml --set data=dev.jsonl --retry-failed=infra,tool")
def run(
    config: Config,
    sets: Sets = None,
    limit: Limit = None,
    out: Out = None,
    retry_failed: Annotated[
        str | None,
        typer.Option(help="Do failed rows again: `all`, or types of error as `infra,tool`; their attempts are kept."),
    ] = None,
    force_new: Annotated[
        bool, typer.Option("--force-new", help="Where the folder holds another run, start beside it: DIR-2, DIR-3, …")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a suite, or resume it: repeat the same command. On a finished run it changes nothing."""
    screen = Screen(quiet_stdout=as_json)
    with spoken(screen):
        from pipeline.run import beside, error_types, execute

        retry = error_types(retry_failed)
        prepared = _prepare(screen, load_run(config, sets or (), limit=limit, out=out))
        if force_new:
            prepared = beside(prepared)
        summary = execute(prepared, screen, retry)
        _tell(screen, prepared.config.out, summary, as_json)


@app.command(epilog="Example: berth validate configs/gsm8k.yaml --show 1 --call-tools")
def validate(
    config: Config,
    sets: Sets = None,
    limit: Limit = None,
    out: Out = None,
    show: Annotated[int, typer.Option(help="Print the rendered prompt of the first N tasks.")] = 0,
    call_tools: Annotated[bool, typer.Option("--call-tools", help="Call each tool once.")] = False,
    as_json: Json = False,
) -> None:
    """Check config, suite, rows, tools, scorers, prompt and model; takes no GPU and loads no weights."""
    screen = Screen(quiet_stdout=as_json)
    with spoken(screen):
        from pipeline.show import call_each_tool, facts, show_prompts

        prepared = _prepare(screen, load_run(config, sets or (), limit=limit, out=out))
        show_prompts(screen, prepared, show)
        if call_tools:
            call_each_tool(screen, prepared)
        screen.line("valid", f"{len(prepared.rows.tasks):,} rows can be run")
        if as_json:
            sys.stdout.write(json.dumps(facts(prepared), indent=2) + "\n")


@app.command(epilog="Example: berth plan configs/hotpotqa.yaml --set model.id=Qwen/Qwen3-8B --set data=dev.jsonl")
def plan(config: Config, sets: Sets = None, limit: Limit = None, as_json: Json = False) -> None:
    """Does it fit, how many trajectories at once, how long, at what cost: on this machine's GPUs and on common ones.

    Takes no GPU and reads no weights: a folder with a config.json will do for model.id.
    """
    screen = Screen(quiet_stdout=as_json)
    with spoken(screen):
        from pipeline.hardware import GPUS, local_gpus
        from pipeline.plan import make_plan, show, to_json

        run_config = load_run(config, sets or (), limit=limit)
        screen.line("config", f"suite {run_config.suite}, model {run_config.model.id}")
        found = make_plan(run_config, [*local_gpus(), *GPUS])
        show(screen, found)
        if as_json:
            sys.stdout.write(json.dumps(to_json(found), indent=2, ensure_ascii=False) + "\n")


@app.command(epilog="Example: berth report runs/hotpotqa --json > summary.json")
def report(folder: Folder, as_json: Json = False) -> None:
    """Write summary.json and report.html of a run again, finished or not."""
    screen = Screen(quiet_stdout=as_json)
    with spoken(screen):
        from pipeline.report import write_report
        from pipeline.run import opened

        with opened(folder):
            summary = write_report(folder)
        _tell(screen, folder, summary, as_json)


@app.command(epilog="Example: berth score runs/hotpotqa --scorer f1 --scorer my_scorer:cite")
def score(
    folder: Folder,
    scorer: Annotated[list[str], typer.Option(help="exact_match, f1, numeric_match or module:callable.")],
    as_json: Json = False,
) -> None:
    """Score a finished run again, without a GPU; the new scores stand beside the old ones."""
    screen = Screen(quiet_stdout=as_json)
    with spoken(screen):
        from pipeline.rescore import rescore
        from pipeline.run import opened

        with opened(folder):
            found = rescore(folder, scorer)
        if as_json:
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
        for name, text in found["shown"].items():
            screen.line(name, text)
        screen.line("scores", found["path"])


@init_app.command("suite", epilog="Example: berth init suite acme --data questions.csv")
def init_suite(
    name: Annotated[str, typer.Argument(help="Name of the suite; also its folder.")],
    data: Annotated[Path, typer.Option(help=".jsonl, .parquet or .csv with your questions and answers.")],
) -> None:
    """Write a suite that can be run, from your file of questions and answers."""
    screen = Screen()
    with spoken(screen):
        from pipeline.init import write_suite

        for line in write_suite(name, data):
            screen.line("wrote", line)
        screen.line("next", f"berth validate {name}/run.yaml --show 1")


@app.command(hidden=True)
def schemas(folder: Annotated[Path, typer.Argument()] = Path("schemas")) -> None:
    """Write the JSON Schemas of run config and suite."""
    from pipeline.config import write_schemas

    write_schemas(folder)


def _prepare(screen: Screen, config: RunConfig) -> Any:
    from pipeline.preflight import describe_rejects, prepare

    screen.line("config", f"suite {config.suite}, model {config.model.id}, engine {config.engine}")
    prepared = prepare(config)
    rows, suite = prepared.rows, prepared.suite
    golds = sum(len(task.gold) for task in rows.tasks if task.sample == 0)
    screen.line("suite", f"{suite.config.name} v{suite.config.version}: {len(rows.tasks):,} rows from {suite.data}")
    screen.line("gold", f"self-check: {golds:,} of {golds:,} gold answers score 1.0 in {suite.primary}")
    if rows.rejects:
        screen.error(f"{len(rows.rejects):,} rows are left out:\n{describe_rejects(rows.rejects)}")
    screen.line("prompt", f"{config.agent.format}, tools: {', '.join(tool.name for tool in prepared.tools) or 'none'}")
    return prepared


def _tell(screen: Screen, out: str, summary: dict[str, Any], as_json: bool) -> None:
    from pipeline.show import tell

    tell(screen, out, summary)
    if as_json:
        sys.stdout.write(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
