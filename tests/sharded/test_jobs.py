"""Jobs that try many keep-sets, or one unit at a time, on a mesh of eight devices: what they find on one device."""

import numpy as np
import pytest

from saap_jax.config.jobs import FidelityConfig, FrontierConfig, SensitivityConfig
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.contrib.frontier import command as frontier
from saap_jax.contrib.sensitivity import command as sensitivity
from saap_jax.estimation.ablation import changes_from_lines
from saap_jax.jobs import fidelity

pytestmark = pytest.mark.sharded
MESH = MeshConfig(data=4, fsdp=2)


def both(call, kind, directory, tmp_path, **options):
    """Return the runs of a job on one device and on the mesh."""
    options["model"] = ModelConfig(name=str(directory))
    options["calibration"] = CalibrationConfig(examples=8, length=16, batch_size=8)
    if kind is not FidelityConfig:
        options["evaluation"] = EvaluationConfig(windows=8, length=16, batch_size=8)
    meshes = enumerate((MeshConfig(), MESH))
    return [call(kind(runs=str(tmp_path / f"{number}"), mesh=mesh, **options)) for number, mesh in meshes]


@pytest.mark.parametrize(
    ("call", "kind", "options"),
    [
        (
            frontier.frontier,
            FrontierConfig,
            {"methods": ("wanda",), "ratios": (0.2, 0.4), "tolerance": 0.05, "resamples": 20},
        ),
        (sensitivity.sensitivity, SensitivityConfig, {"method": "wanda", "fractions": (0.5,)}),
    ],
    ids=["frontier", "sensitivity"],
)
def test_candidates_cost_what_they_cost_on_one_device(call, kind, options, tiny_model_directory, tmp_path):
    alone, spread = both(call, kind, tiny_model_directory, tmp_path, **options)
    rows, others = ({row["candidate"]: row for row in run.candidates()} for run in (alone, spread))
    assert rows.keys() == others.keys()
    assert len(rows) >= 4
    for name, row in rows.items():
        for metric, losses in row["losses"].items():
            np.testing.assert_allclose(others[name]["losses"][metric], losses, rtol=1e-5)
            assert np.abs(np.array(losses) - alone.record["dense"]["losses"][metric]).max() > 1e-4, "control"


def test_units_change_the_loss_as_on_one_device(tiny_model_directory, tmp_path):
    options = {"estimators": ("wanda", "gate_fisher"), "channels_per_layer": 3, "resamples": 20}
    exact, other = (
        changes_from_lines((run.path / "ablation.jsonl").read_text())
        for run in both(fidelity.judge, FidelityConfig, tiny_model_directory, tmp_path, **options)
    )
    assert exact.keys() == other.keys()
    assert len(exact) == 2 * (2 + 3)
    for unit, change in exact.items():
        assert other[unit] == pytest.approx(change, rel=1e-3, abs=1e-6)
    assert max(map(abs, exact.values())) > 1e-4, "control"
