"""What models are judged on, text and tasks: the configurations of `saap evaluate` and of `saap ab` with its limits."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from saap_jax.config.amounts import read_bound, read_percent, read_points
from saap_jax.config.checks import check_at_least, check_choice, check_seed
from saap_jax.config.mesh import MeshConfig
from saap_jax.types import AttentionPath, Bos

TaskMetric = Literal["auto", "acc", "acc_norm", "exact_match"]
"""Metrics that are 0 or 1 of an item."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Zero-shot tasks: multiple choice from local files, and the tasks of lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Tasks, apart or with commas: a JSON-lines file; a NAME of `zeroshot/NAME.jsonl` below SAAP_DATA; or else a name
    that lm-evaluation-harness knows (extra `eval`)."""
    limit: int = 0
    """Items of each task, the first ones; 0 takes all."""
    task_path: str = ""
    """Directory of further harness tasks (YAML files)."""

    def __post_init__(self) -> None:
        check_at_least("limit", self.limit, 0)
        names = self.task_names
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected each once, got {', '.join(names)}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, each by itself."""
        return tuple(name.strip() for word in self.tasks for name in word.split(",") if name.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedConfig(TasksConfig):
    """Texts and tasks, and how models run on them."""

    sources: tuple[str, ...] = ("builtin:reference", "builtin:descriptions")
    """Text sources; of a built-in one, the evaluation part. None after `--sources`, with tasks: no perplexity."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    attention: AttentionPath = "auto"
    """How attention is computed: `plain`, `blocks`, `splash` or `auto`, as `saap help score` says of
    `model.attention`."""
    windows: int = 24
    """Windows of each text; 0 takes all."""
    length: int = 128
    """Tokens a window; part of the metric's name."""
    bos: Bos = "auto"
    """Whether each window begins with the tokenizer's token for the beginning of text, in place of its last token of
    text: `auto`, where the tokenizer puts one in front of every text; `always`; `never`, as papers have it."""
    batch_size: int = 8
    """Windows evaluated at once, and rows of 128 tokens of tasks."""
    json: str = ""
    """File that the results are written to; empty: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, Literal["float32", "bfloat16"])
        check_choice("bos", self.bos, Bos)
        check_choice("attention", self.attention, AttentionPath)
        if not (self.sources or self.tasks):
            raise ValueError("sources: expected at least one source or task, got none")
        check_at_least("windows", self.windows, 0)
        check_at_least("length", self.length, 2)
        check_at_least("batch_size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgedConfig):
    """Perplexity of models on texts, and their accuracy on zero-shot tasks."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ValueError("models: expected at least one model, got none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbConfig(JudgedConfig):
    """Is model A better than model B on the same text and tasks, by how much, and how sure is that?

    A model is `RUN:CANDIDATE`, `RUN:VARIANT@RATIO` (all its seeds together), `RUN:dense` (the unpruned model of a run),
    or a name, GGUF file or directory. Of two runs, the losses on record are compared and no model is loaded; beside a
    run, the run's text, type and batch size are taken. With limits, A is held against B: exit code 0 if all hold, 1 if
    one is broken.
    """

    a: str = ""
    """Model A."""
    b: str = ""
    """Model B."""
    limits: str = ""
    """A TOML file of limits, or one of the package: `gates/default`, `gates/strict` or `gates/size`; a limit on the
    command line overrides the file's."""
    max_ppl_increase: str = ""
    """How far A's perplexity may be above B's, on every text: `5%`. The estimate itself decides."""
    max_accuracy_drop: float | None = None
    """How far A's accuracy may be below B's, in points, on each task and over all; needs `tasks`."""
    max_size: str = ""
    """The most that A's weights may take in memory: `80%` of B's, or `300MiB`."""
    max_latency: str = ""
    """The longest that A's forward pass may take: `105%` of B's. Times vary: leave room for that."""
    max_memory: str = ""
    """The most memory that A's forward pass may take, weights included: `90%` of B's, or `2GiB`."""
    repeats: int = 7
    """Forward passes timed of each model, in turns, for `max_latency`."""
    task_metric: TaskMetric = "auto"
    """What of a task is compared; `auto`: `acc`, or else `exact_match`."""
    resamples: int = 10_000
    """Bootstrap resamples of each interval."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("task_metric", self.task_metric, TaskMetric)
        check_seed("seed", self.seed)
        check_at_least("resamples", self.resamples, 1)
        check_at_least("repeats", self.repeats, 1)
        for name, read in LIMITS.items():
            if getattr(self, name) not in ("", None):
                read(name, getattr(self, name))


LIMITS: dict[str, Callable[[str, Any], Any]] = {
    "max_ppl_increase": read_percent,
    "max_size": read_bound,
    "max_latency": read_percent,
    "max_memory": read_bound,
    "max_accuracy_drop": read_points,
}
"""What can be limited, a field of `AbConfig` each -> how its value is read."""
