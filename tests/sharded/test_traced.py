"""Traced models on a mesh of eight devices: scores, losses, ablation, compensation and the cut model of one device."""

import json

import jax
import numpy as np
import pytest

from saap_jax.cli.main import main
from saap_jax.config.mesh import MeshConfig
from saap_jax.runtime.mesh import layout_of
from saap_jax.trace.subject.problem import place_rows
from saap_jax.trace.subject.subject import subject_of
from tests.trace.subject.problems import calibrate, repaired, selected
from tests.trace.subject.test_compensation import transformer, transformer_problem

pytestmark = pytest.mark.sharded
NAMES = ("magnitude", "taylor_element", "taylor_element_second", "gate_taylor", "gate_hessian", "wanda",
         "fluctuation", "ablation")  # fmt: skip


def compensated(subject, keep, place):
    """Compute a compensated model's losses, dense and masked; those of the cut and of the loaded one are the same."""
    held_out = subject.problem.held_out
    new, corrections = repaired(subject, keep, damping=0.1)
    assert corrections
    (group,) = new.losses(held_out, [subject.existing, keep], batch_size=8, at_once=2)
    cut = new.cut(keep)
    cut.save(place, keep)
    loaded = subject.load(place)
    np.testing.assert_allclose(cut.losses(held_out, 8).means, group[1].means, rtol=1e-3)
    np.testing.assert_allclose(loaded.losses(held_out, 8).means, cut.losses(held_out, 8).means, rtol=1e-4)
    return [group[0].means, group[1].means], loaded


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device finds: scores, chosen units, losses."""
    subject = transformer(x64=False)
    found = calibrate(subject, NAMES, batch_size=8)
    keep = selected(subject, found, "wanda", 0.3).keep
    return found, keep, compensated(subject, keep, tmp_path_factory.mktemp("alone") / "cut")[0]


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=4, fsdp=2)], ids=["data", "data and fsdp"])
def test_everything_is_what_it_is_on_one_device(mesh, alone, tmp_path):
    found, keep, expected = alone
    spread = subject_of(transformer_problem(), layout=layout_of(mesh))
    parts = {leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(spread.problem.params)}
    assert parts == ({True, False} if mesh.fsdp > 1 else {False}) or parts == {True}
    rows = place_rows(spread.problem.calibration, spread.layout)[0]
    assert rows.sharding.shard_shape(rows.shape)[0] == len(rows) // 8
    other = calibrate(spread, NAMES, batch_size=8)
    for name in NAMES:
        for structure, values in found.scores(name).items():
            np.testing.assert_allclose(
                other.scores(name)[structure], values, rtol=1e-3, atol=1e-5, err_msg=f"{name} {structure}"
            )
            assert np.std(np.asarray(values)) > 1e-4, "control"
    losses, loaded = compensated(spread, keep, tmp_path / "cut")
    if mesh.fsdp > 1:
        assert len({leaf.sharding for leaf in jax.tree.leaves(loaded.params)}) > 1
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3, "control"


FILE = """
from tests.trace.subject.test_compensation import transformer_problem as problem
"""


def test_compare_and_prune_take_a_mesh(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    words = ["compare", "mine.py:problem", "--methods", "wanda", "gate_taylor", "--ratios", "0.3"]
    assert main([*words, "--name", "alone"]) == 0
    assert main([*words, "--name", "spread", "--mesh.data", "4", "--mesh.fsdp", "2"]) == 0
    alone, spread = (
        [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "spread")
    )
    for one, other in zip(alone, spread, strict=True):
        assert one["kept"] == other["kept"]
        np.testing.assert_allclose(one["losses"]["loss held_out"], other["losses"]["loss held_out"], rtol=1e-3)
    assert main(["prune", "mine.py:problem", "--ratio", "0.25", "--mesh.data", "8", "--out", "small"]) == 0
    capsys.readouterr()
    assert main([*words, "--name", "odd", "--mesh.data", "8", "--calibration.batch-size", "6"]) == 2
    assert "calibration.batch_size: expected a multiple of 8" in capsys.readouterr().err
