"""How units were chosen by divergence: what held-out text said before, and after each round."""

from collections.abc import Mapping, Sequence
from typing import Any

from saap_jax.report.figures.axes import BELOW, LEGEND_LINE
from saap_jax.report.figures.palette import line_style
from saap_jax.report.page.blocks import Plot
from saap_jax.report.page.formats import short_name


def divergence_plot(curves: Mapping[str, Sequence[float]]) -> Plot:
    """Return a line a candidate, of nats a token over rounds."""

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for place, (name, values) in enumerate(curves.items()):
            style = {**line_style(place).options(), "markersize": 3}
            axes.plot(range(len(values)), values, label=short_name(name, 38), **style)
        axes.set_xlabel("round over the calibration text")
        axes.set_ylabel("KL to the unpruned model\n(nats a token, held out)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(**BELOW)

    said = " ".join(f"{name}: {values[0]:.3f} before, {min(values):.3f} at best." for name, values in curves.items())
    return Plot("divergence", "Divergence by round", said, paint, 3.0 + LEGEND_LINE * len(curves), 6.75)
