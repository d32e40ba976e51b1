"""How a budget is shared, and which units go."""

import dataclasses
import math
from typing import Literal

from saap_jax.config.checks import check_at_least, check_choices, check_share, meant
from saap_jax.config.compensation import HELD_OUT
from saap_jax.config.registries import ALLOCATIONS

RankBy = Literal["score", "score_per_parameter"]
InSequence = Literal["none", "wanda", "obs", "obs_swaps", "leverage"]
LearnRule = Literal["momentum", "sigmoid", "smooth"]
Normalization = Literal["none", "layer_zscore", "structure_mean"]
Shape = Literal["free", "uniform"]
Solver = Literal["greedy", "exact"]
Device = Literal["any", "tpu", "gpu", "cpu"]
ScenarioReduction = Literal["mean", "max", "min_rank"]
StabilityOver = Literal["examples", "scenarios"]


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
class UniformConfig:
    """How a uniform shape is searched; see `selection.uniform`."""

    layers: float = 0.25
    """Share of the layers that may go whole."""
    finalists: int = 4
    """Shapes that held-out text decides between, the best ones on a microbatch."""

    def __post_init__(self) -> None:
        check_share("search.uniform.layers", self.layers)
        check_at_least("search.uniform.finalists", self.finalists, 1)


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
    """Share of the removed parameters that comes from attention; None: the ranking decides. Where each layer has no
    more attention units than `min_keep`, such as a single KV head, all comes from the MLP."""
    attention_from: float = 0.0
    """Share of the prunable parameters up to which all comes from the MLP; `attention_share` is then of what goes
    beyond it, and attention has its part of a ratio from the start of the way there, but not of a target, whose ratio
    is not known by then."""
    min_keep: PerStructure = PerStructure(attention=1, mlp=1)
    """Units that each layer keeps at least."""
    max_ratio: SharePerStructure = SharePerStructure(attention=1.0, mlp=1.0)
    """Largest share of a layer's units that may go; 0 leaves a structure alone."""
    skip_layers: tuple[int | float, ...] = ()
    """Layers left alone; negative numbers count from the end. A share is of the layers: 0.13 leaves the first 13 % of
    them alone, -0.07 the last 7 %, rounded to whole layers."""
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
    shape: Shape = "free"
    """`uniform`: all layers that stay keep as many units as each other, as plain models and MaxText have it; how many
    layers, heads and channels is searched on the calibration text, of which a quarter is held out. `skip_layers` and
    shares for attention then count for nothing."""
    uniform: UniformConfig = UniformConfig()
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
        check_share("search.attention_from", self.attention_from)
        for layer in self.skip_layers:
            if not (float(layer).is_integer() or -1 < layer < 1):
                raise ValueError(
                    f"search.skip_layers: expected numbers of layers, or shares of them in (-1, 1), got {layer}; leave "
                    "the first tenth alone with 0.1, the last with -0.1"
                )
        if self.attention_from and self.attention_share is None:
            raise ValueError(
                f"search.attention_from: expected search.attention_share beside it, got {self.attention_from} alone"
            )
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
        for name, none in (
            ("depth", False),
            ("max_segments", None),
            ("max_shapes", None),
            ("learn", LearnConfig()),
            ("evolve", EvolveConfig()),
        ):
            if self.shape == "uniform" and getattr(self, name) != none:
                raise ValueError(
                    f"search.shape: expected no search.{name} beside uniform, which says how many units each layer "
                    f"keeps, got {getattr(self, name)}; leave one of the two out"
                )
        check_at_least("search.min_keep_each", min(self.min_keep_each.values(), default=0), 0)
        check_at_least("search.multiple_of_each", min(self.multiple_of_each.values(), default=1), 1)
        for share in self.max_ratio_each.values():
            check_share("search.max_ratio_each", share)

    def at_ratio(self, ratio: float) -> "SearchConfig":
        """Return the options at a ratio: with a share for attention of all that goes.

        >>> SearchConfig(attention_share=0.2, attention_from=0.25).at_ratio(0.5).attention_share
        0.1
        """
        if not (self.attention_from and self.attention_share):
            return self
        beyond = max(ratio - self.attention_from, 0.0) / (ratio or 1.0)
        return dataclasses.replace(self, attention_share=self.attention_share * beyond, attention_from=0.0)

    @property
    def chooses_again(self) -> bool:
        """Whether the calibration text is read once more to choose which units go."""
        return self.in_sequence != "none" or bool(self.trains)

    @property
    def orders(self) -> bool:
        """Whether which units of a layer go is a matter of order, and how many is searched anew."""
        return bool(self.evolve.generations) or self.shape == "uniform"

    @property
    def trains(self) -> str:
        """Name of the option that lowers the divergence from the unpruned model, the first of them; empty if none."""
        asked = {"learn.steps": self.learn.steps, "evolve.generations": self.evolve.generations}
        return next((name for name, count in asked.items() if count), "shape" if self.shape == "uniform" else "")

    def check_microbatches(self, count: int) -> None:
        """Raise ValueError where there are too few microbatches to hold some out, which say what is the best."""
        if self.trains and count < HELD_OUT:
            raise ValueError(
                f"search.{self.trains}: expected at least {HELD_OUT} microbatches of calibration text to hold every "
                f"{HELD_OUT}th out, got {count}; give more calibration.examples or a smaller calibration.batch_size"
            )

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
            "attention_share", "attention_from", "min_keep", "max_ratio", "skip_layers", "multiple_of", "device",
            "max_segments", "max_shapes", "depth", "whole_layers", "in_sequence", "shape", "uniform", "learn", "evolve",
        ):  # fmt: skip
            if getattr(self, name) != getattr(default, name):
                each = f"{name}_each" if hasattr(self, f"{name}_each") else ""
                hint = f"; its structures have search.{each}" if each else "; leave it out"
                raise ValueError(
                    f"search.{name}: is for attention and MLP of layers, which a traced model does not tell apart, got "
                    f"{getattr(self, name)}{hint}"
                )


PROTECTED = (0.13, -0.07)
"""What is left alone of models of any depth, as LLM-Pruner has it: the first four layers of 32 and the last two."""

STUDIED = SearchConfig(attention_share=0.1, skip_layers=PROTECTED, rescore_every=0.1)
"""What docs/study.md found to go best with `saap`."""

PREFERRED = dataclasses.replace(STUDIED, attention_share=0.25, attention_from=0.3)
"""What docs/arena.md found to go best with `saap` and least squares behind it."""
