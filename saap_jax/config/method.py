"""The parts of configurations that say what is looked at and judged: frozen, keyword-only.

JSON values only, refused early, the value named. What is done on them is said by chains, see `saap_jax.steps`.
"""

import dataclasses
import os
import re
from typing import Annotated, Literal

from tyro.conf import arg

from saap_jax.checks import BYTES, Beside, Checked, Natural, Positive, Seed, at_least, read_bound, read_workload
from saap_jax.types import AttentionPath, Bos

Length = Annotated[int, at_least(2)]

PACKAGED_MODELS = ("smollm2-135m", "gemma3-270m")
"""Models that packages bring, see `saap_jax.llama.files.sources`."""


def is_factory(name: str) -> bool:
    """Say whether a name is `MODULE:FACTORY` or `FILE.py:FACTORY`, and nothing that lies here.

    >>> is_factory("mine.py:problem"), is_factory("package.models:make"), is_factory("smollm2-135m")
    (True, True, False)
    >>> is_factory("gs://bucket/model:v1")
    False
    """
    return bool(re.fullmatch(r".+:[A-Za-z_]\w*", name)) and "://" not in name and not os.path.exists(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """Which model."""

    PLACE = "model."

    name: Annotated[str, arg(name="model", prefix_name=False)] = "smollm2-135m"
    """`smollm2-135m`, `gemma3-270m`, a GGUF file, a directory in Hugging Face format or of a pruned model, or a hub
    name; or a model of your own, traced: `MODULE:FACTORY` or `FILE.py:FACTORY`, where the factory returns a
    `saap_jax.Problem`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters; norms, softmax, losses and statistics are float32 in any case."""
    attention: AttentionPath = "auto"
    """How attention of a model of ours is computed: with all scores in memory (`plain`), or with those of some queries
    at a time (`blocks`); `auto`: plain for rows of up to 2,048 tokens, blocks for longer ones. Changes speed and
    memory; results by rounding alone."""
    norms: bool = False
    """Of a traced model: prune structures too that a norm averages over, such as the residual stream. Its divisor stays
    as it was, so the model's own code gives other outputs for the smaller arrays than the pruned program."""
    refused: bool = False
    """Of a traced model: prune structures too of which its own code does not take fewer units, or computes something
    else with them. The pruned program runs all the same; the own code needs other sizes."""

    BESIDE = (
        Beside("norms refused", "a traced model, MODULE:FACTORY or FILE.py:FACTORY,", lambda config: config.traced),
    )

    @property
    def traced(self) -> bool:
        """Whether the name is that of a factory."""
        return is_factory(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Checked):
    """On which text importance is estimated."""

    PLACE = "calibration."

    scenarios: tuple[str, ...] = ("builtin:reference",)
    """One text source or more, whose scores are kept apart: `SOURCE` or `NAME=SOURCE`, where SOURCE is
    `builtin:reference`, `builtin:descriptions`, `text:PATH`, `jsonl:PATH#FIELD`, …; of a traced model, names of its
    calibration sets, where none stands for all of them."""
    examples: Natural = 32
    """Windows drawn at random from each scenario; of a traced model examples, where 0 takes all of them in order."""
    length: Length = 128
    """Tokens a window."""
    bos: Bos = "auto"
    """Whether each window begins with the tokenizer's token for the beginning of text, in place of its last token of
    text: `auto`, where the tokenizer puts one in front of every text; `always`; `never`, as papers have it."""
    batch_size: Positive = 8
    """Windows a microbatch. Scores do not depend on it; what trains on microbatches, or holds some out, does."""
    seed: Seed = 0
    """Seed of the windows drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsConfig(Checked):
    """What a pruned model may take: the smallest ratio at which all of these hold is found. Each is a percentage of the
    unpruned model's, such as 70%, or an amount; empty: no such target.
    """

    PLACE = "targets."

    parameters: str = ""
    """All parameters, at most: `70%`, `100M`."""
    macs: str = ""
    """Multiply-accumulates of reading the prompts, at most: `70%`, `10G`."""
    weight_bytes: str = ""
    """Bytes of the weights in memory, at most: `70%`, `300MiB`."""
    memory: str = ""
    """Bytes of the weights and of the KV cache of all rows at their full length, at most: `70%`, `2GiB`."""
    peak_memory: str = ""
    """Bytes of weights, cache and temporaries while prompts are read and tokens generated, at most: `70%`, `500MiB`."""
    latency: str = ""
    """Time to read the prompts on this device, at most: `70%`, `250ms`."""
    tokens_per_second: str = ""
    """Tokens generated on this device, all rows together, at least: `150%`, `40`."""
    at: Annotated[str, read_workload] = "1x128"
    """Prompts that are read together, and tokens of each: `8x4096`."""
    repeats: Positive = 5
    """Measurements, of which the median counts."""

    BESIDE = (
        Beside("at", "a target that counts prompts", lambda config: {*config.asked} - {"parameters", "weight_bytes"}),
        Beside("repeats", "a target of time", lambda config: TIMED & {*config.asked}),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, asked in self.asked.items():
            read_bound(f"targets.{name}", asked, *TARGETS[name])

    @property
    def batch(self) -> int:
        """Prompts that are read together."""
        return read_workload("targets.at", self.at)[0]

    @property
    def length(self) -> int:
        """Tokens of each prompt."""
        return read_workload("targets.at", self.at)[1]

    @property
    def asked(self) -> dict[str, str]:
        """The targets that there are, as they were asked for."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name)}


TARGETS: dict[str, tuple[dict[str, float], str]] = {
    "parameters": ({"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}, "100M"),
    "macs": ({"M": 1e6, "G": 1e9, "T": 1e12}, "10G"),
    "weight_bytes": (BYTES, "300MiB"),
    "memory": (BYTES, "2GiB"),
    "peak_memory": (BYTES, "500MiB"),
    "latency": ({"us": 1e-6, "ms": 1e-3, "s": 1.0}, "250ms"),
    "tokens_per_second": ({"": 1.0}, "40"),
}
"""What a model can be pruned to -> units of an amount, and an example of one."""

TIMED = frozenset({"latency", "tokens_per_second"})
MEASURED = TIMED | {"peak_memory"}
"""Targets that are measured on the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowsConfig(Checked):
    """How much text quality is measured on, and how it is cut."""

    windows: Natural = 24
    """Windows (or examples) of each text; 0 takes all."""
    drawn: Annotated[int | None, at_least(0)] = None
    """Seed by which they are drawn over the whole text: one at random from each of as many stretches of equal length.
    None: the first ones, in order."""
    length: Length = 128
    """Tokens a window; part of the metric's name."""
    bos: Bos = "auto"
    """Whether each window begins with the token for the beginning of text, as `calibration.bos` says it."""
    batch_size: Positive = 8
    """Windows evaluated at once, and rows of 128 tokens of tasks; changes speed and memory, not the result."""

    BESIDE = (Beside("drawn", "1 window or more, so many are drawn,", lambda config: config.windows),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(WindowsConfig):
    """On which text quality is measured."""

    PLACE = "evaluation."

    in_domain: str = "builtin:reference"
    """Text of the calibration domain, never the calibration text itself; of a traced model, the name of a held-out set,
    where empty stands for the first."""
    out_of_domain: str = "builtin:descriptions"
    """Text of another domain; of a traced model, another held-out set, the second if there is one and none is named."""
    candidates_at_once: Positive = 4
    """Candidates that are evaluated together, each on those windows; changes speed and, on several devices, memory. The
    more, the more share the layers that all of them leave whole, and the more is lost in a kill."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_domain == self.out_of_domain != "":
            raise ValueError(f"evaluation.out_of_domain: expected another text than in_domain, got {self.in_domain!r}")
