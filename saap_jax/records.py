"""What a run keeps, as types for those who read it: `run.json`, a line of `metrics.jsonl`.

Seconds are wall time, losses nats a token, ratios fractions of the prunable parameters. A field that is not named here
may be there. What we wrote is read as it is; nothing is checked against these types when a program runs.
"""

from typing import Any, Literal, Required, TypedDict

Named = dict[str, float]
"""Numbers by name."""
Part = dict[str, Any]
"""An object whose fields are named where it is made."""

Cost = Trial = RaceRecord = Part

RECOVERY = {"dense": "dense", "before": "pruned", "after": "recovered"}
"""Key of a model in the record of `saap recover` -> what tables and cards call it."""


class Measured(TypedDict, total=False):
    """What was measured of a model."""

    ppl: Named
    """By metric."""
    losses: dict[str, list[float]]
    """Mean loss of each window, by metric."""
    parameters: int
    bytes: int
    """Of the weights, in memory."""
    seconds: float
    """Of the evaluation."""
    tokens_per_second: float
    """In decoding, the median of some rounds, or in a step of training."""
    slowest_and_fastest: tuple[float, float]
    """Rounds of decoding, tokens a second."""


class Row(Measured, total=False):
    """A line of `metrics.jsonl`: a variant at a ratio, a place of `saap sensitivity`, or a step of training."""

    candidate: Required[str]
    """Unique."""
    # a variant at a ratio
    variant: str
    chain: str
    """The method, as it is written."""
    model: str
    """Digest of the weights, where a chain changed them."""
    windows: int
    """By which it was judged, where a race took fewer than there are; `ppl` is then what these and the unpruned model
    let expect of all."""
    seen: dict[str, list[float | None]]
    """Then in place of `losses`: those of the windows that it took, None for the others."""
    seed: int
    """Of the calibration text."""
    ratio_asked: float
    ratio_actual: float
    kept: dict[str, list[int | float]]
    """Units that stay, by structure, of each layer; of a traced model, of each copy."""
    keep: str
    """Digest of the keep-set."""
    # one place alone
    layer: int
    structure: str
    asked: float
    """Share of the units."""
    actual: float
    units: int
    """Of the place."""
    removed: int
    """Parameters."""
    among: str
    """What the place is compared with on average; its structure, where nothing is said."""
    # a step of training
    step: int
    loss: float
    """On its batch."""
    held_out: float
    divergence: float
    """From the teacher."""
    distance: float
    """Of the residual streams from the teacher's."""
    norm: float
    """Of the gradient."""
    learning_rate: float
    tokens: int


class StageRecord(TypedDict, total=False):
    """What a stage took, see `stages`."""

    name: Required[str]
    seconds: Required[float]
    times: int
    compile_seconds: float | None
    compiles: int | None
    cache_hits: int | None
    cache_misses: int | None
    peak_host_gib: float | None
    peak_device_gib: float | None
    tokens: int | None
    tokens_per_second: float | None


class Metric(TypedDict):
    """A text by which models are measured."""

    name: str
    domain: Literal["in", "out"]


class WrittenText(TypedDict):
    """What models write after a prompt, the likeliest token each time."""

    prompt: str
    texts: dict[str, str]
    """By model: `dense`, `pruned`, `recovered`."""


class Suggestion(TypedDict):
    """What to try next."""

    text: str
    """What was found, and what to do about it."""
    effect: str
    """What to expect of it, from measured numbers."""
    command: str


class Fused(TypedDict, total=False):
    """How a fused score came about; all by member and scope, a structure or a layer of one (`mlp/3`)."""

    scores: None
    sigmas: Required[dict[str, Named]]
    weights: Required[dict[str, Named]]
    loss: float


class CoupledStructure(TypedDict):
    """A structure of the program."""

    name: str
    members: list[tuple[str, int]]
    """Parameter and axis."""
    label: tuple[str, str]
    pinned: bool


class Couplings(TypedDict):
    """Coupled structures of the program."""

    parameters: dict[str, list[int]]
    """Shapes."""
    structures: list[CoupledStructure]


class RunRecord(TypedDict, total=False):
    """`run.json`."""

    schema: Required[int]
    name: str
    kind: str
    status: str
    """`running` or `finished`."""
    config: Part
    command: str
    """The words that make the configuration of its defaults."""
    started: str
    """When, as ISO 8601 in UTC."""
    finished: str
    host: str
    """Name of the machine that began it."""
    stages: list[StageRecord]
    files: list[str]
    """Written beside `run.json`."""
    inputs: dict[str, str]
    """Digests of models and texts."""
    versions: dict[str, str | None]
    devices: Part
    git_commit: str | None
    seeds: Part
    """By purpose: `calibration`, a list; `data`, `training`."""
    model: Part
    """The unpruned model; of `saap recover`, the pruned one."""
    metrics: list[Metric]
    articles: dict[str, list[int]]
    """By metric, the number of the article of each window; empty where a text has none."""
    scenarios: dict[str, tuple[int, int]]
    """Windows and their length; of a traced model, examples and 1."""
    left_out: list[str]
    """Estimators that kept statistics do not serve."""
    dense: Measured
    before: Measured
    after: Measured
    best: Part
    """The best candidate, cut and loaded back: perplexities, bytes and times beside the unpruned model's."""
    written: list[WrittenText]
    cost: Cost
    """`device_hours`, `devices`, dollars and prices where they are known."""
    suggestions: list[Suggestion]
    fusions: dict[str, dict[str, Fused]]
    """By scenario and fused estimator."""
    prices: dict[str, list[float]]
    """By candidate whose layers are alike: KL to the unpruned model on held-out text, nats a token, of free layers and
    of these."""
    divergences: dict[str, list[float]]
    """By candidate whose units were learned or evolved: the same, before and after each round."""
    couplings: Couplings
    structures: list[Part]
    race: list[RaceRecord]
    """Of `saap compare`, a race a ratio."""
    raced: RaceRecord
    """Of `saap frontier` and `saap sensitivity`: what all their races took together."""
    unrepaired: dict[str, dict[str, str]]
    """By method, the structures that its repairs leave as they are, and why."""
    frontier: Part
    trials: list[Trial]
    data: Part
    training: Part
    first_loss: float | None
    """Held out, before the first step."""
    out: str
    """Directory of the recovered model."""
