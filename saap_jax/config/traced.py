"""The configurations of `saap compare` and `saap prune` for a researcher's own model, named as `MODULE:FACTORY`."""

import dataclasses

from saap_jax.config.checks import check_at_least, check_choices, check_ratios, check_run_name, check_share
from saap_jax.config.method import FusionConfig, Normalization, RankBy, SearchConfig, Solver

FUSED = FusionConfig(estimators=("taylor_element", "gate_taylor"), attention="")
"""What `saap` fuses in a traced model: a sum over elements, and the gradients of gates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedSearchConfig:
    """How a budget is shared between the structures of a traced model; copies of one keep as many units each."""

    allocation: str = "uniform"
    """`uniform`: the same share of each structure; `global`: one ranking of all units; `adaptive`: one ranking of
    log score + `stability_weight` · stability indicator; or one that was registered in `ALLOCATIONS`."""
    rank_by: RankBy = "score_per_parameter"
    """Key of the one ranking."""
    normalize: Normalization = "none"
    """Before ranking: `layer_zscore` standardises within a copy; `structure_mean` divides by the structure's mean."""
    stability_weight: float = 0.25
    """λ of `adaptive`. Above 0 keeps what matters only sometimes; below 0 removes it."""
    solver: Solver = "greedy"
    """`exact` minimises the score that is removed, by dynamic programming; for small models only."""
    min_keep: int = 1
    """Units that each copy of a structure keeps at least."""
    max_ratio: float = 1.0
    """Largest share of a structure's units that may go."""
    multiple_of: int = 1
    """What the width of a pruned structure is a multiple of."""
    min_keep_each: dict[str, int] = dataclasses.field(default_factory=dict)
    """`min_keep` of single structures, by name as `saap discover` prints it, or of several by a pattern such as
    `layers/*/up[1]`."""
    max_ratio_each: dict[str, float] = dataclasses.field(default_factory=dict)
    """`max_ratio` of single structures, by name or pattern; 0 leaves one alone."""
    multiple_of_each: dict[str, int] = dataclasses.field(default_factory=dict)
    """`multiple_of` of single structures, by name or pattern."""

    def __post_init__(self) -> None:
        check_choices("search", self)
        check_at_least("search.min_keep", min([self.min_keep, *self.min_keep_each.values()]), 0)
        check_at_least("search.multiple_of", min([self.multiple_of, *self.multiple_of_each.values()]), 1)
        for share in (self.max_ratio, *self.max_ratio_each.values()):
            check_share("search.max_ratio", share)
        self.ranking  # noqa: B018  refuses combinations

    @property
    def ranking(self) -> SearchConfig:
        """What the search does with scores, without limits of widths."""
        return SearchConfig(
            allocation=self.allocation,
            rank_by=self.rank_by,
            normalize=self.normalize,
            stability_weight=self.stability_weight,
            solver=self.solver,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedConfig:
    """What every job on a traced model needs."""

    factory: str = ""
    """`MODULE:FACTORY` or `FILE.py:FACTORY`; the factory returns a `saap_jax.discovery.tracing.problem.Problem`."""
    fusion: FusionConfig = FUSED
    """How scores are fused; `attention` has no meaning here."""
    search: TracedSearchConfig = TracedSearchConfig()
    norms: bool = False
    """Prune structures too that a norm averages over, such as the residual stream. Its divisor stays as it was, so the
    model's own code gives other outputs for the smaller arrays than the pruned program."""
    refused: bool = False
    """Prune structures too of which the model's own code does not take fewer units, or computes something else with
    them. The pruned program runs all the same; the own code needs other sizes."""
    batch_size: int = 8
    """Examples at once; changes speed and memory, not the result."""

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        if self.fusion.attention:
            raise ValueError(
                f"fusion.attention: expected none for a traced model, whose structures are all scored alike, got "
                f"{self.fusion.attention!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedCompareConfig(TracedConfig):
    """Compare estimators on a traced model: one calibration pass, one masked evaluation a candidate."""

    name: str = "traced"
    """Name of the run, a directory below `runs`."""
    estimators: tuple[str, ...] = (
        "random", "magnitude", "taylor_vector", "taylor_element", "taylor_element_second", "fisher", "gate_taylor",
        "gate_fisher", "saap",
    )  # fmt: skip
    """Names, with hyper-parameters in brackets if any; `a+b` fuses the scores of two or more, `saap` is the fusion that
    `fusion` names, and `ablation` is the exact change of the loss when a unit goes, one pass a unit."""
    ratios: tuple[float, ...] = (0.25, 0.5)
    """Shares of the prunable parameters to remove."""
    runs: str = "runs"
    """Directory of all runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run_name(self.name)
        check_ratios(self.ratios)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedPruneConfig(TracedConfig):
    """Prune a traced model by one estimator at one ratio, and save the smaller parameters and what is kept."""

    out: str = "models/pruned"
    """Directory that is written; it must not exist."""
    estimator: str = "gate_taylor"
    """Name, with hyper-parameters in brackets if any."""
    ratio: float = 0.25
    """Share of the prunable parameters to remove at least."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratios((self.ratio,), "ratio")
