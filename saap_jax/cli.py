"""The command line, `saap`: reads arguments, shows progress and tables, turns errors into one line and exit code 2."""

import contextlib
import dataclasses
import errno
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from saap_jax.config import CompareConfig, EvaluateConfig, FidelityConfig, ModelConfig, PruneConfig, ScoreConfig

USAGE = """\
saap: structured pruning of LLaMA-family language models in JAX

  saap compare [CONFIG.py]     compare importance estimators on a real model, prune with the best
  saap discover [MODEL]        print the coupled structures of a model
  saap score [CONFIG.py]       score every unit from one calibration pass, keep the scores
  saap prune [CONFIG.py]       prune with one estimator at one ratio, save the smaller model
  saap evaluate [MODEL ...]    perplexity of models, pruned or not
  saap fidelity [CONFIG.py]    judge estimators by the exact effect of removing a unit

A CONFIG.py is a Python file that exports CONFIG; fields given after it, such as --ratios 0.3,
override it, and `saap COMMAND --help` lists them.

Start with `saap compare configs/quickstart.py`."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class UsageError(Exception):
    """Bad words on the command line."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0 when it did its work, 2 for bad input (one line on the error stream)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            console.print(USAGE, markup=False)
            return 0 if words else 2
        if words[0] not in COMMANDS:
            raise UsageError(f"unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}")
        COMMANDS[words[0]](words[1:])
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept, and the same command goes on from there", 130)
    except (ValueError, OSError, UsageError) as error:
        if os.environ.get("SAAP_DEBUG"):
            raise
        return _fail(_one_line(error), 2)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"saap: {message}", file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; nothing half-written was kept: free some space, then run it again"
    return " ".join(str(error).split()) or type(error).__name__


# --- commands ----------------------------------------------------------------------------------------


def compare(words: list[str]) -> None:
    """Run `saap compare`."""
    config, options = _configure("compare", CompareConfig, words, overwrite=True)
    from saap_jax import comparison
    from saap_jax.report import cut_rows, rich_cut_table, rich_table

    with _tracker() as track:
        run = comparison.compare(config, overwrite=options.overwrite, track=track)
    candidates = run.candidates()
    if run.corrupt_lines:
        console.print(f"{run.corrupt_lines} unreadable lines of {run.path / 'metrics.jsonl'} were skipped")
    console.print(rich_table(run.record, candidates))
    if cut_rows(run.record):
        console.print(rich_cut_table(run.record))
    console.print(f"report: {run.path / 'report.html'}   model: {run.path / 'best'}", markup=False)


def discover(words: list[str]) -> None:
    """Run `saap discover`."""
    if set(words) & {"-h", "--help"}:
        console.print("usage: saap discover [MODEL]\n\nPrint the coupled structures of a model.", markup=False)
        return
    if len(words) > 1 or (words and words[0].startswith("-")):
        raise UsageError(f"discover: expected one model, got {' '.join(words)}")
    from saap_jax.discovery import count_parameters, prunable_parameters
    from saap_jax.discovery import discover as structures_of
    from saap_jax.llama import load_model

    name = words[0] if words else ModelConfig().name
    model = load_model(name)
    structures = structures_of(model)
    table = Table(title=f"coupled structures of {name}", title_justify="left")
    for column in ("structure", "members (path, axis)", "units a layer", "units", "parameters a unit"):
        table.add_column(column, justify="right" if column.startswith(("units", "param")) else "left")
    for structure in structures.values():
        members = "\n".join(f"{member.path}, {member.axis}" for member in structure.members)
        units, each = _range(structure.units), _range(structure.parameters_per_unit)
        table.add_row(f"{structure.name} ({structure.axis})", members, units, f"{sum(structure.units):,}", each)
    console.print(table)
    prunable, total = prunable_parameters(structures), count_parameters(model)
    console.print(
        f"{len(model.spec.layers)} layers in {len(model.runs)} runs; {total:,} parameters, "
        f"{prunable:,} of them prunable ({prunable / total:.1%})"
    )


def score(words: list[str]) -> None:
    """Run `saap score`."""
    config, options = _configure("score", ScoreConfig, words, overwrite=True)
    from saap_jax import pipeline
    from saap_jax.report.fusion import rich_fusions
    from saap_jax.report.patterns import rich_patterns
    from saap_jax.report.score_page import find_patterns
    from saap_jax.report.scores import rank_table

    with _tracker() as track:
        run, calibrated = pipeline.score_run(config, overwrite=options.overwrite, track=track)
    for scenario, scores in calibrated.scenarios.items():
        console.print(rank_table(scores, scenario if len(calibrated.scenarios) > 1 else None))
    if any(run.record["fusions"].values()):
        console.print(rich_fusions(run.record["fusions"]))
    if found := find_patterns(run.record, calibrated.scenarios):
        for structure in found.structures:
            console.print(rich_patterns(found, structure))
    console.print(f"report: {run.path / 'report.html'}   scores: {run.path / 'scores.npz'}", markup=False)


def prune(words: list[str]) -> None:
    """Run `saap prune`."""
    config, _ = _configure("prune", PruneConfig, words)
    from saap_jax import pipeline

    with _tracker() as track:
        pruned = pipeline.prune(config, track=track)
    table = Table(title=f"{config.estimator} at {config.ratio:.1%}", title_justify="left", show_header=False)
    asked, actual = pruned.selection.asked, pruned.selection.actual
    table.add_row("prunable parameters removed", f"{actual:.2%} (asked {asked:.2%})")
    table.add_row("parameters", "{:,} -> {:,}".format(*pruned.parameters))
    table.add_row("bytes of weights", "{:,} -> {:,}".format(*pruned.bytes))
    table.add_row("runs of equal layers", str(pruned.runs))
    console.print(table)
    console.print(f"model: {config.out}", markup=False)


def evaluate(words: list[str]) -> None:
    """Run `saap evaluate`."""
    positional, rest = _split(words)
    default = EvaluateConfig(models=tuple(positional)) if positional else EvaluateConfig()
    config, _ = _parse("evaluate [MODEL ...]", default, rest)
    from saap_jax import pipeline

    with _tracker() as track:
        rows = pipeline.evaluate(config, track=track)
    table = Table(title="perplexity", title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("parameters", justify="right")
    for metric in next(iter(rows.values())).ppl:
        table.add_column(metric, justify="right")
    for name, row in rows.items():
        table.add_row(name, f"{row.parameters:,}", *(f"{value:.2f}" for value in row.ppl.values()))
    console.print(table)


def fidelity(words: list[str]) -> None:
    """Run `saap fidelity`."""
    config, options = _configure("fidelity", FidelityConfig, words, overwrite=True)
    from saap_jax import pipeline
    from saap_jax.report import fidelity as report

    with _tracker() as track:
        run, rows, scores, exact = pipeline.judge(config, overwrite=options.overwrite, track=track)
    for scope in ("attention", "mlp", "pooled"):
        console.print(report.rich_fidelity_table(rows, scope))
    files = {
        "fidelity.svg": report.fidelity_scatter(scores, exact, rows),
        "fidelity.md": report.markdown_fidelity(rows),
        "fidelity.csv": report.csv_fidelity(rows),
    }
    for name, text in files.items():
        run.save_text(name, text)
    console.print(f"plots and tables: {', '.join(str(run.path / name) for name in files)}", markup=False)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "compare": compare,
    "discover": discover,
    "score": score,
    "prune": prune,
    "evaluate": evaluate,
    "fidelity": fidelity,
}


# --- arguments ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to this call and not to the experiment."""

    overwrite: bool = False
    """Start anew where the run directory holds a run already."""


def _configure(command: str, kind: type, words: list[str], *, overwrite: bool = False) -> tuple[Any, Any]:
    """Return the configuration of a command: the CONFIG.py named first, if any, with the fields given after it."""
    positional, rest = _split(words)
    if len(positional) > 1:
        raise UsageError(f"{command}: expected at most one configuration file, got {len(positional)}: {positional}")
    default = load_config(positional[0], kind) if positional else kind()
    return _parse(f"{command} [CONFIG.py]", default, rest, Options if overwrite else None)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the words before the first option from the rest."""
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def _parse(command: str, default: Any, words: list[str], options: type | None = None) -> tuple[Any, Any]:
    kind = type(default)
    fields: list[tuple] = [("config", Annotated[kind, tyro.conf.arg(name="")], dataclasses.field(default=default))]
    if options is not None:
        fields.append(("options", Annotated[options, tyro.conf.arg(name="")], dataclasses.field(default=options())))
    arguments = dataclasses.make_dataclass("Arguments", fields)
    parsed = tyro.cli(arguments, args=words, prog=f"saap {command}", description=kind.__doc__)
    return parsed.config, getattr(parsed, "options", None)


def load_config(path: str, kind: type) -> Any:
    """Read CONFIG from a Python file.

    Raises:
        ValueError: the file fails, exports no CONFIG, or one of another kind.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"configuration: expected a Python file, found none at {path}; check the path")
    try:
        exported = runpy.run_path(path)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"configuration {path}: {type(error).__name__}: {error}") from error
    if not isinstance(exported.get("CONFIG"), kind):
        got = type(exported["CONFIG"]).__name__ if "CONFIG" in exported else "none"
        raise ValueError(f"configuration {path}: expected CONFIG of type {kind.__name__}, got {got}")
    return exported["CONFIG"]


# --- progress ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _tracker() -> Iterator[Callable[[str, Iterable[Any], int], Iterator[Any]]]:
    """Yield a `Track` that shows bars with the time left on a terminal, and a line a stage elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def track(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
            start = time.perf_counter()
            if not console.is_terminal:
                console.print(f"{doing}: {total} steps" if total > 1 else f"{doing} ...", markup=False)
            yield from progress.track(items, total=total, description=doing)
            if not console.is_terminal:
                console.print(f"{doing}: done in {time.perf_counter() - start:.1f} s", markup=False)

        yield track


def _range(values: tuple[int, ...]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
