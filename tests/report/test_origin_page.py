"""The page of a model that a command made: what its card says, and what of each layer is left."""

import json
import re

import pytest

from saap_jax.cli import main
from saap_jax.config.jobs import PruneConfig
from saap_jax.config.method import CalibrationConfig, ModelConfig
from saap_jax.jobs.prune import prune
from saap_jax.report.blocks import Figure
from saap_jax.report.figures.draw import painted
from saap_jax.report.write import read_view, render_report, write_reports
from tests.report.shown import blocks_of


@pytest.fixture(scope="module")
def model(tiny_model_directory, tmp_path_factory):
    """A model that lost 30 %."""
    out = tmp_path_factory.mktemp("models") / "small"
    prune(
        PruneConfig(
            model=ModelConfig(name=str(tiny_model_directory)),
            calibration=CalibrationConfig(examples=4, length=16, batch_size=2),
            method="magnitude > uniform",
            ratio=0.3,
            out=str(out),
        )
    )
    return out


def test_it_says_what_the_record_says(model):
    view = read_view(model)
    step = json.loads((model / "saap.json").read_text())["steps"][0]
    assert (view.name, view.kind, view.status) == ("small", "pruned", "saved")
    page = render_report(model)
    assert "method" in page
    assert "magnitude" in page
    assert f"{step['parameters'][1]:,}" in page
    (figure,) = blocks_of(view, Figure)
    keep = json.loads((model / "keep.json").read_text())
    for axis, structure in zip(painted(figure).axes, ("attention", "mlp"), strict=False):
        shares = [100 * len(row) / keep[structure]["units"] for row in keep[structure]["kept"]]
        assert axis.collections[0].get_array().ravel().tolist() == pytest.approx(shares)
    gone = [entry for entry in keep.values() if any(len(row) < entry["units"] for row in entry["kept"])]
    assert gone, "negative control"


def test_it_is_written_where_it_is_asked_for(model, tmp_path, capsys):
    assert main.main(["report", str(model), "--out", str(tmp_path / "page.html")]) == 0
    assert "What is kept where" in (tmp_path / "page.html").read_text()
    assert re.search(r"^# small", (tmp_path / "page.md").read_text(), re.M)
    written = write_reports([model, model], tmp_path / "both.html")
    assert written[0].read_text().count("What is kept where") == 2
    capsys.readouterr()
    assert main.main(["report", str(model.parent)]) == 2
    assert "found no run.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"mlp": {"units": 2, "kept": [[0, 1, 2]]}}', "expected at most 2 units of mlp in a layer, got 3"),
        ('{"mlp": {"units": 2, "kept": 3}}', "the file was changed or damaged"),
        ("[]", "expected a JSON object"),
    ],
)
def test_damaged_units_are_one_line(text, said, model, tmp_path, capsys):
    for name in ("saap.json", "README.md"):
        (tmp_path / name).write_text((model / name).read_text())
    assert main.main(["report", str(tmp_path)]) == 0
    (tmp_path / "keep.json").write_text(text)
    capsys.readouterr()
    assert main.main(["report", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
