"""Statistics come back from a file as they were, and a file that does not fit is refused in one line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from saap_jax.estimation.activations import BLOCK_CHANGE
from saap_jax.estimation.base import Curvature, Statistic
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.hessian import GATE_HESSIAN, curvature_of
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.reconstruction import SECOND_MOMENT
from saap_jax.estimation.registry import make_estimators
from saap_jax.estimation.squares import SQUARED_WEIGHT_GRADIENT
from saap_jax.estimation.storage import load_statistics, save_statistics
from saap_jax.estimation.taylor import WEIGHT_GRADIENT
from saap_jax.llama.model import abstract_llama
from saap_jax.trace.subject.subject import subject_of
from tests.helpers import PLAIN, dense_model, length_mask, random_model, random_tokens, spec_of
from tests.trace.subject.problems import problem_of, stacked

WEIGHTS = {WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT}
FEW = frozenset({BLOCK_CHANGE, GATE_GRADIENT, GATE_HESSIAN})


def model(seed: int = 0):
    return random_model(spec_of((2, 4), (0, 3)), seed)


@functools.cache
def observed(attention: str = "exact", needs: frozenset[Statistic] = PLAIN):
    """Return statistics of 3 examples and a padding row."""
    batches = [(random_tokens(4, 6), length_mask(6, 4, 5, 0, seq=6))]
    return observe(model(), batches, needs, curvature=Curvature(probes=3, attention=attention))


def assert_same(first, second) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "needs"), [("exact", PLAIN), ("probes", FEW)])
def test_what_is_loaded_is_what_was_saved(tmp_path, attention, needs):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".statistics.safetensors.partial").write_text("what a kill left")
    path = save_statistics(tmp_path / "new" / "statistics.safetensors", observed(attention, needs))
    loaded = load_statistics(path, model(seed=1))
    assert_same(loaded, observed(attention, needs))
    assert_same(load_statistics(path, abstract_llama(model().spec)), loaded)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert {tensor.dtype for tensor in load_file(path).values()} == {np.dtype(np.float32)}


@pytest.mark.slow
def test_only_some(tmp_path):
    small = PLAIN - WEIGHTS - {SECOND_MOMENT}
    path = save_statistics(tmp_path / "s", observed(), only=small)
    assert not any("weight_gradient" in name for name in load_file(path))
    assert set(load_statistics(path, model()).values) == small
    assert path.stat().st_size < save_statistics(tmp_path / "all", observed()).stat().st_size / 2


def test_statistics_of_somebody_else_are_left_alone(tmp_path):
    """Those of an array by itself, whose tensor has no name of its own, too."""
    seen = observed("probes", FEW)
    axes = {"init": lambda model, plan: None, "source": "weights", "accumulation": WEIGHT_GRADIENT.accumulation}
    one, tree = (Statistic(name=name, axes=lambda path: (), contribute=lambda x: x, **axes) for name in ("one", "tree"))
    values = seen.values | {one: jnp.ones(3), tree: {"a": jnp.ones(2)}}
    path = save_statistics(tmp_path / "s", seen._replace(values=values))
    assert {"one", "tree/a"} < set(load_file(path))
    assert_same(load_statistics(path, model()), seen)


def test_what_does_not_fit_is_refused(tmp_path):
    """A masked model, another one, other tensors, other metadata, numbers that are not finite or no floats."""
    with pytest.raises(ValueError, match="expected statistics of a whole model"):
        save_statistics(tmp_path / "masked", observed("probes", FEW)._replace(gates={}))
    path, name = save_statistics(tmp_path / "s", observed("probes", FEW)), "gate_gradient/mlp"
    with pytest.raises(ValueError, match=r"s: expected tensor .* of shape .* for this model, got .*; load it with"):
        load_statistics(path, dense_model())
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    counts = json.loads(metadata["counts"])

    def refused(match: str, values=tensors, **changed) -> None:
        values = {key: np.array(value, order="C") for key, value in values.items()}
        save_file(values, path, metadata | {"counts": json.dumps(counts | changed)} | changed.pop("raw", {}))
        with pytest.raises(ValueError, match=match) as error:
            load_statistics(path, model())
        assert "\n" not in str(error.value)

    refused(rf"{name} of shape \(3, 2, 4\) for this model, got \(3, 1, 4\)", tensors | {name: tensors[name][:, 1:]})
    fewer = {key: value for key, value in tensors.items() if key != name}
    refused(f"expected {len(tensors)} tensors, got {len(fewer)}", fewer)
    refused("no gate_gradient of mlp", fewer, tensors=len(fewer))
    refused(r"expected float32 \(F32\) in tensor losses, got I32", tensors | {"losses": np.ones(3, np.int32)})
    refused(rf"\(F32\) in tensor {name}, got F64", tensors | {name: tensors[name].astype(np.float64)})
    refused(rf"finite numbers in tensor {name}", tensors | {name: np.full_like(tensors[name], np.nan)})
    for text in ("", "{", "[]", '{"a": 1}'):
        refused("s: expected a file of 'saap_jax statistics 2', which cannot be read", raw={"counts": text})
    for wrong in ("many", "3", 0, -1, 3.0, True, None):
        refused(r"s: expected tokens to be a whole number above 0, got ", tokens=wrong)
        refused(r"s: expected examples to be a whole number above 0, got ", examples=wrong)
    refused(r"of shape \(2, 2, 2\) for this model, got \(3, 2, 2\)", examples=2)
    losses = {"losses": tensors["losses"]}
    refused(r"losses/ of shape \(2,\) for this model, got \(3,\)", losses, examples=2, statistics=[], tensors=1)
    names = counts["statistics"]
    for others in ([], ["second_moment"], [*names, "surprise"], names[1:]):
        refused(r"s: expected the statistics .*gate_gradient.*, of which it has tensors, got \[", statistics=others)
    save_file(tensors, path, metadata)
    assert_same(load_statistics(path, model()), observed("probes", FEW))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "none", model())
    (tmp_path / "junk").write_bytes(b"no tensors here, but more than eight bytes")
    with pytest.raises(ValueError, match="junk: expected a file of 'saap_jax statistics 2', which cannot be read"):
        load_statistics(tmp_path / "junk", model())
    save_file({"x": np.zeros(2)}, tmp_path / "model")
    with pytest.raises(ValueError, match="model: expected a file of 'saap_jax statistics 2', got None"):
        load_statistics(tmp_path / "model", model())


@pytest.mark.slow
def test_statistics_of_a_traced_model_come_back(tmp_path):
    """Units are `[copies, units]`, names of structures hold slashes; another model's are refused."""
    subject, names = subject_of(stacked()), ["taylor_element_second", "gate_fisher", "gate_hessian", "wanda"]
    estimators = make_estimators([*names, "activation_frequency"])
    needs, curvature = union_of_needs(estimators.values()), curvature_of(estimators.values())
    seen = subject.observe(subject.problem.calibration, needs, curvature=curvature)
    path = save_statistics(tmp_path / "s", seen)
    loaded = load_statistics(path, subject.weights)
    assert_same(loaded, seen)
    assert_same(score(estimators, loaded, subject.weights), score(estimators, seen, subject.weights))
    with pytest.raises(ValueError, match="s: expected "):
        load_statistics(path, subject_of(problem_of("moe")).weights)
