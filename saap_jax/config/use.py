"""The configurations of the commands that use models, pruned or not, and show runs: a dataclass a command."""

import dataclasses
from typing import Annotated, Literal

from saap_jax.checks import (
    Beside,
    Checked,
    Local,
    Names,
    Natural,
    Positive,
    Ratios,
    Seed,
    at_least,
    check_not_negative,
    check_several,
    read_bound,
    read_percent,
)
from saap_jax.config.mesh import SPREAD, MeshConfig
from saap_jax.config.method import Length, WindowsConfig, is_factory
from saap_jax.types import AttentionPath, Remat

Dtype = Literal["float32", "bfloat16"]

WITH_TASKS = ("--tasks", lambda config: config.tasks)
"""What options about tasks need beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksConfig(Checked):
    """Zero-shot tasks: multiple choice from local files, and the tasks of lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Tasks, apart or with commas: a JSON-lines file; a NAME of `zeroshot/NAME.jsonl` below SAAP_DATA; or else a name
    that lm-evaluation-harness knows (extra `eval`)."""
    limit: Natural = 0
    """Items of each task, the first ones; 0 takes all."""
    task_path: str = ""
    """Directory of further harness tasks (YAML files)."""

    BESIDE = (Beside("limit task_path", *WITH_TASKS),)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.task_names
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: expected each once, got {', '.join(names)}")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, each by itself."""
        return tuple(name.strip() for word in self.tasks for name in word.split(",") if name.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedConfig(TasksConfig, WindowsConfig):
    """Texts and tasks, and how models run on them."""

    sources: tuple[str, ...] = ("builtin:reference", "builtin:descriptions")
    """Text sources; of a built-in one, the evaluation part. None after `--sources`, with tasks: no perplexity."""
    dtype: Dtype = "float32"
    """Type of the parameters."""
    attention: AttentionPath = "auto"
    """How attention is computed: `plain`, `blocks` or `auto`, as `saap help score` says of
    `model.attention`."""
    json: str = ""
    """File that the results are written to; empty: none."""

    BESIDE = (Beside("sources", "at least one source, or a task", lambda config: config.sources or config.tasks),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgedConfig):
    """Perplexity of models on texts, and their accuracy on zero-shot tasks."""

    models: Names = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    mesh: MeshConfig = MeshConfig()

    BESIDE = (Beside(SPREAD, "no --tasks, which take one device,", lambda config: not config.tasks),)


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
    max_ppl_increase: Annotated[str, read_percent] = ""
    """How far A's perplexity may be above B's, on every text: `5%`. The estimate itself decides."""
    max_accuracy_drop: Annotated[float | None, check_not_negative] = None
    """How far A's accuracy may be below B's, in points, on each task and over all; needs `tasks`."""
    max_size: Annotated[str, read_bound] = ""
    """The most that A's weights may take in memory: `80%` of B's, or `300MiB`."""
    max_latency: Annotated[str, read_percent] = ""
    """The longest that A's forward pass may take: `105%` of B's. Times vary: leave room for that."""
    max_memory: Annotated[str, read_bound] = ""
    """The most memory that A's forward pass may take, weights included: `90%` of B's, or `2GiB`."""
    repeats: Positive = 7
    """Forward passes timed of each model, in turns, for `max_latency`."""
    task_metric: Literal["auto", "acc", "acc_norm", "exact_match"] = "auto"
    """What of a task is compared; `auto`: `acc`, or else `exact_match`."""

    BESIDE = (
        Beside("max_accuracy_drop task_metric", *WITH_TASKS),
        Beside("max_ppl_increase", "text, --sources,", lambda config: config.sources),
        Beside("repeats", "--max-latency", lambda config: config.max_latency or config.limits),
    )


LIMITS = ("max_ppl_increase", "max_size", "max_latency", "max_memory", "max_accuracy_drop")
"""What can be limited, a field of `AbConfig` each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig(Checked):
    """Continue texts with a model, greedily unless a temperature is given."""

    model: str = "smollm2-135m"
    """The model: a name, GGUF file or directory, pruned or not."""
    prompts: tuple[str, ...] = ()
    """Texts to continue; `-` stands for what comes on standard input."""
    chat: bool = False
    """Take each prompt as what a user says, in the model's chat template."""
    new_tokens: Positive = 64
    """The most tokens that a continuation has."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the most probable token."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum."""
    seed: Seed = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are not part of it, besides the model's own end tokens."""
    batch_size: Positive = 8
    """Prompts continued at once."""
    dtype: Dtype = "float32"
    """Type of the parameters."""

    BESIDE = (Beside("top_k top_p", "a --temperature above 0", lambda config: config.temperature),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompts:
            raise ValueError('prompts: expected one or more texts after the model, such as "Once upon a time", or -')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(Checked):
    """What models cost: parameters, operations, bytes, memory, and the time of prefill and decoding, side by side."""

    models: Names = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    baseline: str = "smollm2-135m"
    """The model that ratios refer to; it is measured too. Empty: the first model."""
    batch_sizes: Annotated[tuple[int, ...], check_several, at_least(1)] = (1,)
    """Rows at once; each is measured."""
    prompt_lengths: Annotated[tuple[int, ...], check_several, at_least(1)] = (128,)
    """Tokens of each row's prompt; each is measured with each batch size."""
    new_tokens: Positive = 32
    """Tokens that are decoded after the prompt."""
    repeats: Positive = 7
    """Measurements of each model, in turns, after one that compiles."""
    dtype: Dtype = "float32"
    """Type of the parameters."""
    json: str = ""
    """File that the result is written to; empty: none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Checked):
    """Does a job fit a machine, and how long does it take? Compiled for the machine, which need not be there."""

    model: str = "llama-2-7b"
    """Name of a known model, a config.json, or a directory that has one."""
    target: str = "v5e-16"
    """Machine: `v5e:4x4` or `v5e-16` (kinds v4, v5e, v5p, v6e, tpu7x), or by arithmetic alone `gpu:h100:8` (also a100,
    h200, b200) and `tpu:8t:256` (also 8i)."""
    task: Literal["score", "evaluate", "recover"] = "score"
    """What is to be done."""
    estimators: Names = ("gate_fisher", "taylor_element", "taylor_element_second", "wanda")
    """Of `score`: the estimators; what they need of the text decides the memory."""
    method: Literal["groupwise", "lora", "full"] = "lora"
    """Of `recover`: the method."""
    examples: Positive = 128
    """Rows of the calibration, evaluation or training text."""
    length: Length = 2048
    """Tokens a row."""
    batch: Natural = 0
    """Rows at once, on all chips together; 0: one for each part that the mesh splits a batch into."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the parameters; statistics and what is trained are float32."""
    attention: AttentionPath = "auto"
    """How attention is computed: `plain`, `blocks` or `auto`, as `saap help score` says of
    `model.attention`."""
    remat: Remat = "full"
    """What the backward pass computes again."""
    mesh: MeshConfig = MeshConfig(fsdp=-1)
    """How the chips are arranged."""
    search: bool = False
    """Find the smallest machine of the target's kind that the job fits, and the fastest way to use it: `mesh`, `batch`
    and `remat`."""
    json: str = ""
    """File that the result is written to; empty: none."""

    BESIDE = (Beside(f"batch remat {SPREAD}", "no --search, which finds them,", lambda config: not config.search),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
    """Write a model for other programs, read it back, and compare its logits with the source's. See docs/prune.md."""

    model: str = ""
    """The model: a name, GGUF file or directory."""
    out: str = ""
    """What to write: a directory, or with format gguf a file; it must not exist."""
    format: Literal["hf", "padded", "ragged", "nas", "gguf", "tunix", "maxtext"] = "hf"
    """`hf`: a plain LLaMA, if all layers are alike. `padded`: a plain LLaMA, widened by zeros. `ragged`: widths as they
    are, with code for transformers. `nas`: MLPs as they are, for vLLM. `gguf`: a file for llama.cpp. `tunix`: as `hf`,
    with what configures Tunix. `maxtext`: a checkpoint of MaxText, with its configuration."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Type of the stored matrices; q8_0 is for gguf alone."""
    teacher: str = ""
    """With format maxtext: the unpruned model, a name, GGUF file or directory, which is exported too, to `OUT/teacher`.
    MaxText's configuration names both."""
    anyway: bool = False
    """With format tunix: write the model although Tunix computes something else with it."""
    dequantize: bool = False
    """Write quantised matrices in `dtype`. Without it, gguf takes those of 4 bits in groups of 32 as they are and
    refuses others; the other formats always dequantise."""

    BESIDE = (
        Beside("dtype", "--format gguf", lambda config: config.dtype != "q8_0" or config.format == "gguf"),
        Beside("anyway", "--format tunix", lambda config: config.format == "tunix"),
        Beside("teacher", "--format maxtext", lambda config: config.format == "maxtext"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(Checked):
    """One page of one run or several, of any kind: tables, figures, intervals, cost; as Markdown and CSV too."""

    runs: tuple[str, ...] = ()
    """Run directories."""
    out: str = ""
    """The page; Markdown and CSV go beside it. Empty: `report.html`, in the run's directory if there is one run, else
    in the working directory."""
    figures: str = ""
    """Directory for each figure as SVG, PNG and PDF, in the size of a paper; empty: none."""
    overwrite: bool = False
    """Replace files even if they are no report and no figure of saap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnterConfig(Checked):
    """Enter a method for the leaderboard: a Python file with METHOD, a chain, and what that needs.

    The model is pruned and judged by the same rules for all (docs/leaderboard.md). The entry is a JSON file beside the
    Python file; a table shows where it stands.
    """

    file: str = ""
    """The Python file, `leaderboard/NAME.py`."""
    ratios: Ratios = (0.5, 0.2)
    """Which of the two tables: shares of the prunable parameters to remove."""
    seeds: Positive = 1
    """How many calibration texts are drawn, each for a model of its own."""
    judge: Annotated[int | None, at_least(0)] = None
    """For the workflow that judges: calibration texts are drawn by this number and windows are those that entrants do
    not see; the JSON file goes to `judged`, a directory beside the file."""
    calibration: str = "builtin:reference"
    """Text to calibrate on. Another one than this makes no entry: nothing but its own kind is in its table."""
    evaluation: str = "builtin:descriptions"
    """Text to evaluate on, likewise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsConfig(Checked):
    """List runs: what they found, how long they took, how much disk they hold. Two or more that are named are compared
    besides."""

    names: tuple[str, ...] = ()
    """Runs: names below `runs`, or directories; none: all below `runs`, and the cache that they share."""
    runs: Local = "runs"
    """Directory of all runs."""
    delete: bool = False
    """Delete the runs that are named: what their commands wrote. `.cache` deletes the cache."""

    BESIDE = (Beside("delete", "names of runs, as in saap runs compare-2 --delete,", lambda config: config.names),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodsConfig(Checked):
    """List the steps, estimators and recipes that chains are made of; with names, what each is."""

    names: tuple[str, ...] = ()
    """Steps, estimators or recipes to describe: options, formula, source, where a recipe differs from its paper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscoverConfig(Checked):
    """Print the coupled structures of a model, or of what a factory returns: (function, params, *inputs)."""

    model: str = "smollm2-135m"
    """A model, or MODULE:FACTORY or FILE.py:FACTORY."""
    drawing: str = ""
    """An .svg file for a picture of parameters, axes and structures; empty: none."""
    details: bool = False
    """Print of a factory's function every member, gate and reason."""

    BESIDE = (Beside("details", "MODULE:FACTORY or FILE.py:FACTORY", lambda config: is_factory(config.model)),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drawing and not self.drawing.endswith(".svg"):
            raise ValueError(f"--drawing: expected the name of an .svg file, got {self.drawing}")
