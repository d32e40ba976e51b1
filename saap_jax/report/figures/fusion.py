"""Fusions: σ of every member over gradient steps or layers, and the weights that follow."""

from typing import Any

import numpy as np

from saap_jax.report.figures.axes import LEGEND_LINE, logarithmic
from saap_jax.report.figures.palette import COLOURS, INK
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import short_name
from saap_jax.runs.records import Fused
from saap_jax.steps.score.fusion import scope_parts

_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
"""A structure each."""

_MARKERS = ("o", "s", "^")
"""The same, for points."""

_HIGH, _COLUMNS = 2.8, 2
"""Inches of a fusion without its legend, and columns of that."""


def fusion_plot(fusions: dict[str, dict[str, Fused]], said: str) -> Plot:
    """Return σ and the weights of every fusion: a row a scenario and fused estimator, all axes logarithmic.

    Left σ over gradient steps where there were any, else its value in each scope; right the weights. Colour is the
    member, dashes are the structure. With a scope a layer, values are drawn over layers. `said` are the numbers in
    words.
    """
    each = [(scenario, name, fused) for scenario, named in fusions.items() for name, fused in named.items()]

    def paint(figure: Any) -> None:
        figure.get_layout_engine().set(hspace=0.08, wspace=0.04)
        for axes, (scenario, name, fused) in zip(figure.subplots(len(each), 2, squeeze=False), each, strict=True):
            _paint(axes[0], axes[1], fused)
            axes[0].set_title(short_name(f"{scenario}: {name}", 48))
            axes[1].set_title("weight, 1 / (2 σ²)")

    description = f"Uncertainties σ of the fused estimators and the weights that follow. {said}"
    return Plot("fusion", "Fusion: σ and weights", description, paint, sum(map(_height, each)))


def _height(each: tuple[str, str, Fused]) -> float:
    """Return the inches of a fusion with its legend: members, and structures at most."""
    sigmas = each[2]["sigmas"]
    lines = len(sigmas) + len({scope_parts(scope)[0] for scope in next(iter(sigmas.values()))})
    return _HIGH + LEGEND_LINE * -(-lines // _COLUMNS)


def _paint(left: Any, right: Any, fused: Fused) -> None:
    """Draw one fusion on two axes."""
    from matplotlib.lines import Line2D

    members, scopes = list(fused["sigmas"]), list(next(iter(fused["sigmas"].values())))
    structures = list(dict.fromkeys(scope_parts(scope)[0] for scope in scopes))
    layered = any(scope_parts(scope)[1] is not None for scope in scopes)
    if steps := fused.get("trajectory"):
        _trajectory(left, steps, scopes, structures)
    elif layered:
        _by_layer(left, fused["sigmas"], structures)
    else:
        _points(left, fused["sigmas"], scopes)
    left.set_ylabel("σ")
    if layered:
        _by_layer(right, fused["weights"], structures)
    else:
        _bars(right, fused["weights"], scopes)
    for axis in (left, right):
        axis.set_yscale("log")
        logarithmic(axis)
    handles = [Line2D([], [], color=_colour(index), linewidth=3) for index in range(len(members))]
    names = [short_name(member) for member in members]
    if len(structures) > 1 and (layered or steps):
        handles += [Line2D([], [], color=INK, linewidth=1.2, linestyle=_DASHES[i % 3]) for i in range(len(structures))]
        names += structures
    left.legend(handles, names, loc="upper left", bbox_to_anchor=(-0.02, -0.26), ncols=_COLUMNS, handlelength=1.8)


def _trajectory(axis: Any, steps: dict[str, list], scopes: list[str], structures: list[str]) -> None:
    """Draw σ over gradient steps, a line a member and scope; many lines are thin."""
    many = len(scopes) > 4
    width, opacity = (0.6, 0.6) if many else (1.4, 1.0)
    for index, values in enumerate(steps.values()):
        lines = np.asarray(values, np.float64)
        shown = np.arange(len(lines))
        if many:  # keeps the file small; on this axis σ goes straight until it settles
            shown = shown[(shown < 20) | (shown % 5 == 0) | (shown == len(lines) - 1)]
        for scope, line in zip(scopes, lines[shown].T, strict=True):
            dashes = _DASHES[structures.index(scope_parts(scope)[0]) % 3]
            axis.plot(shown, line, color=_colour(index, opacity), linestyle=dashes, linewidth=width)
    axis.set_xlabel("gradient step")
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)


def _by_layer(axis: Any, values: dict[str, dict[str, float]], structures: list[str]) -> None:
    """Draw values over layers, a line a member and structure."""
    for index, by_scope in enumerate(values.values()):
        for which, structure in enumerate(structures):
            split = ((scope_parts(scope), value) for scope, value in by_scope.items())
            own = {layer: value for (name, layer), value in split if name == structure and layer is not None}
            style: dict = {"linestyle": _DASHES[which % 3], "marker": _MARKERS[which % 3], "markersize": 2.5}
            axis.plot(list(own), list(own.values()), color=_colour(index), linewidth=1.0, **style)
    axis.set_xlabel("layer")
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)


def _points(axis: Any, values: dict[str, dict[str, float]], scopes: list[str]) -> None:
    """Draw one point a member and scope."""
    for index, (place, by_scope) in enumerate(zip(_places(len(values)), values.values(), strict=True)):
        axis.plot(np.arange(len(scopes)) + place, list(by_scope.values()), "o", color=_colour(index), markersize=6)
    _name_scopes(axis, scopes)


def _bars(axis: Any, values: dict[str, dict[str, float]], scopes: list[str]) -> None:
    """Draw one bar a member and scope, its value on top: on a logarithmic axis lengths alone say little."""
    lowest = min(value for by_scope in values.values() for value in by_scope.values())
    width, turned = 0.8 / len(values), len(values) * len(scopes) > 6
    for index, (place, by_scope) in enumerate(zip(_places(len(values)), values.values(), strict=True)):
        heights = np.asarray(list(by_scope.values()), np.float64)
        bars = axis.bar(
            np.arange(len(scopes)) + place, heights - lowest / 4, width, bottom=lowest / 4, color=_colour(index)
        )
        labels = [f"{height:.3g}" for height in heights]
        axis.bar_label(bars, labels, padding=2, fontsize=7.5, rotation=90 if turned else 0)
    axis.set_yscale("log")
    axis.margins(y=0.45 if turned else 0.2)
    _name_scopes(axis, scopes)


def _name_scopes(axis: Any, scopes: list[str]) -> None:
    axis.set_xlim(-0.6, len(scopes) - 0.4)
    axis.set_xticks(range(len(scopes)), scopes)


def _places(members: int) -> np.ndarray:
    """Return where each member stands around its scope: side by side on 0.8 of the room."""
    return (np.arange(members) - (members - 1) / 2) * 0.8 / members


def _colour(index: int, opacity: float = 1.0) -> tuple[str, float]:
    """Return colour and opacity of a member; a second round of colours is paler."""
    return COLOURS[index % len(COLOURS)], opacity if index < len(COLOURS) else 0.45 * opacity
