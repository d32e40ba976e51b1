"""The configurations of the commands that use a model, pruned or not: `evaluate`, `generate`, `bench` and `push`."""

import dataclasses
from typing import Literal

from saap_jax.config.checks import check_at_least, check_choice, check_choices, check_seed
from saap_jax.config.mesh import MeshConfig
from saap_jax.types import AttentionPath, Bos


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
class EvaluateConfig(TasksConfig):
    """Perplexity of models on texts, and their accuracy on zero-shot tasks."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    sources: tuple[str, ...] = ("builtin:reference", "builtin:descriptions")
    """Text sources; of a built-in one, the evaluation part. None after `--sources`, with tasks: no perplexity."""
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
    json: str = ""
    """File that the results are written to, with every item of the tasks; empty: none."""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models or not (self.sources or self.tasks):
            raise ValueError("evaluate: expected at least one model, and at least one source or task")
        check_at_least("windows", self.windows, 0)
        check_at_least("length", self.length, 2)
        check_choice("bos", self.bos, Bos)
        check_choice("attention", self.attention, AttentionPath)
        check_at_least("batch_size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue texts with a model, greedily unless a temperature is given."""

    model: str = "smollm2-135m"
    """The model: a name, GGUF file or directory, pruned or not."""
    prompts: tuple[str, ...] = ()
    """Texts to continue; `-` stands for what comes on standard input."""
    chat: bool = False
    """Take each prompt as what a user says, in the model's chat template."""
    max_new_tokens: int = 64
    """The most tokens that a continuation has."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the most probable token."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest most probable tokens whose probabilities reach this sum."""
    seed: int = 0
    """Seed of the draws."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are not part of it, besides the model's own end tokens."""
    batch_size: int = 8
    """Prompts continued at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""

    def __post_init__(self) -> None:
        check_choices("generate", self)
        if not self.prompts:
            raise ValueError('prompts: expected one or more texts after the model, such as "Once upon a time", or -')
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_seed("seed", self.seed)
        check_at_least("batch_size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What models cost: parameters, operations, bytes, memory, and the time of prefill and decoding, side by side."""

    models: tuple[str, ...] = ("smollm2-135m",)
    """Models: names, GGUF files, directories."""
    baseline: str = "smollm2-135m"
    """The model that ratios refer to; it is measured too. Empty: the first model."""
    batch_sizes: tuple[int, ...] = (1,)
    """Rows at once; each is measured."""
    prompt_lengths: tuple[int, ...] = (128,)
    """Tokens of each row's prompt; each is measured with each batch size."""
    new_tokens: int = 32
    """Tokens that are decoded after the prompt."""
    repeats: int = 7
    """Measurements of each model, in turns, after one that compiles."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters."""
    json: str = ""
    """File that the result is written to; empty: none."""

    def __post_init__(self) -> None:
        check_choices("bench", self)
        if not self.models:
            raise ValueError("models: expected at least one model, got none")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models: expected each once, got {', '.join(self.models)}")
        for name in ("batch_sizes", "prompt_lengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected one or more numbers, each once, got {list(values)}")
            check_at_least(name, min(values), 1)
        check_at_least("new_tokens", self.new_tokens, 1)
        check_at_least("repeats", self.repeats, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Put a model directory with its model card into a repository of the Hugging Face hub. See docs/export.md."""

    directory: str = ""
    """Directory of the model. It gets a `README.md`, its card, unless it has one."""
    repository: str = ""
    """`ORGANISATION/NAME`, or `NAME` of your own; made if it is not there. Empty, with `--no-upload`: none."""
    upload: bool = True
    """Without it, the card is written and checked, and nothing is sent."""
    private: bool = False
    """Make the repository one that only you see, if it is not there yet."""
    replace: bool = False
    """Put the model in the place of what the repository holds; its history keeps that."""
