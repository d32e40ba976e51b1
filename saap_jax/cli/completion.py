"""`saap completion SHELL`: what a shell needs to complete commands, their options, and the names that they take."""

from collections.abc import Sequence

from saap_jax.cli.arguments import SPREADING, Options, option_names
from saap_jax.cli.console import write
from saap_jax.cli.failures import UsageError
from saap_jax.config.jobs import (
    CompareConfig,
    ExportConfig,
    FidelityConfig,
    FrontierConfig,
    ReportConfig,
    ScoreConfig,
    SensitivityConfig,
)
from saap_jax.config.judge import AbConfig, EvaluateConfig
from saap_jax.config.packaged import packaged
from saap_jax.config.plan import PlanConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import RecoverConfig
from saap_jax.config.use import BenchConfig, GenerateConfig
from saap_jax.recipes import recipes
from saap_jax.runtime.processes import FLAGS

USAGE = """\
usage: saap completion bash|zsh|fish

Print what the shell needs to complete commands, options, configurations and recipes; files complete as ever.

  bash   eval "$(saap completion bash)"                   in ~/.bashrc
  zsh    eval "$(saap completion zsh)"                    in ~/.zshrc, after compinit
  fish   saap completion fish > ~/.config/fish/completions/saap.fish"""

CONFIGS = {
    "compare": CompareConfig,
    "score": ScoreConfig,
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "fidelity": FidelityConfig,
    "frontier": FrontierConfig,
    "sensitivity": SensitivityConfig,
    "report": ReportConfig,
    "ab": AbConfig,
    "generate": GenerateConfig,
    "bench": BenchConfig,
    "plan": PlanConfig,
}
"""Command -> its options are the fields of this; other commands have their own."""

OWN = {"discover": ("--drawing", "--details"), "recipes": (), "completion": (), "help": ()}

RESUMED = ("compare", "score", "recover", "fidelity", "frontier", "sensitivity")
"""Commands that keep a run."""


def run(words: list[str], commands: Sequence[str]) -> None:
    """Run `saap completion`.

    Raises:
        UsageError: no shell, or one that is not known.
    """
    if {"-h", "--help"} & set(words):
        write(f"{USAGE}\n")
        return
    if len(words) != 1 or words[0] not in SHELLS:
        raise UsageError(f"completion: expected one of {', '.join(SHELLS)}, got {' '.join(words) or 'none'}")
    write(SHELLS[words[0]](completions([*commands, "help"])))


def completions(commands: Sequence[str]) -> dict[str, list[str]]:
    """Return the words that may follow each command: its options, and the names that it takes."""
    found: dict[str, list[str]] = {}
    for command in commands:
        kind = CONFIGS.get(command)
        words = [*option_names(kind), "--help-all"] if kind else [*OWN[command]]
        words += [*option_names(Options)] if command in RESUMED else []
        words += [*FLAGS] if command in SPREADING else []
        names = {"recipes": [*recipes()], "help": [name for name in commands if name != command]}.get(command, [])
        names += [*SHELLS] if command == "completion" else []
        found[command] = [*names, *_configurations(command), *words, "--help"]
    return found


def _configurations(command: str) -> list[str]:
    """Return the packaged configurations of a command, which say of which class they are."""
    if command not in CONFIGS:
        return []
    return [name for name, path in packaged().items() if f"CONFIG = {CONFIGS[command].__name__}(" in path.read_text()]


def _bash(words: dict[str, list[str]]) -> str:
    cases = "\n".join(f"    {command}) words='{' '.join(each)}' ;;" for command, each in words.items())
    return f"""\
_saap() {{
  local words current="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '{" ".join(words)} --version --help' -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
    *) words= ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -o bashdefault -F _saap saap
"""


def _zsh(words: dict[str, list[str]]) -> str:
    return f"autoload -Uz bashcompinit && bashcompinit\n{_bash(words)}"


def _fish(words: dict[str, list[str]]) -> str:
    lines = [f"complete -c saap -n __fish_use_subcommand -a '{' '.join(words)}'"]
    for command, each in words.items():
        within = f"complete -c saap -n '__fish_seen_subcommand_from {command}'"
        lines += [f"{within} -a '{word}'" for word in each]
    return "\n".join(lines) + "\n"


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
