"""What a run keeps, as types: `run.json`, a line of `metrics.jsonl`, `fidelity.json`; and the check by these types.

A field that is not named here may be there. A `tuple` is a list of that length, a `float` may be a whole number.
Seconds are wall time, losses nats a token, ratios fractions of the prunable parameters.
"""

import functools
import types
from typing import Any, Literal, Required, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

Named = dict[str, float]
"""Numbers by name."""


class Measured(TypedDict, total=False):
    """What was measured of a model."""

    ppl: Named
    """By metric."""
    losses: dict[str, list[float]]
    """Mean loss of each window, by metric."""
    parameters: int
    bytes: int
    """Of the weights."""
    seconds: float
    """Of the evaluation."""
    tokens_per_second: float
    """In decoding, or in a step of training."""


class FusionChoice(TypedDict, total=False):
    """How a fused estimator of a candidate was made."""

    method: str
    scope: str


class Row(Measured, total=False):
    """A line of `metrics.jsonl`."""

    candidate: Required[str]
    """Unique."""
    # a variant at a ratio
    variant: str
    chain: str
    """In full."""
    estimator: str
    scenario: str
    allocation: str
    rank_by: str
    stability_weight: float | None
    fusion: FusionChoice | None
    compensation: str
    learn_steps: int
    windows: int
    """By which it was judged, where a race took fewer than there are; `ppl` is then what these and the unpruned model
    let expect of all."""
    recipe: str
    """Name of the published method that it is; absent: none."""
    shares: Named
    """Of what is removed, from structures inside others, by option of the search; absent: none."""
    seed: int
    """Of the calibration text."""
    ratio_asked: float
    ratio_actual: float
    kept: dict[str, list[int | float]]
    """Units that stay, by structure, of each layer; of a traced model, of each copy."""
    keep: str
    """Digest of the keep-set."""
    model: str
    """Digest of the pruned model, that of the keep-set where its weights are unchanged."""
    same_as: str | None
    """The candidate of the same keep-set that was evaluated."""
    # one place alone, of `saap sensitivity`
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


class Stage(TypedDict, total=False):
    """What a stage took, see `stages`."""

    name: Required[str]
    seconds: Required[float]
    times: int
    compile_seconds: float | None
    compiles: int | None
    peak_host_gib: float | None
    peak_device_gib: float | None
    tokens: int | None
    tokens_per_second: float | None


class Metric(TypedDict):
    """A text by which models are measured."""

    name: str
    domain: Literal["in", "out"]


class Devices(TypedDict, total=False):
    """What the run was on."""

    platform: str
    kind: str
    count: int
    cores: int | None


class ModelRecord(TypedDict, total=False):
    """The unpruned model; of `saap recover`, the pruned one."""

    name: str
    parameters: int
    prunable_parameters: int
    layers: int
    units: dict[str, int]
    """Of a layer, by structure."""
    begins: bool
    """Whether its tokenizer puts a token in front of every text."""


class Seeds(TypedDict, total=False):
    """Seeds by purpose."""

    calibration: list[int]
    data: int
    training: int


class Cut(TypedDict, total=False):
    """The best candidate, cut and loaded back."""

    candidate: str
    parameters: int
    bytes: int
    dense_bytes: int
    forward_seconds: float
    dense_forward_seconds: float
    forward_tokens: int
    """Of one timed forward pass."""
    ppl: Named
    ppl_masked: Named
    segments: int
    """Of equal layers."""


class WrittenText(TypedDict):
    """What models write after a prompt, the likeliest token each time."""

    prompt: str
    texts: dict[str, str]
    """By model: `dense`, `pruned`, `recovered`."""


class PerMillion(TypedDict):
    """US dollars a million tokens."""

    dense: float
    cut: float


class PriceRecord(TypedDict, total=False):
    """The entry of the table of prices that counted."""

    kind: str
    usd_per_hour: float
    date: str


class Cost(TypedDict, total=False):
    """What the run cost."""

    device_hours: Required[float]
    devices: Required[int]
    usd: float | None
    usd_per_million_tokens: PerMillion | None
    prices: PriceRecord | None
    note: str
    """Why there is no price."""


class SuggestionRecord(TypedDict, total=False):
    """What to try next."""

    text: str
    effect: str
    expected_effect: str
    """Of older runs, `effect`."""
    command: str


class Fused(TypedDict, total=False):
    """How a fused score came about; all by member and scope, a structure or a layer of one (`mlp/3`)."""

    scores: None
    sigmas: Required[dict[str, Named]]
    weights: Required[dict[str, Named]]
    shares: dict[str, Named]
    """Of the mean fused score."""
    trajectory: dict[str, list[list[float]]] | None
    """σ by member, `[steps][scopes]`."""
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


class Member(TypedDict):
    """An axis of a parameter."""

    path: str
    axis: int


class TracedStructure(TypedDict, total=False):
    """A prunable structure of a traced model."""

    name: Required[str]
    units: Required[int]
    copied: Required[list[int | str]]
    parameters_per_unit: int
    members: list[Member]


class FrontierLine(TypedDict):
    """How far a variant goes by the scores of one seed."""

    variant: str
    seed: int
    ratio: float
    """The largest that holds the limit."""
    candidate: str
    breaks_at: float | None
    largest_possible: float
    rounds: int
    again: list[float]
    """Ratios of the grid, further up, that hold the limit again."""


class Frontier(TypedDict):
    """How far the variants go."""

    metric: str
    percent: float
    limit: float
    """Perplexity."""
    tolerance: float
    ratios: list[float]
    """The grid."""
    resamples: int
    rounds: int
    lines: list[FrontierLine]


class Trial(TypedDict, total=False):
    """Another method that `saap sensitivity` tried."""

    kind: Required[str]
    """`protect`, `attention`, `allocation` or `aligned`."""
    changes: Required[dict[str, Any]]
    """Of its limits, or its allocation."""
    chain: str
    candidate: Required[str]
    instead_of: Required[str]
    seconds: tuple[list[float], list[float]]
    """A forward pass of both, cut, in each round."""
    tokens: int
    """Of the timed pass."""
    segments: tuple[int, int]
    """Of equal layers, of both."""


class TrainingText(TypedDict):
    """What was learned from."""

    documents: int
    pieces: int
    cut: int
    left_out: int
    rows: int
    filled: float
    """Share of the rows that is text."""
    predicted: int
    """Tokens."""
    held_out_rows: int


class Training(TypedDict):
    """How the training went."""

    steps: int
    rows: int
    """Of a step."""
    best_step: int | None
    best_loss: float | None
    first_loss: float | None
    stopped: bool
    trained: int
    """Numbers."""


class ModelChoice(TypedDict, total=False):
    """`model` of a configuration."""

    name: str
    dtype: str


class CalibrationChoice(TypedDict, total=False):
    """`calibration` of a configuration."""

    scenarios: list[str]
    examples: int
    length: int
    bos: Literal["auto", "always", "never"]
    batch_size: int
    seed: int


class EvaluationChoice(TypedDict, total=False):
    """`evaluation` of a configuration."""

    windows: int
    length: int
    bos: Literal["auto", "always", "never"]
    batch_size: int


class PatternChoice(TypedDict, total=False):
    """`patterns` of a configuration."""

    importance: str
    share: float


class EstimationChoice(TypedDict, total=False):
    """`estimation` of a configuration."""

    estimators: list[str]
    remat: str


class FusionConfigured(TypedDict, total=False):
    """`fusion` of a configuration."""

    estimators: list[str]
    attention: str
    scope_constant: bool


class TextChoice(TypedDict, total=False):
    """`data` of a configuration."""

    length: int


class MethodChoice(TypedDict, total=False):
    """`method` of a configuration."""

    name: str


class Configuration(TypedDict, total=False):
    """What is read of the configuration that made a run; all of it is there."""

    name: str
    model: str | ModelChoice
    calibration: CalibrationChoice
    estimation: EstimationChoice
    evaluation: EvaluationChoice
    fusion: FusionConfigured
    patterns: PatternChoice
    search: dict[str, Any]
    data: TextChoice
    method: str | MethodChoice
    from_run: str
    best_ratio: float | None
    estimator: str
    ratio: float
    judged: Literal["in", "out"]
    resamples: int
    align: int


class RaceRecord(TypedDict, total=False):
    """How a race between the variants of a ratio ended, see `evaluation.race`."""

    ratio: Required[float]
    metric: str
    """By which it was judged."""
    left: Required[list[str]]
    """Variants that cannot be told apart from the best."""
    windows: Required[dict[str, int]]
    """By which each was judged."""
    p_values: Required[Named]
    """Of "as good as the best", valid at any time, adjusted for the other variants."""
    ending: str
    """`alone`, `tied` or `spent`."""
    budget: int
    """Windows that there are."""
    evaluated: int
    """Windows that were evaluated, all keep-sets together."""
    keep_sets: int


class RunRecord(TypedDict, total=False):
    """`run.json`."""

    schema: Required[int]
    name: str
    kind: str
    status: str
    config: Configuration
    command: str
    """The words that make the configuration of its defaults."""
    started: str
    """When, as ISO 8601 in UTC."""
    finished: str
    host: str
    """Name of the machine that began it."""
    stages: list[Stage]
    files: list[str]
    """Written beside `run.json`."""
    inputs: dict[str, str]
    """Digests of model and texts."""
    digests: dict[str, list[str]]
    """Of the files of arrays: the last, or while one is written, the last two."""
    rows: int
    """Lines of `metrics.jsonl`, by candidate."""
    versions: dict[str, str | None]
    devices: Devices
    git_commit: str | None
    seeds: Seeds
    model: ModelRecord
    metrics: list[Metric]
    scenarios: dict[str, tuple[int, int]]
    """Windows and their length; of a traced model, examples and 1."""
    left_out: list[str]
    """Estimators that kept statistics do not serve."""
    dense: Measured
    before: Measured
    after: Measured
    best: Cut
    written: list[WrittenText]
    """By the models that the run is of."""
    cost: Cost
    suggestions: list[str | SuggestionRecord]
    fusions: dict[str, dict[str, Fused]]
    """By scenario and fused estimator."""
    prices: dict[str, list[float]]
    """By candidate whose layers are alike: KL to the unpruned model on held-out text, nats a token, of free layers and
    of these."""
    divergences: dict[str, list[float]]
    """By candidate whose units `search.learn` or `search.evolve` chose: KL to the unpruned model on held-out text, nats
    a token, before and after each round."""
    couplings: Couplings
    structures: list[TracedStructure]
    race: list[RaceRecord]
    uncompensated: dict[str, dict[str, str]]
    """Of a traced model: by method of compensation, the structures that it leaves as they are, and why."""
    frontier: Frontier
    trials: list[Trial]
    data: TrainingText
    training: Training
    planned_steps: int
    top_k_logits: Named
    """`k`, `rows` and `bytes` of the dense model's likeliest tokens on disk, where they are asked for."""
    first_loss: float | None
    """Held out, before the first step."""
    out: str
    """Directory of the recovered model."""


class Correlation(TypedDict, total=False):
    """A rank correlation of `fidelity.json`."""

    estimator: Required[str]
    scope: Required[str]
    measure: Required[Literal["spearman", "kendall", "spearman_in_layers", "kendall_in_layers"]]
    units: Required[int]
    value: Required[float]
    low: Required[float]
    high: Required[float]
    p_value: float
    windows: int


# --- the check -----------------------------------------------------------------------------------

_ACCEPTED: dict[Any, set[type]] = {
    float: {int, float}, int: {int}, str: {str}, bool: {bool}, types.NoneType: {types.NoneType},
}  # fmt: skip
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def fault_of(value: Any, kind: Any, place: str = "") -> str:
    """Return where a value of JSON is not of a type, what was expected and what came; empty where it is.

    >>> fault_of({"schema": 1, "stages": [{"name": "load"}]}, RunRecord)
    'stages[0]: expected a field seconds, got name'
    >>> fault_of({"schema": 1, "files": "all"}, RunRecord), fault_of({"schema": 1, "mine": 3}, RunRecord)
    ("files: expected a list, got 'all'", '')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _ACCEPTED or origin is Literal:
        accepted = type(value) in _ACCEPTED[kind] if kind in _ACCEPTED else value in inner
    elif origin in (Union, types.UnionType):
        faults = {option: fault_of(value, option, place) for option in inner}
        if not all(faults.values()):
            return ""
        return next((fault for option, fault in faults.items() if isinstance(value, _container(option))), "") or _fault(
            value, kind, place
        )
    else:
        accepted = isinstance(value, _container(kind))
    if not accepted:
        return _fault(value, kind, place)
    if is_typeddict(kind):
        return _field_fault(value, kind, place)
    if origin is list:
        if set(map(type, value)) <= _plain(inner[0]):  # at once: a run may hold a million numbers
            return ""
        return next((f for i, item in enumerate(value) if (f := fault_of(item, inner[0], f"{place}[{i}]"))), "")
    if origin is tuple:
        if len(value) != len(inner):
            return f"{place}: expected {len(inner)} values, got {len(value)}"
        return next((f for i, k in enumerate(inner) if (f := fault_of(value[i], k, f"{place}[{i}]"))), "")
    if origin is dict:
        return next((f for key, item in value.items() if (f := fault_of(item, inner[1], _inside(place, key)))), "")
    return ""


def _field_fault(value: dict[str, Any], kind: Any, place: str) -> str:
    fields, required = _fields(kind)
    for name in required:
        if name not in value:
            return f"{place or 'the object'}: expected a field {name}, got {', '.join(value)[:80] or 'none'}"
    return next((f for n in fields if n in value and (f := fault_of(value[n], fields[n], _inside(place, n)))), "")


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the type of each field of an object, and the names of those that have to be there."""
    return get_type_hints(kind), [name for name in kind.__annotations__ if name in kind.__required_keys__]


def _container(kind: Any) -> type | tuple[type, ...]:
    """Return the type that JSON gives a list or an object of a kind; none of what is neither."""
    if kind is Any:
        return object
    if is_typeddict(kind):
        return dict
    return {list: list, tuple: list, dict: dict}.get(get_origin(kind), ())


@functools.cache
def _plain(kind: Any) -> set[type]:
    """Return the types of a union that hold nothing else."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return set().union(*(_ACCEPTED.get(option, set()) for option in options))


def _inside(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _fault(value: Any, kind: Any, place: str) -> str:
    got = {dict: "an object", list: "a list"}.get(type(value)) or repr(value)[:60]
    return f"{place or 'the value'}: expected {_named(kind)}, got {got}"


def _named(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, get_args(kind))))
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return _NAMES.get(kind) or ("an object" if _container(kind) is dict else "a list")
