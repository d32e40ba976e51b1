"""The page's colours, light and dark: told apart by colour-blind readers, and from the page that they lie on."""

import itertools
import re

import numpy as np
import pytest

from saap_jax.report.figures.palette import COLOURS as OKABE_ITO
from saap_jax.report.figures.palette import DISTINCT, line_style
from saap_jax.report.page.html import style_sheet

SIGHT = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
"""Linear RGB as it is seen; Machado, Oliveira & Fernandes, IEEE TVCG 15(6), 2009, severity 1."""

XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    """Return a colour as linear RGB."""
    values = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return linear RGB as CIELAB."""
    xyz = XYZ @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colours: tuple[str, ...] | list[str]) -> float:
    """Return the least distance (ΔE of 1976) between two colours, to any kind of sight."""
    return min(
        float(np.linalg.norm(lab(sight @ linear(a)) - lab(sight @ linear(b))))
        for sight in SIGHT.values()
        for a, b in itertools.combinations(colours, 2)
    )


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(XYZ[1] @ linear(colour)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def theme(dark: bool) -> dict[str, str]:
    """Return the colours of the style sheet by name."""
    light, _, rest = style_sheet().partition("@media (prefers-color-scheme: dark)")
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", rest.partition("* {")[0] if dark else light))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
class TestTheme:
    def test_colours_are_told_apart_as_well_as_okabe_and_itos(self, dark):
        colours = [theme(dark)[f"c{number}"] for number in range(len(OKABE_ITO))]
        assert nearest(colours) >= nearest(OKABE_ITO)

    def test_colours_stand_out_from_the_page(self, dark):
        colours = theme(dark)
        for number, ground in itertools.product(range(len(OKABE_ITO)), ("page", "card")):
            assert contrast(colours[f"c{number}"], colours[ground]) >= 3

    def test_text_stands_out_from_the_page(self, dark):
        colours = theme(dark)
        for ink, ground in itertools.product(("ink", "soft", "link"), ("page", "card", "mark")):
            assert contrast(colours[ink], colours[ground]) >= 4.5


def test_that_colours_are_too_near_is_seen():
    assert nearest(["#d55e00", "#9a6b00"]) < 6, "as red and green are to many"
    assert np.linalg.norm(lab(linear("#d55e00")) - lab(linear("#9a6b00"))) > 25


def test_lines_differ_in_colour_or_dash_and_nearly_all_in_their_marker():
    styles = [line_style(place) for place in range(DISTINCT)]
    assert DISTINCT >= 40
    assert len({(style.colour, style.dash) for style in styles}) == DISTINCT
    assert len({(style.colour, style.marker) for style in styles}) == DISTINCT, (
        "of short lines, markers tell them apart"
    )
    again = line_style(DISTINCT)
    assert (again.colour, again.dash) == styles[0][:2], "no more than that"
