"""The configuration of `saap recover`: which method, on which text, how it is trained."""

import dataclasses
import math
from typing import Annotated, Literal

from saap_jax.checks import (
    Beside,
    Checked,
    Local,
    Names,
    Natural,
    Positive,
    RunName,
    Seed,
    Share,
    at_least,
    check_not_negative,
    check_positive,
    check_ratios,
    check_several,
    number,
)
from saap_jax.config.mesh import SPREAD, MeshConfig
from saap_jax.config.method import EvaluationConfig, Length
from saap_jax.types import AttentionPath, Remat

Matrix = Literal["query", "key", "value", "output", "gate", "up", "down"]
Floor = Annotated[float, check_not_negative]
Above = Annotated[float, check_positive]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(Checked):
    """What is trained. See docs/recover.md."""

    PLACE = "method."

    name: Literal["groupwise", "lora", "full"] = "groupwise"
    """`groupwise`: matrices are quantised, and adapters that see one number a group are trained, which merge into the
    zero points. `lora`: plain adapters beside matrices in floats. `full`: all parameters."""
    bits: Positive = 4
    """Of `groupwise`: bits of a weight."""
    group_size: Positive = 32
    """Of `groupwise`: inputs that share scale and zero point; all widths have to be multiples of it."""
    rounding: Literal["nearest", "search"] = "search"
    """Of `groupwise`: `nearest`, or a `search` for the scales that round best."""
    rank: Positive = 8
    """Of adapters: r, their width."""
    scale: Annotated[float, number("a finite number", math.isfinite)] = 16.0
    """Of adapters: η; they are multiplied by η/r."""
    matrices: Annotated[tuple[Matrix, ...], check_several] = ("query", "key", "value", "output", "gate", "up", "down")
    """Of adapters: the matrices that have one (with `groupwise`: that are quantised and have one)."""

    BESIDE = (
        Beside("bits group_size rounding", "--method.name groupwise", lambda config: config.name == "groupwise"),
        Beside("rank scale matrices", "a --method.name with adapters", lambda config: config.name != "full"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingTextConfig(Checked):
    """What is learned from."""

    PLACE = "data."

    sources: Names = ("builtin:reference",)
    """Text sources, of which all tokens are predicted (of a built-in one, the calibration part), and instruction data,
    `instruct:PATH`, of which the responses are."""
    template: Literal["alpaca", "chat"] = "alpaca"
    """What leads to a response: the prompt of Alpaca, or the model's own chat template."""
    length: Length = 256
    """Tokens a row."""
    held_out: Annotated[float, check_ratios] = 0.05
    """Share of the pieces that is not trained on: it says which checkpoint is the best, and when to stop."""
    held_out_rows: Positive = 64
    """The most rows of what is held out that are measured; the rest is not trained on either."""
    seed: Seed = 0
    """Seed of the order of the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Checked):
    """How the trainable parameters are found."""

    PLACE = "training."

    epochs: Positive = 2
    """Times that all rows come."""
    max_steps: Natural = 0
    """The most steps, whatever the epochs; 0: as many as the epochs take."""
    batch_size: Positive = 32
    """Rows a step."""
    microbatch: Positive = 4
    """Rows whose gradients are computed at once, a divisor of `batch_size`; changes speed and memory alone."""
    learning_rate: Above = 1e-4
    """Of Adam, at its highest."""
    warmup: Annotated[int | None, at_least(0)] = None
    """Steps in which it rises from 0; then it falls to 0 along half a cosine. None: a tenth of all, at most 100."""
    clip: Floor = 1.0
    """The largest norm of the gradient; 0: any."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type in which the passes compute; what is trained is float32 in any case."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but matrix products (`dots`), or the whole layer (`full`)."""
    check_every: Positive = 50
    """Steps between checks: the held-out loss, and a checkpoint."""
    patience: Natural = 0
    """Stop after so many checks without a lower held-out loss; 0: never."""
    distillation: Share = 0.0
    """Weight, in [0, 1], of the divergence from the dense model; the loss has the rest."""
    hidden: Floor = 0.0
    """Weight of how far the residual stream behind each layer is from the dense model's, relative to that; beside both.
    Needs a model with as many layers, of the same width."""
    temperature: Above = 2.0
    """What divides the logits before they are compared with the dense model's."""
    seed: Seed = 0
    """Seed of the adapters, and of the order of the rows."""

    BESIDE = (Beside("temperature", "training.distillation above 0", lambda config: config.distillation),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.microbatch:
            said = f"expected a divisor of batch_size {self.batch_size}, got {self.microbatch}"
            raise ValueError(f"training.microbatch: {said}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoverConfig(Checked):
    """Fine-tune a pruned model, and compare it with what it was before and with the dense model."""

    name: RunName = "recover"
    """Name of the run, a directory below `runs`."""
    model: str = "models/pruned"
    """The model to recover: a name, GGUF file or directory, pruned or not."""
    dense: str = "smollm2-135m"
    """The unpruned model to compare with, and to learn from with `training.distillation` and `.hidden`; empty: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters, also of the recovered model's."""
    attention: AttentionPath = "auto"
    """How attention is computed: `plain`, `blocks` or `auto`, as `saap help score` says of
    `model.attention`."""
    out: str = ""
    """Directory of the recovered model; it must not exist. Empty: `model` in the run's directory."""
    method: MethodConfig = MethodConfig()
    data: TrainingTextConfig = TrainingTextConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    mesh: MeshConfig = MeshConfig()
    new_tokens: Annotated[
        int, number("0, or at least 2, because the first one is not timed", lambda count: count == 0 or count > 1)
    ] = 32
    """Tokens that each model decodes to be timed, after a prompt of `evaluation.length` tokens; 0: no timing, and
    nothing that the models write for the report."""
    repeats: Positive = 5
    """Measurements of each model, in turns."""
    runs: Local = "runs"
    """Directory of all runs."""

    BESIDE = (
        Beside("training.distillation training.hidden", "a dense model to learn from", lambda config: config.dense),
        Beside("training.patience", "held-out text, data.held_out above 0,", lambda config: config.data.held_out),
        Beside("repeats", "new_tokens, which are timed,", lambda config: config.new_tokens),
        Beside(SPREAD, "--new-tokens 0, since decoding is timed on one device,", lambda config: not config.new_tokens),
    )
