"""The command line, `saap`: a table of commands, and what is said where one ends by an error."""

import contextlib
import dataclasses
import difflib
import errno
import itertools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Union

import tyro

from saap_jax.cli.arguments import Call, Command, Distributed, Foretold, RunOptions, Written, parse
from saap_jax.cli.console import console, progress, progress_console, show_blocks, show_lines, visible, write
from saap_jax.errors import Doubt
from saap_jax.runtime import interrupts
from saap_jax.runtime.processes import GONE, LOST, is_primary, join, leave, peer_has_gone, place
from saap_jax.runtime.progress import step
from saap_jax.version import __version__
from saap_jax.wings import imported

DESCRIPTION = """Structured pruning of LLaMA-family language models, and of JAX models, in JAX.

A CONFIG is a Python file that exports CONFIG, or one of the package by its name, as quickstart is; options given after
it override its fields. MODULE:FACTORY or FILE.py:FACTORY names a JAX model of your own. On many devices and hosts:
docs/scale.md. `saap help COMMAND` describes every option. Start with `saap compare quickstart`."""

READER_GONE = 141
"""Exit code where the reader of standard output has gone (`saap ... | head -1`): the one that a shell gives then."""

GRACE = 5.0
"""Seconds that the first of several processes waits, when it has failed, for others to fail likewise."""

_CONFIG = "[MODULE:FACTORY] [CONFIG]"
_SEVERAL = "[MODULE:FACTORY] [CONFIG] [--methods ...]"
_RUN = (RunOptions, Written)
_BOTH = (RunOptions, Written, Distributed)
_ALL = (RunOptions, Foretold, Distributed)

COMMANDS: dict[str, Command] = {
    "compare": Command(
        help="compare pruning methods on a model",
        config="config.jobs:CompareConfig",
        job="jobs.compare:compare",
        first=_SEVERAL,
        options=_ALL,
    ),
    "methods": Command(
        help="list steps, estimators and recipes",
        config="config.use:MethodsConfig",
        job="jobs.methods:methods",
        first="[--names ...]",
    ),
    "discover": Command(
        help="print the coupled structures of a model",
        config="config.use:DiscoverConfig",
        job="trace.command:discover",
        first="[--model]",
    ),
    "score": Command(
        help="score every unit from one pass over text",
        config="config.jobs:ScoreConfig",
        job="jobs.score:score_run",
        first=_CONFIG,
        options=_BOTH,
    ),
    "prune": Command(
        help="prune by one method, save the model",
        config="config.jobs:PruneConfig",
        job="jobs.prune:prune",
        first=_CONFIG,
        options=_ALL[1:],
    ),
    "recover": Command(
        help="fine-tune a pruned model",
        config="config.recover:RecoverConfig",
        job="recovery.command:recover",
        first="[--model] [CONFIG]",
        options=_BOTH,
    ),
    "export": Command(
        help="write a model for other programs",
        config="config.use:ExportConfig",
        job="export.command:export_model",
        first="--model --out",
    ),
    "evaluate": Command(
        help="perplexity of models, accuracy on tasks",
        config="config.use:EvaluateConfig",
        job="jobs.evaluate:evaluate",
        first="[--models ...]",
        options=(Distributed,),
    ),
    "fidelity": Command(
        help="judge estimators by exact removals",
        config="config.jobs:FidelityConfig",
        job="jobs.fidelity:judge",
        first=_CONFIG,
        options=_RUN,
    ),
    "frontier": Command(
        help="the largest ratio within a limit",
        config="config.jobs:FrontierConfig",
        job="contrib.frontier.command:frontier",
        first=_SEVERAL,
        options=_ALL[:2],
    ),
    "sensitivity": Command(
        help="what each layer costs",
        config="config.jobs:SensitivityConfig",
        job="contrib.sensitivity.command:sensitivity",
        first=_CONFIG,
        options=_RUN,
    ),
    "runs": Command(
        help="list, compare and delete runs",
        config="config.use:RunsConfig",
        job="jobs.runs:list_runs",
        first="[--names ...]",
    ),
    "report": Command(
        help="one page of runs, and figures for papers",
        config="config.use:ReportConfig",
        job="jobs.report:report",
        first="--runs ...",
    ),
    "ab": Command(
        help="is model A better than B; with limits, exit code 1",
        config="config.use:AbConfig",
        job="jobs.ab:ab",
        first="--a --b",
    ),
    "generate": Command(
        help="continue texts (- for standard input)",
        config="config.use:GenerateConfig",
        job="contrib.serving.generate:generate",
        first="--model --prompts ...",
    ),
    "bench": Command(
        help="parameters, operations, memory and times",
        config="config.use:BenchConfig",
        job="contrib.serving.bench:bench",
        first="[--models ...]",
    ),
    "enter": Command(
        help="enter a method for the leaderboard",
        config="config.use:EnterConfig",
        job="contrib.leaderboard.enter:enter",
        first="[--file]",
    ),
    "plan": Command(
        help="does a job fit a TPU or GPUs",
        config="config.use:PlanConfig",
        job="planning.command:plan_job",
        first="[--model] [--target]",
    ),
}
"""Each names its configuration and the function that does its work, whose module has `shown` where more than its
result is shown."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit code.

    0: it did its work. 1: `ab` found a limit broken. 2: bad input, one line on the error stream. 3: another process has
    died. 130 and 143: ended by a signal. 141: nobody reads the output any more.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as stop:  # of tyro, which has printed help or what is wrong
        if isinstance(stop.code, int):
            return stop.code
        return 0
    except (KeyboardInterrupt, Exception) as error:
        return fail(error)


def _run(words: list[str]) -> int:
    words = ["--help-verbose" if word == "--help-all" else word for word in words]
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help-verbose"]
    warnings.formatwarning = _formatted
    match words:
        case ["--version" | "-V", *_]:
            show_lines(f"saap {__version__}")
            return 0
        case [name, *rest] if name in COMMANDS:
            return _command(name, rest)
        case [name, *_] if not name.startswith("-") and name != "help":
            near = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown command {name!r}{meant} (saap --help lists all)")
    with contextlib.suppress(SystemExit) if not words else contextlib.nullcontext():
        _parse_alone(["--help"] if words in ([], ["help"], ["--help-verbose"]) else words)
    return 2


def _parse_alone(words: list[str]) -> None:
    """Have tyro answer words without a command: help, `--tyro-print-completion SHELL`."""
    whole = any(word.startswith("--tyro-") for word in words)  # else no configuration has to be imported
    kinds: list[Any] = [
        Annotated[
            imported(command.config) if whole else dataclasses.make_dataclass(name, []),
            tyro.conf.subcommand(name, description=command.help, prefix_name=False),
        ]
        for name, command in COMMANDS.items()
    ]
    tyro.cli(Union[tuple(kinds)], args=words, prog="saap", description=DESCRIPTION)  # type: ignore[arg-type]  # noqa: UP007


def _command(name: str, words: list[str]) -> int:
    """Run a command, as one of the processes of a job if its words say so."""
    command = COMMANDS[name]
    call = parse(name, command, words)
    if call.print_config:
        write(imported("runs.commands:config_file")(call.config))
        return 0
    if call.cluster is None:
        return _work(name, call)
    join(call.cluster)
    interrupts.renew()
    console.quiet = progress_console.quiet = not is_primary()
    try:
        code = _work(name, call)
    except BaseException as error:
        code = fail(error)
        sys.stdout.flush()
        if is_primary():  # jax ends the others once the first has gone: let them come upon the same and say it
            time.sleep(GRACE)
        os._exit(code)
    leave()
    return code


def _work(name: str, call: Call) -> int:
    """Do what a command does, and show what came of it."""
    config = call.config
    options = call.options
    command = COMMANDS[name]
    with progress() as track:
        told = options and "jax" not in sys.modules  # of jobs that tell their stages; it is most of their start
        with step(track, "load the libraries") if told else contextlib.nullcontext():
            job = imported(command.job.partition(":")[0])
            work = imported(command.job)
        if call.dry_run:
            result = imported("jobs.dry_run:dry_run")(config, track=track)
            job = None
        elif options:
            interrupts.goes_on()
            config, result = _run_of_its_own(work, call, track)
        else:
            result = work(config, track=track)
    if isinstance(result, Iterator):  # of texts, as a model writes them
        for text in result:
            write(text)
        return 0
    shown = getattr(job, "shown", None)
    show_blocks(*(shown(config, result) if shown else result))
    return 0 if getattr(result, "held", True) else 1


def _run_of_its_own(job: Any, call: Call, track: Any) -> tuple[Any, Any]:
    """Run a job under the name of its configuration, or where a run of another configuration has that, and no name was
    typed, under it with a number: `compare-2`."""
    from saap_jax.runs.directory import OtherRunError  # jax comes with it

    assert call.options is not None
    config = call.config
    numbers = itertools.count(2)
    overwrite = call.options.overwrite and (call.named or None)  # no other run than its own where no name says so
    while True:
        try:
            return config, job(config, overwrite=overwrite, track=track)
        except OtherRunError:
            if call.named or call.options.resume:
                raise
            config = dataclasses.replace(config, name=f"{call.config.name}-{next(numbers)}")


# --- warnings and errors -------------------------------------------------------------------------


def _formatted(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
    """Say a warning of ours in one line, and others as Python does."""
    if issubclass(category, Doubt):
        return f"saap: {visible(str(message))}\n"
    return _usual(message, category, *place, **line)


_usual = warnings.formatwarning


def fail(error: BaseException) -> int:
    """Say in one line on the error stream why a command failed; return its exit code."""
    if isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError, ValueError):  # give up standard output, without a word
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    line = explained(error)
    code = 2
    if interrupts.received() or isinstance(error, KeyboardInterrupt):
        line, code = interrupts.interruption()
    elif peer_has_gone(error):
        line = GONE
        code = LOST
    elif os.environ.get("SAAP_TRACEBACK"):
        traceback.print_exception(error)
    with contextlib.suppress(BrokenPipeError):
        print(f"saap: {place()}{visible(line)}", file=sys.stderr, flush=True)
    return code


def explained(error: BaseException) -> str:
    """Say an error in one line, and what to do about one that is nobody's input.

    >>> explained(ValueError("ratios: expected numbers,\\n got none"))
    'ratios: expected numbers, got none'
    """
    said = " ".join(str(error).split()) or type(error).__name__
    if len(said) > 2000:
        said = f"{said[:1000]} ... {said[-1000:]}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = ""
        if error.filename:
            where = f" while writing {error.filename}"
        return f"no space left on the disk{where}; nothing half-written was kept: free some space, then run it again"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        return f"out of memory ({said}); take smaller batches, shorter windows, bfloat16, or more devices"
    if isinstance(error, ValueError | OSError):
        return said
    return f"{type(error).__name__}: {said}; nobody foresaw this: SAAP_TRACEBACK=1 shows where, please report it"
