"""From the words of a command to its configuration: a CONFIG file and names first, then options, which tyro reads."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from saap_jax.runtime.processes import Cluster
from saap_jax.runtime.sources import run_file
from saap_jax.wings import imported

HELP = {"-h", "--help", "-H", "--help-verbose"}


class Command(NamedTuple):
    """A row of the table of commands."""

    help: str
    config: str
    """`MODULE:CLASS` of its configuration, whose fields are the options."""
    job: str
    """`MODULE:FUNCTION` of what does its work."""
    first: str = ""
    """What its first words are: options that they give, `...` after one that takes several; or CONFIG."""
    options: tuple[type, ...] = ()
    """What else can be said of a call: `RunOptions`, `Written`, `Foretold`, `Distributed`."""


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What belongs to this call and not to the experiment."""

    overwrite: bool = False
    """Start anew where the run directory holds a run already."""
    resume: bool = False
    """Go on with a run that is there (which happens in any case), and fail where there is none."""

    def check(self, config: Any) -> None:
        """Raise ValueError where there is no run to resume."""
        run = Path(config.runs) / config.name
        if self.resume and self.overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        if self.resume and not (run / "run.json").exists():
            raise ValueError(f"--resume expected a run at {run}, found none; check --runs and --name")


@dataclasses.dataclass(frozen=True)
class Written:
    """What is printed in place of the work."""

    print_config: bool = False
    """Print a Python file of the configuration, which the command takes as its CONFIG: `saap compare mine.py`."""


@dataclasses.dataclass(frozen=True)
class Foretold(Written):
    """What is printed in place of the work, of jobs whose work can be counted."""

    dry_run: bool = False
    """Say how much the job does, how long it takes about and how much disk, from a few seconds of measuring."""


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Where the processes of a job meet, see docs/scale.md."""

    distributed: Literal["auto"] | None = None
    """`auto`: as Slurm, Open MPI, a TPU pod or GKE says."""
    coordinator: Annotated[str | None, tyro.conf.arg(name="distributed.coordinator")] = None
    """HOST:PORT of the first process."""
    processes: Annotated[int | None, tyro.conf.arg(name="distributed.processes")] = None
    """How many there are."""
    process: Annotated[int | None, tyro.conf.arg(name="distributed.process")] = None
    """Number of this one, from 0."""

    @property
    def cluster(self) -> Cluster | None:
        """Where they meet; None of a job of one process.

        Raises:
            ValueError: only a part is said.
        """
        given: Any = Cluster(self.coordinator, self.processes, self.process)
        if given == Cluster():
            return given if self.distributed else None
        host, _, port = (self.coordinator or "").rpartition(":")
        if self.distributed or None in given or not host or not port.isdecimal():
            raise ValueError(
                "expected --distributed auto, or all of --distributed.coordinator HOST:PORT --distributed.processes N "
                f"--distributed.process I, got {given}"
            )
        if not 0 <= given.process < given.processes:
            raise ValueError(
                f"--distributed.process: expected a number from 0 to {given.processes - 1}, got {given.process}"
            )
        return given


class Call(NamedTuple):
    """What the words of a command say."""

    config: Any
    options: RunOptions | None
    """None of a command that keeps no run."""
    named: bool
    """Whether a name of the run was typed."""
    print_config: bool
    dry_run: bool
    cluster: Cluster | None


def parse(name: str, command: Command, words: list[str]) -> Call:
    """Read the configuration of a command, what is said of this run of it, and where its processes meet.

    Raises:
        ValueError, FileNotFoundError: bad input.
        SystemExit: tyro has printed help (code 0), or what is wrong with an option (2).
    """
    from saap_jax.cli.words import named_well, options_of  # here and below: `saap --help` needs none of it

    kind = imported(command.config)
    known = options_of(kind) | {name: value for each in command.options for name, value in options_of(each).items()}
    words = named_well(words, known)
    end = next((place for place, word in enumerate(words) if re.match("--?[A-Za-z]", word)), len(words))
    default, given = _first(name, command, kind, words[:end])
    asked = [*given, *words[end:]]
    for option, hint in known.items():
        twice = sum(word.partition("=")[0] == f"--{option}" for word in asked) > 1
        if twice and (f"--{option}" in given or "tuple[" in str(hint)):  # of others the last one counts
            raise ValueError(f"{name}: --{option}: expected once, with all its values behind it, got it twice")
    parts: list[Any] = [("config", Annotated[kind, tyro.conf.arg(name="")], *default)]
    parts += [(each.__name__.lower(), Annotated[each, tyro.conf.arg(name="")], each()) for each in command.options]
    arguments = dataclasses.make_dataclass("Arguments", parts, kw_only=True)
    if HELP & {*words}:
        prog = f"saap {name} {command.first.replace('--', '').upper()}"
    else:
        prog = f"saap {name}"
    about = str(kind.__doc__).partition(">>>")[0]
    try:
        found, left = tyro.cli(
            arguments, args=asked, prog=prog, description=about, compact_help=True,
            return_unknown_args=True,
        )  # fmt: skip
        if left:
            first = command.first.replace("--", "").upper()
            got = " ".join(left)
            raise ValueError(f"expected options, and before them {first}, got {got} in their place")
        said = {type(each): each for each in vars(found).values()}
        options = said.get(RunOptions)
        cluster = said.get(Distributed, Distributed()).cluster
        instead = said.get(Foretold) or said.get(Written)
        getattr(found.config, "check_asked", lambda: None)()
        if options:
            options.check(found.config)
        named = any(word.partition("=")[0] == "--name" for word in words)
        printed, foretold = (getattr(instead, field, False) for field in ("print_config", "dry_run"))
        return Call(found.config, options, named, printed, foretold, cluster)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _first(name: str, command: Command, kind: type, words: list[str]) -> tuple[list[Any], list[str]]:
    """Take the first words for a default configuration, none or one, and for options."""
    if "CONFIG" not in command.first:
        options = []
        rest = list(words)
        for word in command.first.replace("[", "").replace("]", "").split():
            if word == "...":
                options = [*options, *rest]
                rest = []
            elif rest:
                options += [word, rest.pop(0)]
        if rest:
            raise ValueError(f"{name}: expected {command.first.replace('--', '').upper()} first, got {' '.join(words)}")
        return [], options
    from saap_jax.config.jobs import for_factory
    from saap_jax.config.method import is_factory

    plain = "--model" in command.first  # a field of its own; elsewhere only a factory may be named so
    names = [each for each in words
             if (not _is_config(each) if plain else is_factory(each) and not {">", ","} & {*each})]  # fmt: skip
    files = [word for word in words if word not in names]
    chains = []
    if "--methods" in command.first:
        chains = [word for word in files if not _is_config(word)]
    files = [word for word in files if word not in chains]
    if len(files) > 1 or len(names) > 1:
        raise ValueError(f"{name}: expected at most one of each of {command.first}, got {' '.join(words)}")
    options = ["--methods", *chains] if chains else []
    if names and not files and not plain:
        return [for_factory(kind, names[0])], options
    options += ["--model", *names] if names else []
    return [load_config(file, kind) for file in files], options


def _is_config(word: str) -> bool:
    """Say whether a word names a Python file, or a packaged configuration and nothing that lies here."""
    from saap_jax.config.packaged import packaged

    return word.endswith(".py") or (word in packaged() and not Path(word).exists())


def load_config(path: str, kind: type) -> Any:
    """Read CONFIG from a Python file, or from one of the package by its name.

    Raises:
        ValueError: the file fails, exports no CONFIG, one of another kind, or one with a field of another type.
        FileNotFoundError: there is no such file, and none of that name in the package.
    """
    from saap_jax.config.packaged import find_file

    file = find_file(path, "configuration: expected a Python file (model and method are options: --model, --method)")
    try:
        config = run_file(file).get("CONFIG")
        if not isinstance(config, kind):
            raise ValueError(f"expected CONFIG of type {kind.__name__}, got {type(config).__name__}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ValueError):
            said = str(error)
        else:
            said = f"{type(error).__name__}: {error}"
        raise ValueError(f"configuration {path}: {said}") from error
    return config
