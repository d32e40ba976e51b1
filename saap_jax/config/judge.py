"""Two models on the same text and tasks: how they compare, and whether one keeps within limits."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from saap_jax.config.amounts import read_bound, read_percent, read_points
from saap_jax.config.checks import check_at_least, check_choice, check_seed
from saap_jax.config.use import TasksConfig
from saap_jax.types import AttentionPath, Bos

TaskMetric = Literal["auto", "acc", "acc_norm", "exact_match"]
"""Metrics that are 0 or 1 of an item."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(TasksConfig):
    """Two models on the same text and tasks. Where one of them is of a run, the run's text, type and batch size are
    taken."""

    sources: tuple[str, ...] = ("builtin:reference", "builtin:descriptions")
    """Text sources; of a built-in one, the evaluation part."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    attention: AttentionPath = "auto"
    """How attention is computed: `plain`, `blocks`, `splash` or `auto`, as `saap score --help-all` says of
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
        if not (self.sources or self.tasks):
            raise ValueError("sources: expected at least one text source, or tasks, got none")
        check_at_least("windows", self.windows, 0)
        check_at_least("length", self.length, 2)
        check_choice("bos", self.bos, Bos)
        check_choice("attention", self.attention, AttentionPath)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("resamples", self.resamples, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbConfig(PairConfig):
    """Is model A better than model B on the same text and tasks, by how much, and how sure is that?

    A model is `RUN:CANDIDATE`, `RUN:VARIANT@RATIO` (all its seeds together), `RUN:dense` (the unpruned model of a run),
    or a name, GGUF file or directory. Of two runs, the losses on record are compared and no model is loaded.
    """

    a: str = ""
    """Model A."""
    b: str = ""
    """Model B."""
    json: str = ""
    """File that the result is written to; empty: none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateConfig(PairConfig):
    """Does a model keep within limits beside a baseline? Exit code 0 if it does, 1 if it does not, 2 for bad input.

    A model is `RUN:CANDIDATE`, `RUN:VARIANT@RATIO` (all its seeds together), `RUN:dense` (the unpruned model of a run),
    or a name, GGUF file or directory. At least one limit has to be given, here or in a file.
    """

    model: str = ""
    """The model to judge."""
    baseline: str = ""
    """The model to judge it by."""
    max_ppl_increase: str = ""
    """How far its perplexity may be above the baseline's, on every text: `5%`. The estimate itself decides."""
    max_size: str = ""
    """The most that its weights may take in memory: `80%` of the baseline's, or `300MiB`."""
    max_latency: str = ""
    """The longest that its forward pass may take: `105%` of the baseline's. Times vary: leave room for that."""
    max_memory: str = ""
    """The most memory that its forward pass may take, weights included: `90%` of the baseline's, or `2GiB`."""
    max_accuracy_drop: float | None = None
    """How far its accuracy may be below the baseline's, in points, on each task and over all; needs `tasks`."""
    limits: str = ""
    """A TOML file of limits, or one of the package: `gates/default`, `gates/strict` or `gates/size`; a limit on the
    command line overrides the file's."""
    repeats: int = 7
    """Forward passes timed of each model, in turns."""
    junit: str = ""
    """File that the outcome is written to as JUnit XML; empty: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
"""What a gate can limit, a field of its configuration each -> how its value is read."""
