"""What may go: layers that are left alone, floors, widths, how much of it is attention.

The one step of this kind is `within`. What it says holds for all allocations and refinements behind it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from saap_jax.checks import Share, at_least, check_share
from saap_jax.steps.base import Context, State, Step, options_of, step
from saap_jax.types import Keep, Limits


@step("within")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Within(Step):
    """Say what may go: what is left alone, floors and widths, and how much of what goes is attention."""

    kind = "limits"
    after = ()
    _given: ClassVar[frozenset[str]] = frozenset()

    protect: tuple[int | float, ...] = ()
    """Layers left alone; negative numbers count from the end. A share is of the layers: 0.13 leaves the first 13 % of
    them alone, -0.07 the last 7 %, rounded to whole layers."""
    attention: Annotated[float | None, check_share] = None
    """Share of the removed parameters that comes from attention; None: the allocation decides. Layers with no more
    attention units than `min_keep`, such as a single KV head, give none; where all are so, all comes from the MLP."""
    attention_from: Share = 0.0
    """Share of the prunable parameters up to which all comes from the MLP; `attention` is then of what goes beyond."""
    min_keep: Annotated[int | dict[str, int], at_least(0)] = 1
    """Units that each layer (of a traced model, each copy of a structure) keeps at least; one number for all, or
    `{attention: 0, mlp: 1}`, of a traced model by name or pattern."""
    max_ratio: Annotated[float | dict[str, float], check_share] = 1.0
    """Largest share of a layer's units that may go; 0 leaves a structure alone."""
    multiple_of: Annotated[int | dict[str, int], at_least(1)] = 1
    """Kept widths of what is pruned are multiples of these, such as `{mlp: 128}`."""
    depth: bool = False
    """Remove whole sub-blocks: all units of a layer and structure or none. Needs `min_keep` 0 of that structure."""
    whole_layers: bool = False
    """With `depth`: attention and MLP of a layer go together."""

    def __new__(cls, **given: Any) -> "Within":
        """Note which options are given, so that one which is as usual holds against `within` before it."""
        made = super().__new__(cls)
        object.__setattr__(made, "_given", frozenset(given))
        return made

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in self.protect:
            if isinstance(layer, float) and not -1 < layer < 1:
                raise ValueError(
                    f"within.protect: expected numbers of layers, or shares of them in (-1, 1), got {layer}"
                )
        if self.attention_from and self.attention is None:
            raise ValueError(f"within.attention_from: expected attention beside it, got {self.attention_from} alone")
        if self.whole_layers and not self.depth:
            raise ValueError("within.whole_layers: expected depth beside it, got depth False")

    @property
    def non_default_options(self) -> dict[str, Any]:
        """The options that are given."""
        return {each.name: getattr(self, each.name) for each in options_of(self) if each.name in self._given}

    def __call__(self, state: State, on: Context) -> State:
        """Add these limits to those of the steps before."""
        return state._replace(limits=self.joined(state.limits))

    def joined(self, earlier: "Within") -> "Within":
        """Return the limits of both; an option that is given here takes the place of the earlier one."""
        return dataclasses.replace(earlier, **self.non_default_options)

    def check_structures(self, known: Sequence[str]) -> None:
        """Raise ValueError for an option of a structure that a model of layers does not have."""
        for option in ("min_keep", "max_ratio", "multiple_of"):
            value = getattr(self, option)
            for name in value if isinstance(value, Mapping) else ():
                if name not in known:
                    raise ValueError(f"within.{option}: expected some of {', '.join(known)}, got {name!r}")

    def check_traced(self) -> None:
        """Raise ValueError for what only attention and MLP of layers have."""
        for name, value in super().non_default_options.items():
            if name not in ("min_keep", "max_ratio", "multiple_of"):
                raise ValueError(
                    f"within.{name}: is for attention and MLP of layers, which a traced model does not tell apart, got "
                    f"{value}; leave it out"
                )

    def value(self, option: str, structure: str, default: int | float) -> int | float:
        """Read an option for a structure."""
        value = getattr(self, option)
        if isinstance(value, Mapping):
            return value.get(structure, default)
        return value

    def layer(self, structure: str) -> Limits:
        """Limit each layer's attention or MLP."""
        least = int(self.value("min_keep", structure, 1))
        most = float(self.value("max_ratio", structure, 1.0))
        return Limits(least, most, int(self.value("multiple_of", structure, 1)))

    def at(self, ratio: float) -> "Within":
        """Set the limits at a ratio: with a share for attention of all that goes.

        >>> Within(attention=0.2, attention_from=0.25).at(0.5).attention
        0.1
        """
        if not (self.attention_from and self.attention):
            return self
        beyond = max(ratio - self.attention_from, 0.0) / (ratio or 1.0)
        return dataclasses.replace(self, attention=self.attention * beyond, attention_from=0.0)

    def where_can_go(self, existing: Keep) -> "Within":
        """Return the limits without a share for attention where no layer has more of its units than it keeps at least.

        So it is with a single KV head in each layer: all that goes is then of the MLP.
        """
        least = self.layer("attention").min_keep
        if self.attention and (existing["attention"].sum(axis=1) <= least).all():
            return dataclasses.replace(self, attention=0.0, attention_from=0.0)
        return self


def limits_at_end(state: State, on: Context) -> Any:
    """Return the limits of a state at the ratio of the end of the chain: those of layers, `Within`."""
    return state.subject.limits(state.limits.at(on.final))


def protected(protect: Sequence[int | float], layers: int) -> np.ndarray:
    """List the layers that are left alone; negative numbers count from the end, shares are of the layers.

    >>> protected((0.13, -0.07), 32).nonzero()[0].tolist()
    [0, 1, 2, 3, 30, 31]
    """
    found = np.zeros(layers, bool)
    for layer in protect:
        if isinstance(layer, float):
            count = round(abs(layer) * layers)
            found[slice(count) if layer >= 0 else slice(layers - count, None)] = True
            continue
        if not -layers <= layer < layers:
            raise ValueError(
                f"within.protect: expected layers in [-{layers}, {layers}) of this model, got {layer}; say which of "
                "its layers are left alone, or () for none"
            )
        found[layer] = True
    return found


def first_prunable(keep: Keep, existing: Keep, within: Within) -> int:
    """Count the layers in front of the first one that has lost units, or may lose some.

    >>> whole = {"mlp": np.ones((4, 2), bool)}
    >>> first_prunable(whole, whole, Within(protect=(0, 1, 3)))
    2
    """
    losing = np.zeros(len(keep[next(iter(keep))]), bool)
    for name, levels in levels_of(existing, within).items():
        losing |= (keep[name] != existing[name]).any(axis=1)
        losing |= np.array([len(each) > 1 for each in levels])
    if losing.any():
        return int(np.argmax(losing))
    return 0


def stops_of(units: int, limits: Limits, depth: bool) -> np.ndarray:
    """List the ends of blocks, counted in a layer's units, ascending."""
    most = min(units - limits.min_keep, math.floor(units * limits.max_ratio * (1 + 1e-12)))
    if depth:
        if units:
            return np.arange(units, most + 1)
        return np.zeros(0, np.int64)
    return np.arange(units % limits.multiple_of or limits.multiple_of, most + 1, limits.multiple_of)


def levels_of(existing: Keep, within: Within) -> dict[str, list[np.ndarray]]:
    """List the numbers of units that each layer may lose, ascending from 0; a list over layers a structure."""
    found = {}
    for name, exists in existing.items():
        limits = within.layer(name)
        removable = np.where(protected(within.protect, len(exists)), 0, exists.sum(axis=1))
        found[name] = []
        for units in removable.tolist():
            stops = stops_of(units, limits, within.depth)
            found[name].append(np.concatenate([np.zeros(1, np.int64), stops]))
    return found
