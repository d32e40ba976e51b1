"""The course of a training: its loss at each step, and the held-out loss."""

from typing import Any

from saap_jax.report.figures.axes import BELOW, LEGEND_LINE
from saap_jax.report.figures.palette import COLOURS
from saap_jax.report.page.blocks import Plot

_LINES = (("loss", 0, "", "training"), ("held_out", 1, "o", "held out"))
"""Field of a step, its colour and marker, and its name."""


def training_plot(curves: dict[str, list[tuple[int, float]]]) -> Plot:
    """Return `{field: [(step, loss)]}` of the fields `loss` and `held_out` as lines."""
    said = [
        f"{name.capitalize()}: {points[0][1]:.3f} at step {points[0][0]}, {points[-1][1]:.3f} at step {points[-1][0]}."
        for field, _, _, name in _LINES
        if (points := curves.get(field))
    ]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for field, colour, marker, name in _LINES:
            if points := curves.get(field):
                steps, losses = zip(*points, strict=True)
                style = {"color": COLOURS[colour], "marker": marker, "markersize": 4, "linewidth": 1}
                axes.plot(steps, losses, label=name, **style)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("loss (nats a token)")
        if any(curves.values()):
            figure.legend(**BELOW)

    return Plot("training", "Loss of training", " ".join(said), paint, 3.2 + 2 * LEGEND_LINE)
