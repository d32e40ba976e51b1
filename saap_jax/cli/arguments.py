"""What every command needs of the command line: its configuration, from a file and options; shown progress; errors in
one line; and the other processes of its job, if there are any.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from saap_jax.cli.console import console
from saap_jax.cli.failures import UsageError, fail, failed, suggestion
from saap_jax.cli.progress import Shown, showing
from saap_jax.cli.short_help import SHORT, show_short_help
from saap_jax.config.field_types import check_types
from saap_jax.config.method import is_factory
from saap_jax.config.packaged import find_file, is_packaged
from saap_jax.config.traced import for_factory
from saap_jax.runtime import interrupts
from saap_jax.runtime.processes import broadcast, is_primary, join, leave, split_flags
from saap_jax.runtime.python_files import run_file
from saap_jax.runtime.remote import exists, is_remote
from saap_jax.runtime.watch import Watch, start_watch

SPREADING = ("score", "compare", "prune", "recover", "evaluate")
"""Commands that run on many devices, and in many processes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What belongs to this call and not to the experiment."""

    overwrite: bool = False
    """Start anew where the run directory holds a run already."""
    resume: bool = False
    """Go on with a run that is there (which happens in any case), and fail where there is none."""


def configure(
    command: str, kind: type, words: list[str], *, overwrite: bool = False, model: bool = False
) -> tuple[Any, Any]:
    """Return the configuration of a command: the CONFIG named first, if any, with the fields given after it.

    CONFIG is a Python file, or the name of a configuration of the package. A factory of a model of one's own may be
    named beside it; without a CONFIG, what is taken by default is for that. `model` says that one may come before it.
    """
    positional, rest = split_words(model_first(command, words) if model else words)
    of_models = "calibration" in {field.name for field in dataclasses.fields(kind)}
    factories = [word for word in positional if is_factory(word)] if of_models else []
    files = [word for word in positional if word not in factories]
    if len(files) > 1:
        raise UsageError(f"{command}: expected at most one configuration, got {len(files)}: {files}")
    if len(factories) > 1:
        raise UsageError(f"{command}: expected at most one factory, got {len(factories)}: {', '.join(factories)}")
    default = load_config(files[0], kind) if files else for_factory(kind, *factories) if factories else kind()
    if files and factories:
        default = dataclasses.replace(default, model=dataclasses.replace(default.model, name=factories[0]))
    usage = f"{command}{' [FACTORY]' * of_models}{' [MODEL]' * model} [CONFIG]"
    config, options = parse(usage, default, rest, Options if overwrite else None)
    if options is not None and options.resume:
        if options.overwrite:
            raise UsageError(f"{command}: expected --resume or --overwrite, got both")
        run = f"{config.runs.rstrip('/')}/{config.name}" if is_remote(config.runs) else Path(config.runs) / config.name
        if not broadcast(lambda: exists(f"{run}/run.json")):
            raise UsageError(f"{command}: --resume expected a run at {run}, found none; check --runs and --name")
    return config, options


def model_first(command: str, words: list[str]) -> list[str]:
    """Return the words of `COMMAND [MODEL] [CONFIG] …` with the model as an option.

    A CONFIG ends in .py, or is the name of a configuration of the package that no path here has.

    >>> model_first("recover", ["models/small", "my.py", "--name", "a"])
    ['my.py', '--model', 'models/small', '--name', 'a']
    """
    positional, rest = split_words(words)
    files = [word for word in positional if word.endswith(".py") or is_packaged(word)]
    models = [word for word in positional if word not in files]
    if len(models) > 1:
        raise UsageError(f"{command}: expected one model, got {len(models)}: {', '.join(models)}")
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

    def parsed() -> Any:
        return tyro.cli(arguments, args=words, prog=f"saap {command}", description=kind.__doc__)

    if {"-h", "--help"} & set(words) and command.split()[0] in SHORT:
        show_short_help(command, default)
        raise SystemExit(0)
    if "--help-all" in words:
        words = ["--help"]
    if {"-h", "--help"} & set(words):
        found = parsed()
    else:
        with _box() as box:
            try:
                found = parsed()
            except SystemExit as stop:
                if not stop.code:
                    raise
                flags = [*option_names(kind), *(option_names(options) if options else ())]
                raise UsageError(f"{command.split()[0]}: {_refusal(box.getvalue(), words, flags)}") from None
    return found.config, getattr(found, "options", None)


def option_names(kind: type, prefix: str = "--") -> Iterator[str]:
    """Yield the options that set the fields of a configuration, those of its parts by dotted names.

    >>> list(option_names(Options))
    ['--overwrite', '--no-overwrite', '--resume', '--no-resume']
    """
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from option_names(field.type, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}"
            if field.type is bool:
                path, dot, last = f"{prefix}{name}".rpartition(".")
                yield f"{path}.no-{last}" if dot else f"--no-{name}"


@contextlib.contextmanager
def _box() -> Iterator[io.StringIO]:
    """Take what tyro writes on the error stream, in lines that are as long as they need be."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(10**6)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as box:
            yield box
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _refusal(box: str, words: list[str], flags: list[str]) -> str:
    """Return in one line why tyro did not take the words: what it wrote in a box, without frame and helptext."""
    names = [word.partition("=")[0].replace("_", "-") for word in words]
    for name in names:
        if re.match(r"--?[A-Za-z]", name) and name not in flags:
            return f"unrecognised option {name}{suggestion(name, flags)}"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│|╭╮╰╯ ") for line in plain.splitlines()[1:]]  # below the title
    parts = [list(part) for rule, part in itertools.groupby(lines, lambda line: not line.strip("─-")) if not rule]
    reason, about = (parts or [[" ".join(plain.split())]])[0][0], [line for part in parts[1:] for line in part]
    reason = reason.removeprefix("Error parsing ").removesuffix(".").replace("Unrecognized options: ", "unexpected ")
    if nested := re.match(r"config(?:\.(\S+))?: (.*)", reason):
        path = (nested[1] or "").replace("-", "_")
        return nested[2] if nested[2].startswith(path) else f"{path}.{nested[2]}"
    option = reason.partition(":")[0]
    takes = next((line.removeprefix(option).strip() for line in about if line.startswith(f"{option} ")), "")
    return f"{reason}; expected {takes}" if takes else reason


def load_config(path: str, kind: type) -> Any:
    """Read CONFIG from a Python file, or from one of the package by its name.

    Raises:
        ValueError: the file fails, exports no CONFIG, one of another kind, or one with a field of another type.
        FileNotFoundError: there is no such file, and none of that name in the package.
    """
    file = find_file(path, "configuration: expected a Python file")
    try:
        exported = run_file(file)
    except ValueError as error:
        raise ValueError(f"configuration {path}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"configuration {path}: {type(error).__name__}: {error}") from error
    if not isinstance(exported.get("CONFIG"), kind):
        got = type(exported["CONFIG"]).__name__ if "CONFIG" in exported else "none"
        raise ValueError(f"configuration {path}: expected CONFIG of type {kind.__name__}, got {got}")
    try:
        check_types(exported["CONFIG"])
    except ValueError as error:
        raise ValueError(f"configuration {path}: {error}") from None
    return exported["CONFIG"]


# --- processes and errors ----------------------------------------------------------------------------


def run_command(command: str, run: Callable[[list[str]], int | None], words: list[str]) -> int:
    """Run a command, as one of the processes of a job if the words say so; return its exit code.

    Raises:
        UsageError, ValueError, OSError: bad input, in a job of one process. One of several says it by itself and ends,
            and the others within a minute: those that find the same say so too.
    """
    cluster, rest = split_flags(words)
    if cluster is None:
        return run(rest) or 0
    if command not in SPREADING:
        raise UsageError(
            f"{command}: runs in one process; expected no --distributed, which {', '.join(SPREADING)} take"
        )
    if not join(cluster):
        return run(rest) or 0
    interrupts.renew()
    watch = start_watch(cluster.coordinator and cluster.coordinator.rpartition(":")[0])
    console.quiet = not is_primary()
    try:
        code = run(rest) or 0
    except BaseException as error:
        watch.failing(error)
        _end(error, watch)
    watch.leaving()
    leave()
    return code


def _end(error: BaseException, watch: Watch) -> NoReturn:
    """Say what went wrong in one process of a job, and end it, which ends the others too.

    Others may come upon the same and say it too.
    """
    code, interrupted = 1, interrupts.received() or isinstance(error, KeyboardInterrupt)
    if interrupted:
        code = fail(*interrupts.interruption())
    elif isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
    else:
        if os.environ.get("SAAP_DEBUG"):
            traceback.print_exception(error)
        code = failed(error)
    sys.stdout.flush()
    sys.stderr.flush()
    watch.part(interrupted)
    os._exit(code)


def show_progress() -> contextlib.AbstractContextManager[Shown]:
    """Show progress while the body runs, by the `Track` that is yielded."""
    return showing(console)
