"""How what is left of a layer stands in for what was removed."""

import dataclasses
import math
from typing import Literal

from saap_jax.config.checks import check_at_least, check_choices
from saap_jax.config.registries import CORRECTIONS

Propagate = Literal["dense", "pruned"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompensationConfig:
    """How what is left of a layer stands in for what was removed: in closed form, or by one factor a unit."""

    method: str = "none"
    """What is done to each output projection: `least_squares` changes its kept weights, `bias` adds what it lacks on
    average, `none` nothing; or one that was registered in `CORRECTIONS`. `scales`, alone or behind one of these
    (`least_squares+scales`), then trains one factor for each kept unit towards what the unpruned model predicts, all
    weights frozen."""
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
                f"{HELD_OUT}th out, got {count}; give more calibration.examples, a smaller calibration.batch_size, a "
                "number for compensation.damping, or compensation.method none"
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


HELD_OUT = 4
"""Every fourth microbatch is held out when the damping of a compensation is chosen; then all are used."""
