"""What every command needs of the command line: its configuration, from a file and options; and shown progress."""

import contextlib
import dataclasses
import runpy
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


class UsageError(Exception):
    """Bad words on the command line."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to this call and not to the experiment."""

    overwrite: bool = False
    """Start anew where the run directory holds a run already."""
    resume: bool = False
    """Go on with a run that is there (which happens in any case), and fail where there is none."""


def configure(command: str, kind: type, words: list[str], *, overwrite: bool = False) -> tuple[Any, Any]:
    """Return the configuration of a command: the CONFIG.py named first, if any, with the fields given after it."""
    positional, rest = split_words(words)
    if len(positional) > 1:
        raise UsageError(f"{command}: expected at most one configuration file, got {len(positional)}: {positional}")
    default = load_config(positional[0], kind) if positional else kind()
    config, options = parse(f"{command} [CONFIG.py]", default, rest, Options if overwrite else None)
    if options is not None and options.resume:
        if options.overwrite:
            raise UsageError(f"{command}: expected --resume or --overwrite, got both")
        if not (path := Path(config.runs) / config.name / "run.json").exists():
            raise UsageError(
                f"{command}: --resume expected a run at {path.parent}, found none; check --runs and --name"
            )
    return config, options


def model_first(command: str, words: list[str]) -> list[str]:
    """Return the words of `COMMAND [MODEL] [CONFIG.py] …` with the model as an option.

    >>> model_first("recover", ["models/small", "my.py", "--name", "a"])
    ['my.py', '--model', 'models/small', '--name', 'a']
    """
    positional, rest = split_words(words)
    models = [word for word in positional if not word.endswith(".py")]
    if len(models) > 1:
        raise UsageError(f"{command}: expected one model, got {len(models)}: {', '.join(models)}")
    files = [word for word in positional if word.endswith(".py")]
    return [*files, *(["--model", *models] if models else []), *rest]


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the words before the first option from the rest."""
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def parse(command: str, default: Any, words: list[str], options: type | None = None) -> tuple[Any, Any]:
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


class Shown:
    """A `Track` that shows bars with the time left on a terminal, and a line a stage elsewhere."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        start = time.perf_counter()
        if not console.is_terminal:
            console.print(f"{doing}: {total} steps" if total > 1 else f"{doing} ...", markup=False)
        task = self._progress.add_task(doing, total=total, note="")
        yield from self._progress.track(items, total=total, task_id=task)
        if not console.is_terminal:
            console.print(f"{doing}: done in {time.perf_counter() - start:.1f} s", markup=False)

    def note(self, text: str, milestone: bool = False) -> None:
        """Say how it goes: beside the newest bar on a terminal; elsewhere a line, of milestones only."""
        if console.is_terminal and self._progress.task_ids:
            self._progress.update(self._progress.task_ids[-1], note=text)
        elif milestone:
            console.print(text, markup=False)


@contextlib.contextmanager
def show_progress() -> Iterator[Shown]:
    """Show progress while the body runs, by the `Track` that is yielded."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Shown(progress)
