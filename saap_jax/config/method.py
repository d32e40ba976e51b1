"""The parts that configurations are made of: frozen, keyword-only, JSON values only, refused early, value named."""

import dataclasses
import math
import re
from typing import Literal

from saap_jax.config.amounts import BYTES, read_limit
from saap_jax.config.checks import check_at_least, check_choices, check_seed, check_share, meant
from saap_jax.config.registries import ALLOCATIONS, CORRECTIONS
from saap_jax.types import Remat

FusionMethod = Literal["closed_form", "learned", "sampling"]
FusionScope = Literal["global", "structure", "layer"]
RankBy = Literal["score", "score_per_parameter"]
InSequence = Literal["none", "wanda", "obs", "obs_swaps", "leverage"]
LearnRule = Literal["momentum", "sigmoid", "smooth"]
Normalization = Literal["none", "layer_zscore", "structure_mean"]
Solver = Literal["greedy", "exact"]
Device = Literal["any", "tpu", "gpu", "cpu"]
ScenarioReduction = Literal["mean", "max", "min_rank"]
StabilityOver = Literal["examples", "scenarios"]
KeepStatistics = Literal["all", "small", "none"]
Propagate = Literal["dense", "pruned"]


def is_factory(name: str) -> bool:
    """Say whether a name is `MODULE:FACTORY` or `FILE.py:FACTORY`.

    >>> is_factory("mine.py:problem"), is_factory("package.models:make"), is_factory("smollm2-135m")
    (True, True, False)
    """
    return re.fullmatch(r".+:[A-Za-z_]\w*", name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model."""

    name: str = "smollm2-135m"
    """`smollm2-135m`, a GGUF file, a directory in Hugging Face format or of a pruned model, or a hub name; or a model
    of your own, traced: `MODULE:FACTORY` or `FILE.py:FACTORY`, where the factory returns a `saap_jax.Problem`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters; norms, softmax, losses and statistics are float32 in any case."""
    further: tuple[Literal["query_heads", "embed"], ...] = ()
    """Of a model of ours: structures that are scored beside attention and MLP, query heads and channels of the residual
    stream (`embed`); those of which `search` removes a share are in any case."""
    norms: bool = False
    """Of a traced model: prune structures too that a norm averages over, such as the residual stream. Its divisor stays
    as it was, so the model's own code gives other outputs for the smaller arrays than the pruned program."""
    refused: bool = False
    """Of a traced model: prune structures too of which its own code does not take fewer units, or computes something
    else with them. The pruned program runs all the same; the own code needs other sizes."""

    def __post_init__(self) -> None:
        check_choices("model", self)
        if not self.traced and (self.norms or self.refused):
            field = "norms" if self.norms else "refused"
            raise ValueError(
                f"model.{field}: is for traced models, MODULE:FACTORY or FILE.py:FACTORY, got {self.name!r}"
            )
        if self.traced and self.further:
            raise ValueError(
                f"model.further: is for models of ours, got {', '.join(self.further)} for the traced {self.name!r}, "
                "whose structures are those of `saap discover`"
            )

    @property
    def traced(self) -> bool:
        """Whether the name is that of a factory."""
        return is_factory(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """On which text importance is estimated."""

    scenarios: tuple[str, ...] = ("builtin:reference",)
    """One text source or more, whose scores are kept apart: `SOURCE` or `NAME=SOURCE`, where SOURCE is
    `builtin:reference`, `builtin:descriptions`, `text:PATH`, `jsonl:PATH#FIELD`, …; of a traced model, names of its
    calibration sets, where none stands for all of them."""
    examples: int = 32
    """Windows drawn at random from each scenario; of a traced model examples, where 0 takes all of them in order."""
    length: int = 128
    """Tokens a window."""
    batch_size: int = 8
    """Windows a microbatch; changes speed and memory, not the result."""
    seed: int = 0
    """Seed of the windows drawn."""

    def __post_init__(self) -> None:
        check_at_least("calibration.examples", self.examples, 0)
        check_at_least("calibration.length", self.length, 2)
        check_at_least("calibration.batch_size", self.batch_size, 1)
        check_seed("calibration.seed", self.seed)

    def check_text(self) -> None:
        """Raise ValueError unless text is named, and how much of it."""
        if not self.scenarios:
            raise ValueError("calibration.scenarios: expected at least one text source, got none")
        check_at_least("calibration.examples", self.examples, 1)

    def microbatches(self, scenarios: int) -> int:
        """Count the microbatches of some scenarios together."""
        windows = scenarios * self.examples
        return -(-windows // min(self.batch_size, windows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EstimationConfig:
    """How importance is estimated."""

    estimators: tuple[str, ...] = (
        "random",
        "magnitude",
        "taylor_vector",
        "taylor_element",
        "gate_taylor",
        "gate_fisher",
        "wanda",
        "fluctuation",
    )
    """Names, with hyper-parameters in brackets if any: `taylor_element(reduction="max")`. `a+b` fuses the scores of two
    or more, `a/b` scores attention by a and MLP by b, `saap` is the combination that `fusion` names, and
    `FILE.py:FACTORY` is an estimator of your own."""
    remat: Remat = "dots"
    """What the backward pass recomputes: `none`, all but matrix products (`dots`), or the whole layer (`full`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerStructure:
    """One number for each structure."""

    attention: int = 1
    mlp: int = 1

    def __post_init__(self) -> None:
        check_at_least("attention", self.attention, 0)
        check_at_least("mlp", self.mlp, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharePerStructure:
    """One share for each structure."""

    attention: float = 1.0
    mlp: float = 1.0

    def __post_init__(self) -> None:
        check_share("attention", self.attention)
        check_share("mlp", self.mlp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How the scores of several estimators become one."""

    estimators: tuple[str, ...] = ("taylor_element", "gate_taylor", "wanda")
    """What `saap` fuses: two or more names, with hyper-parameters in brackets if any."""
    attention: str = "gate_fisher"
    """What scores attention units in `saap`, since sums over elements say little of heads; empty: the fusion."""
    method: FusionMethod = "closed_form"
    """Where σ comes from: its closed form, gradient steps (`learned`), or the variance over examples (`sampling`)."""
    scope: FusionScope = "structure"
    """Units that share a σ: all, those of a structure, or those of a structure in one layer (`layer`)."""
    scope_constant: bool = False
    """Add Σ log σ of its scope to each score."""

    def __post_init__(self) -> None:
        check_choices("fusion", self)
        if len(set(self.estimators)) < max(2, len(self.estimators)):
            raise ValueError(f"fusion.estimators: expected two or more, each once, got {list(self.estimators)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryHeadsConfig:
    """Query heads that go while their KV heads stay, the same number of each KV head of a layer.

    They go before attention and MLP, ranked over all layers.
    """

    share: float = 0.0
    """Share of the removed parameters that comes from them; 0: KV heads go with all their query heads, or stay so."""
    min_keep: int = 1
    """Query heads that each KV head keeps at least."""

    def __post_init__(self) -> None:
        check_share("search.query_heads.share", self.share)
        check_at_least("search.query_heads.min_keep", self.min_keep, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Channels of the residual stream that go from the whole model, before anything else."""

    share: float = 0.0
    """Share of the removed prunable parameters that comes from them; 0: the model keeps its width."""
    estimator: Literal["gate_fisher", "gate_taylor", "activation"] = "activation"
    """What ranks them: squared or absolute gradients of gates on them, or the mean square that norms hand on."""
    multiple_of: int = 16
    """The width that stays is a multiple of this."""

    def __post_init__(self) -> None:
        check_choices("search.residual", self)
        check_share("search.residual.share", self.share)
        check_at_least("search.residual.multiple_of", self.multiple_of, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Which units go is trained, with all weights as they are, under the exact budget; see `selection.learned`."""

    steps: int = 0
    """Steps of training, from what the search chose, each on a microbatch of the calibration text and as long as three
    forward passes over it. 0: what the search chose stays. A quarter of the text is held out, and says which round was
    the best, the start among them."""
    rate: float = 0.03
    """How far a unit of typical gradient moves in the first step; what is kept and what is gone begin 0.5 apart. Falls
    to 0 as a cosine."""
    rule: LearnRule = "momentum"
    """How derivatives of gates move what a unit is worth: `momentum`, a parameter and by one scale for all units;
    `sigmoid`, by Adam on the logit of a probability, which is the worth; or `smooth`, by Adam through soft gates that
    meet the budget and get sharper."""
    language_loss: float = 0.0
    """Weight of the next-token loss beside the divergence from the unpruned model."""

    def __post_init__(self) -> None:
        check_choices("search.learn", self)
        check_at_least("search.learn.steps", self.steps, 0)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"search.learn.rate: expected a number above 0, got {self.rate}")
        if not (math.isfinite(self.language_loss) and self.language_loss >= 0):
            raise ValueError(f"search.learn.language_loss: expected at least 0, got {self.language_loss}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvolveConfig:
    """How much each layer loses is searched by evolution, under the exact budget; see `selection.evolved`."""

    generations: int = 0
    """From what the search chose on. 0: what it chose stays. A quarter of the text is held out, and says at the end
    whether the outcome is better than the start."""
    offspring: int = 16
    """Children of a generation."""
    survivors: tuple[int, ...] = (4, 1)
    """How many of them each stage of selection leaves; the last one leaves one, of them and their parent."""
    microbatches: tuple[int, ...] = (1, 4)
    """On how many microbatches of the calibration text each stage judges, by the divergence from the unpruned model."""
    quantum: float = 1 / 16
    """Share of a layer's units that a switch moves to another layer, of the same structure; with `depth` all units."""

    def __post_init__(self) -> None:
        check_at_least("search.evolve.generations", self.generations, 0)
        check_at_least("search.evolve.offspring", self.offspring, 1)
        check_share("search.evolve.quantum", self.quantum)
        ends = (self.offspring, *self.survivors)
        if not self.survivors or ends[-1] != 1 or list(ends) != sorted(ends, reverse=True):
            raise ValueError(
                f"search.evolve.survivors: expected ever fewer of {self.offspring} offspring, 1 at last, got "
                f"{' '.join(map(str, self.survivors)) or 'none'}"
            )
        if len(self.microbatches) != len(self.survivors) or min(self.microbatches) < 1:
            raise ValueError(
                "search.evolve.microbatches: expected a number of at least 1 for each of search.evolve.survivors, "
                f"which are {len(self.survivors)}, got {' '.join(map(str, self.microbatches)) or 'none'}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a budget is shared between layers and structures.

    The rules of peers are recipes, see `saap_jax.recipes`.
    """

    allocation: str = "uniform"
    """`uniform`: the same share of each layer; `uniform_floor`: the same, attention rounded down to whole units and
    made up for by MLP channels; `log`: a share that grows with log(layer + 1), rounded alike; `softmax`: a share in
    proportion to e^(-s / `softmax_temperature`) of the mean score s of a layer, rounded alike; `global`: one ranking of
    all units; `adaptive`: one ranking of log score + `stability_weight` · stability indicator; or one that was
    registered in `ALLOCATIONS`."""
    softmax_temperature: float = 0.1
    """ε of `softmax`, in the unit of the scores; the larger, the more alike are the shares."""
    rank_by: RankBy = "score_per_parameter"
    """Key of the one ranking."""
    normalize: Normalization = "none"
    """Before ranking: `layer_zscore` standardises within layer and structure; `structure_mean` divides by the mean."""
    stability_weight: float = 0.25
    """λ of `adaptive`. Above 0 keeps what matters only sometimes; below 0 removes it."""
    stability_over: StabilityOver = "examples"
    """What importance has to be stable over: examples, or the calibration scenarios (two or more)."""
    scenario_reduction: ScenarioReduction = "mean"
    """How the scores of several scenarios become one: `mean`, `max` (what any of them needs is kept), or `min_rank`
    (the best rank: the same free of units)."""
    attention_share: float | None = None
    """Share of the removed parameters that comes from attention; None: the ranking decides."""
    min_keep: PerStructure = PerStructure(attention=1, mlp=1)
    """Units that each layer keeps at least."""
    max_ratio: SharePerStructure = SharePerStructure(attention=1.0, mlp=1.0)
    """Largest share of a layer's units that may go; 0 leaves a structure alone."""
    skip_layers: tuple[int, ...] = ()
    """Layers left alone; negative numbers count from the end."""
    multiple_of: PerStructure = PerStructure(attention=1, mlp=1)
    """Kept widths of pruned layers are multiples of these."""
    device: Device = "any"
    """Widths that suit a device: MLP channels in multiples of 128 (`tpu`), 64 (`gpu`) or 16 (`cpu`), if `multiple_of`
    says nothing of them."""
    max_segments: int | None = None
    """Stretches of neighbouring layers of equal widths that the pruned model has at most; each is compiled apart."""
    max_shapes: int | None = None
    """Different widths (attention and MLP together) that its layers have at most."""
    rescore_every: float | None = None
    """Estimate again whenever this share of the prunable parameters has gone, on the model pruned so far (iterative
    pruning); each time costs one more pass over the calibration text an estimator. None: estimate once."""
    in_sequence: InSequence = "none"
    """Which units of each layer and structure go is chosen again from the first layer to the last, on the activations
    of the model as pruned and compensated so far, by Wanda's score, the optimal brain surgeon's (with swaps behind it
    or without) or ridge leverage; how many is as chosen before. About three passes over the calibration text for each
    ratio."""
    learn: LearnConfig = LearnConfig()
    evolve: EvolveConfig = EvolveConfig()
    min_keep_each: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    """Of a traced model: units that each copy of a structure keeps at least (1 where nothing is said), by name as
    `saap discover` prints it, or by a pattern such as `layers/*/up[1]`."""
    max_ratio_each: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    """Of a traced model: largest share of a structure's units that may go, by name or pattern; 0 leaves it alone."""
    multiple_of_each: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    """Of a traced model: what the width of a pruned structure is a multiple of, by name or pattern."""
    depth: bool = False
    """Remove whole sub-blocks: all units of a layer and structure or none. Needs `min_keep` 0 of that structure."""
    whole_layers: bool = False
    """With `depth`: attention and MLP of a layer go together."""
    query_heads: QueryHeadsConfig = QueryHeadsConfig()
    residual: ResidualConfig = ResidualConfig()
    solver: Solver = "greedy"
    """`exact` minimises the score that is removed, by dynamic programming; for small models only."""

    def __post_init__(self) -> None:
        check_choices("search", self)
        ALLOCATIONS.check("search.allocation", self.allocation)
        if not (math.isfinite(self.softmax_temperature) and self.softmax_temperature > 0):
            raise ValueError(f"search.softmax_temperature: expected a number above 0, got {self.softmax_temperature}")
        if not math.isfinite(self.stability_weight):
            raise ValueError(f"search.stability_weight: expected a finite number, got {self.stability_weight}")
        if self.rescore_every is not None and not 0.001 <= self.rescore_every < 1:
            got = f"{self.rescore_every}{meant(self.rescore_every)}"
            raise ValueError(f"search.rescore_every: expected a share in [0.001, 1) or None, got {got}")
        if self.attention_share is not None:
            check_share("search.attention_share", self.attention_share)
        for name in ("max_segments", "max_shapes"):
            if (most := getattr(self, name)) is not None:
                check_at_least(f"search.{name}", most, 1)
                if self.solver == "exact":
                    raise ValueError(f"search.{name}: expected solver 'greedy' beside it, got 'exact'")
        if min(self.multiple_of.attention, self.multiple_of.mlp) < 1:
            raise ValueError(f"search.multiple_of: expected numbers of at least 1, got {self.multiple_of}")
        allocation = ALLOCATIONS[self.allocation]
        if not allocation.ranks and (self.depth or self.solver == "exact"):
            name, rankings = "depth" if self.depth else "solver 'exact'", "a ranking, 'global' or 'adaptive'"
            raise ValueError(f"search.allocation: {name} needs {rankings}, got {self.allocation!r}")
        plain = allocation.ranks and not allocation.stability and self.rank_by == "score"
        if self.normalize == "layer_zscore" and not plain:
            raise ValueError(
                "search.normalize: 'layer_zscore' makes scores of either sign without a unit, for allocation 'global' "
                f"and rank_by 'score' only, got {self.allocation!r} and {self.rank_by!r}"
            )
        pairs = [(self.min_keep.attention, self.max_ratio.attention), (self.min_keep.mlp, self.max_ratio.mlp)]
        if self.depth and (0, 1) not in pairs:
            raise ValueError(
                f"search.depth: expected a structure with min_keep 0 and max_ratio 1, got {self.min_keep} and "
                f"{self.max_ratio}"
            )
        if self.whole_layers and not (self.depth and (0, 1) == pairs[0] == pairs[1]):
            raise ValueError(
                "search.whole_layers: expected search.depth beside it, with min_keep 0 and max_ratio 1 of attention "
                f"and MLP, got depth {self.depth}, {self.min_keep} and {self.max_ratio}"
            )
        for name, why in (
            ("rescore_every", "which orders units anew on the way"),
            ("whole_layers", "since attention and MLP move apart"),
            ("max_segments", "since layers move apart"),
            ("max_shapes", "since layers move apart"),
        ):
            if self.evolve.generations and (got := getattr(self, name)):
                raise ValueError(
                    f"search.evolve.generations: expected no search.{name} beside it, {why}, got {got}; leave one of "
                    "the two out"
                )
        for name in self.nested:
            for other, none in (
                ("max_segments", None),
                ("max_shapes", None),
                ("depth", False),
                ("in_sequence", "none"),
                ("learn", LearnConfig()),
                ("evolve", EvolveConfig()),
            ):
                if getattr(self, other) != none:
                    raise ValueError(
                        f"search.{name}.share: expected no search.{other} beside it, got {getattr(self, other)}; leave "
                        "one of the two out"
                    )
        check_at_least("search.min_keep_each", min(self.min_keep_each.values(), default=0), 0)
        check_at_least("search.multiple_of_each", min(self.multiple_of_each.values(), default=1), 1)
        for share in self.max_ratio_each.values():
            check_share("search.max_ratio_each", share)

    @property
    def chooses_again(self) -> bool:
        """Whether the calibration text is read once more to choose which units go."""
        return self.in_sequence != "none" or bool(self.trains)

    @property
    def trains(self) -> str:
        """Name of the option that lowers the divergence from the unpruned model, the first of them; empty if none."""
        return "learn.steps" if self.learn.steps else "evolve.generations" if self.evolve.generations else ""

    def check_microbatches(self, count: int) -> None:
        """Raise ValueError where there are too few microbatches to hold some out, which say what is the best."""
        if self.trains and count < HELD_OUT:
            raise ValueError(
                f"search.{self.trains}: expected at least {HELD_OUT} microbatches of calibration text to hold every "
                f"{HELD_OUT}th out, got {count}; give more calibration.examples or a smaller calibration.batch_size"
            )

    @property
    def nested(self) -> dict[str, QueryHeadsConfig | ResidualConfig]:
        """The options that take a share of the budget for structures inside others, by name."""
        return {name: part for name in ("query_heads", "residual") if (part := getattr(self, name)).share}

    def check_layers(self) -> None:
        """Raise ValueError for what only the structures of traced models have."""
        for name in ("min_keep_each", "max_ratio_each", "multiple_of_each"):
            if getattr(self, name):
                raise ValueError(
                    f"search.{name}: names structures of traced models, got {getattr(self, name)}; attention and MLP "
                    f"have search.{name.removesuffix('_each')}"
                )

    def check_traced(self) -> None:
        """Raise ValueError for what only attention and MLP of layers have."""
        default = SearchConfig()
        for name in (
            "attention_share", "min_keep", "max_ratio", "skip_layers", "multiple_of", "device", "max_segments",
            "max_shapes", "depth", "whole_layers", "in_sequence", "learn", "evolve", "query_heads", "residual",
        ):  # fmt: skip
            if getattr(self, name) != getattr(default, name):
                each = f"{name}_each" if hasattr(self, f"{name}_each") else ""
                hint = f"; its structures have search.{each}" if each else "; leave it out"
                raise ValueError(
                    f"search.{name}: is for attention and MLP of layers, which a traced model does not tell apart, got "
                    f"{getattr(self, name)}{hint}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompensationConfig:
    """How what is left of a layer stands in for what was removed: in closed form, or by one factor a unit."""

    method: str = "none"
    """`bias` adds to each output projection what it lacks on average; `least_squares` changes its kept weights; or one
    that was registered in `CORRECTIONS`. `scales`, alone or behind one of these (`least_squares+scales`), then trains
    one factor for each kept unit towards what the unpruned model predicts, all weights frozen."""
    propagate: Propagate = "pruned"
    """`dense`: each sub-block for itself, on the activations of the unpruned model; `pruned`: layer by layer, on those
    of the model as pruned so far, making up for the layers before too."""
    tokens: Literal["scaled", "equal"] = "scaled"
    """How much each token counts: `scaled` by 1 / mean(x²) of the residual stream x behind the sub-block, by whose root
    whatever reads it divides it; or `equal`, as the rows of a traced model do. Also of `search.in_sequence`."""
    damping: float | None = None
    """Of `least_squares`: δ, how much each kept weight resists, relative to its input's mean square; None: what does
    best on every fourth microbatch of the calibration text, for each sub-block."""
    steps: int = 32
    """Of `scales`: steps of Adam, each on a microbatch of the calibration text. Every fourth microbatch is held out,
    and the factors that do best there count."""
    rate: float = 0.01
    """Of `scales`: learning rate of the first step; it falls to 0 as a cosine."""

    def __post_init__(self) -> None:
        check_choices("compensation", self)
        check_correction("compensation.method", self.method)
        check_at_least("compensation.steps", self.steps, 1)
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"compensation.rate: expected a number above 0, got {self.rate}")
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"compensation.damping: expected a number above 0 or None, got {self.damping}")

    @property
    def correction(self) -> str:
        """The method in closed form, `none` where there is none."""
        return parts_of_method(self.method)[0]

    @property
    def scaled(self) -> bool:
        """Whether factors of units are trained."""
        return parts_of_method(self.method)[1]

    def check_microbatches(self, count: int) -> None:
        """Raise ValueError where there are too few microbatches to hold some out, which choose damping or scales."""
        if self.scaled and count < HELD_OUT:
            raise ValueError(
                f"compensation.method: expected at least {HELD_OUT} microbatches of calibration text for {SCALES}, to "
                f"hold every {HELD_OUT}th out, got {count}; give more calibration.examples or a smaller "
                "calibration.batch_size"
            )
        if CORRECTIONS[self.correction].damped and self.damping is None and count < HELD_OUT:
            raise ValueError(
                f"compensation.damping: expected at least {HELD_OUT} microbatches of calibration text to hold every "
                f"{HELD_OUT}th out, got {count}; give more calibration.examples, a smaller calibration.batch_size, or "
                "a number for compensation.damping"
            )


SCALES = "scales"
"""The method of compensation that trains one factor a unit."""


def parts_of_method(method: str) -> tuple[str, bool]:
    """Return the method in closed form that a method of compensation names, and whether it trains scales.

    >>> [parts_of_method(each) for each in ("bias", "scales", "least_squares+scales")]
    [('bias', False), ('none', True), ('least_squares', True)]
    """
    correction, plus, scales = (part.strip() for part in method.partition("+"))
    if correction == SCALES and not plus:
        return "none", True
    return (correction, True) if plus and scales == SCALES else (method, False)


def check_correction(field: str, method: str) -> None:
    """Raise ValueError unless a field names a method of compensation.

    >>> check_correction("compensation.method", "none+scales")
    Traceback (most recent call last):
    ValueError: compensation.method: expected 'scales', got 'none+scales'
    """
    correction, scaled = parts_of_method(method)
    if scaled and correction == "none" and method != SCALES:
        raise ValueError(f"{field}: expected {SCALES!r}, got {method!r}")
    if method != SCALES and correction not in CORRECTIONS:
        CORRECTIONS.check(field, correction, SCALES)


ALL = "all"
"""The scenario that stands for all of them together."""

HELD_OUT = 4
"""Every fourth microbatch is held out when the damping of a compensation is chosen; then all are used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsConfig:
    """What a pruned model may take: the smallest ratio at which all of these hold is found. Each is a percentage of the
    unpruned model's, such as 70%, or an amount; empty: no such target.
    """

    parameters: str = ""
    """All parameters, at most: `70%`, `100M`."""
    macs: str = ""
    """Multiply-accumulates of reading the prompts, at most: `70%`, `10G`."""
    weight_bytes: str = ""
    """Bytes of the weights in memory, at most: `70%`, `300MiB`."""
    peak_memory: str = ""
    """Bytes of weights, cache and temporaries while prompts are read and tokens generated, at most: `70%`, `500MiB`."""
    latency: str = ""
    """Time to read the prompts on this device, at most: `70%`, `250ms`."""
    tokens_per_second: str = ""
    """Tokens generated on this device, all rows together, at least: `150%`, `40`."""
    batch: int = 1
    """Prompts that are read together."""
    length: int = 128
    """Tokens of each prompt."""
    repeats: int = 5
    """Measurements, of which the median counts."""

    def __post_init__(self) -> None:
        for name, (units, example) in TARGETS.items():
            if getattr(self, name):
                read_limit(f"targets.{name}", getattr(self, name), units, example)
        for name in ("batch", "length", "repeats"):
            check_at_least(f"targets.{name}", getattr(self, name), 1)

    @property
    def asked(self) -> dict[str, str]:
        """The targets that there are, as they were asked for."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name)}


TARGETS: dict[str, tuple[dict[str, float], str]] = {
    "parameters": ({"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}, "100M"),
    "macs": ({"M": 1e6, "G": 1e9, "T": 1e12}, "10G"),
    "weight_bytes": (BYTES, "300MiB"),
    "peak_memory": (BYTES, "500MiB"),
    "latency": ({"us": 1e-6, "ms": 1e-3, "s": 1.0}, "250ms"),
    "tokens_per_second": ({"": 1.0}, "40"),
}
"""What a model can be pruned to -> units of an amount, and an example of one."""


STUDIED = SearchConfig(attention_share=0.1, skip_layers=(0, 1, 2, 3, -2, -1), rescore_every=0.1)
"""What docs/study.md found to go best with `saap`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """On which text quality is measured."""

    in_domain: str = "builtin:reference"
    """Text of the calibration domain, never the calibration text itself; of a traced model, the name of a held-out set,
    where empty stands for the first."""
    out_of_domain: str = "builtin:descriptions"
    """Text of another domain; of a traced model, another held-out set, the second if there is one and none is named."""
    windows: int = 24
    """Windows (or examples) of each text; 0 takes all."""
    length: int = 128
    """Tokens a window; part of the metric's name."""
    batch_size: int = 8
    """Windows evaluated at once; changes speed and memory, not the result."""
    candidates_at_once: int = 2
    """Candidates that are evaluated in one batch, each on those windows; changes speed and memory. The more, the more
    share the layers that all of them leave whole; on a CPU they soon no longer fit the cache."""

    def __post_init__(self) -> None:
        check_at_least("evaluation.candidates_at_once", self.candidates_at_once, 1)
        check_at_least("evaluation.windows", self.windows, 0)
        check_at_least("evaluation.length", self.length, 2)
        check_at_least("evaluation.batch_size", self.batch_size, 1)
        if self.in_domain == self.out_of_domain != "":
            raise ValueError(f"evaluation.out_of_domain: expected another text than in_domain, got {self.in_domain!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """What is compared beside estimators and ratios: every combination of these, where empty stands for the one value
    that `fusion`, `search` and `calibration` give. Combinations that cannot differ are one: a fusion of a single
    estimator, a stability weight without `adaptive`, a key of ranking with `uniform`.
    """

    fusion_methods: tuple[FusionMethod, ...] = ()
    """Values of `fusion.method`."""
    fusion_scopes: tuple[FusionScope, ...] = ()
    """Values of `fusion.scope`."""
    allocations: tuple[str, ...] = ()
    """Values of `search.allocation`."""
    rank_by: tuple[RankBy, ...] = ()
    """Values of `search.rank_by`."""
    stability_weights: tuple[float, ...] = ()
    """Values of `search.stability_weight`, λ."""
    query_heads: tuple[float, ...] = ()
    """Values of `search.query_heads.share`."""
    residual: tuple[float, ...] = ()
    """Values of `search.residual.share`."""
    learn_steps: tuple[int, ...] = ()
    """Values of `search.learn.steps`."""
    scenarios: tuple[str, ...] = ()
    """Names of calibration scenarios to score by, each alone; `all` stands for all of them together."""
    compensations: tuple[str, ...] = ()
    """Values of `compensation.method`."""
    seeds: tuple[int, ...] = ()
    """Values of `calibration.seed`; one pass each. Three or more say how much a result depends on the text drawn."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if len(set(values)) < len(values):
                raise ValueError(f"grid.{field.name}: expected each value once, got {list(values)}")
        for name in ("query_heads", "residual"):
            for share in getattr(self, name):
                check_share(f"grid.{name}", share)
        for steps in self.learn_steps:
            check_at_least("grid.learn_steps", steps, 0)
        for allocation in self.allocations:
            ALLOCATIONS.check("grid.allocations", allocation)
        for method in self.compensations:
            check_correction("grid.compensations", method)
        for seed in self.seeds:
            check_seed("grid.seeds", seed)
