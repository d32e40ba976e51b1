"""Statistics come back from a file as they were, and a file that does not fit is refused in one line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from saap_jax.estimation import (
    BLOCK_CHANGE,
    GATE_GRADIENT,
    GATE_HESSIAN,
    GRAM,
    SECOND_MOMENT,
    SQUARED_WEIGHT_GRADIENT,
    WEIGHT_GRADIENT,
    Curvature,
    Statistic,
    curvature_of,
    load_statistics,
    make_estimators,
    observe,
    save_statistics,
    score,
    storage,
    union_of_needs,
)
from saap_jax.llama.model import abstract_llama
from saap_jax.trace.subject import subject_of
from tests.helpers import PLAIN, dense_model, length_mask, random_model, random_tokens, spec_of
from tests.trace.subject.problems import problem_of, stacked

WIDTHS = (2, 4), (0, 3)
WEIGHTS = {WEIGHT_GRADIENT, SQUARED_WEIGHT_GRADIENT}
SCENARIOS = ("builtin:reference", "text:/a/b.txt")


def model(seed: int = 0):
    return random_model(spec_of(*WIDTHS), seed)


FEW = frozenset({BLOCK_CHANGE, GATE_GRADIENT, GATE_HESSIAN})


@functools.cache
def observed(attention: str = "exact", needs: frozenset[Statistic] = PLAIN):
    """Return statistics of two scenarios of 3 and 2 examples, and a padding row: one program observes both."""
    masks = length_mask(6, 4, 5, seq=6), length_mask(6, 3, 0, seq=6)
    return {
        name: observe(
            model(),
            [(random_tokens(len(mask), 6, seed), mask)],
            needs,
            curvature=Curvature(probes=3, attention=attention),
        )
        for seed, (name, mask) in enumerate(zip(SCENARIOS, masks, strict=True))
    }


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
    assert list(loaded) == list(SCENARIOS)
    assert_same(loaded, observed(attention, needs))
    assert_same(load_statistics(path, abstract_llama(model().spec)), loaded)
    with pytest.raises(AssertionError):
        assert_same(loaded[SCENARIOS[0]].values[BLOCK_CHANGE], loaded[SCENARIOS[1]].values[BLOCK_CHANGE])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.slow
def test_layout_of_the_file(tmp_path):
    path = save_statistics(tmp_path / "s", observed())
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    name = f"{SCENARIOS[1]}/squared_weight_gradient/segments/0/mlp/down"
    expected = observed()[SCENARIOS[1]].values[SQUARED_WEIGHT_GRADIENT].segments[0].mlp.down[...]
    np.testing.assert_array_equal(tensors[name], expected)
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["scenarios"])
    assert [(s["examples"], s["tokens"]) for s in about.values()] == [(3, 12), (2, 7)]


@pytest.mark.slow
def test_only_some(tmp_path):
    small = PLAIN - WEIGHTS - {GRAM, SECOND_MOMENT}
    path = save_statistics(tmp_path / "s", observed(), only=small)
    assert not any("weight_gradient" in name for name in load_file(path))
    loaded = load_statistics(path, model())[SCENARIOS[0]]
    assert set(loaded.values) == small
    with pytest.raises(ValueError, match="statistic weight_gradient was not observed"):
        score(make_estimators(["taylor_vector"]), loaded, model())
    assert path.stat().st_size < save_statistics(tmp_path / "all", observed()).stat().st_size / 2


def test_statistics_of_somebody_else_are_left_alone(tmp_path):
    """Those of an array by itself, whose tensor has no name of its own, too."""
    seen = observed("probes", FEW)[SCENARIOS[0]]
    axes = {"init": lambda model, plan: None, "source": "weights", "accumulation": WEIGHT_GRADIENT.accumulation}
    one, tree = (Statistic(name=name, axes=lambda path: (), contribute=lambda x: x, **axes) for name in ("one", "tree"))
    values = seen.values | {one: jnp.ones(3), tree: {"a": jnp.ones(2)}}
    path = save_statistics(tmp_path / "s", {SCENARIOS[0]: seen._replace(values=values)})
    assert {f"{SCENARIOS[0]}/one", f"{SCENARIOS[0]}/tree/a"} < set(load_file(path))
    assert_same(load_statistics(path, model())[SCENARIOS[0]], seen)


class TestRefuses:
    def kept(self):
        return observed("probes", FEW)

    @pytest.fixture
    def path(self, tmp_path):
        return save_statistics(tmp_path / "s", self.kept())

    def test_another_model(self, path):
        with pytest.raises(ValueError, match=r"s: expected tensor .* of shape .* for this model, got .*; load it with"):
            load_statistics(path, dense_model())

    def test_tensors_of_other_names_or_shapes(self, path):
        tensors, name = load_file(path), f"{SCENARIOS[0]}/gate_gradient/mlp"
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        for change, message in (
            ({name: tensors[name][:, 1:]}, rf"{name} of shape \(3, 2, 4\) for this model, got \(3, 1, 4\)"),
        ):
            save_file({k: np.array(v, order="C") for k, v in {**tensors, **change}.items()}, path, metadata)
            with pytest.raises(ValueError, match=message):
                load_statistics(path, model())
        save_file({k: v for k, v in tensors.items() if k != name}, path, metadata)
        with pytest.raises(ValueError, match=rf"{name} of shape \(3, 2, 4\) for this model, got None"):
            load_statistics(path, model())
        save_file(tensors, path, metadata)
        assert_same(load_statistics(path, model()), self.kept())

    def test_metadata_that_say_something_else(self, path):
        tensors, first = load_file(path), SCENARIOS[0]
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
        about = json.loads(metadata["scenarios"])

        def refused(text: str, match: str, values=tensors) -> None:
            save_file(values, path, metadata | {"scenarios": text})
            with pytest.raises(ValueError, match=match) as error:
                load_statistics(path, model())
            assert "\n" not in str(error.value)

        for text in ("", "{", "[]", "1", '{"a": 1}'):
            refused(text, "s: expected a file of 'saap_jax statistics 1', which cannot be read")
        for key, value, match in (
            ("examples", None, "cannot be read"),
            ("examples", 2, r"of shape \(2, 2, 2\) for this model, got \(3, 2, 2\)"),
            ("tokens", "many", "cannot be read"),
            ("statistics", 3, "cannot be read"),
            ("statistics", ["gram"], "gram/.* for this model, got None"),
        ):
            refused(json.dumps(about | {first: about[first] | {key: value}}), match)
        fewer = about | {first: {"examples": 2, "tokens": 3, "statistics": []}}
        refused(json.dumps(fewer), "expected the losses of 2 examples, got 3")
        name = f"{first}/gate_gradient/mlp"
        broken = np.where(tensors[name] == tensors[name].max(), np.nan, tensors[name])
        refused(metadata["scenarios"], f"finite numbers in tensor {name}", tensors | {name: broken})
        save_file(tensors, path, metadata)
        assert_same(load_statistics(path, model()), self.kept())
        with pytest.raises(ValueError, match="expected statistics of scenario 'none', got those of"):
            storage.load_scenario(path, model(), "none")

    def test_other_files(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_statistics(tmp_path / "none", model())
        (tmp_path / "junk").write_bytes(b"no tensors here, but more than eight bytes")
        with pytest.raises(ValueError, match="junk: expected a file of 'saap_jax statistics 1', which cannot be read"):
            load_statistics(tmp_path / "junk", model())
        save_file({"x": np.zeros(2)}, tmp_path / "model")
        with pytest.raises(ValueError, match="model: expected a file of 'saap_jax statistics 1', got None"):
            load_statistics(tmp_path / "model", model())


@pytest.mark.slow
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = save_statistics(tmp_path / "s", observed())
    before = path.read_bytes()

    def fail(tensors, target, dtype, about):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(storage, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save_statistics(path, observed("probes", FEW))
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_statistics_of_a_traced_model_come_back(tmp_path):
    """Units are `[copies, units]`, names of structures hold slashes; another model's are refused."""
    subject, names = subject_of(stacked()), ["taylor_element_second", "gate_fisher", "gate_hessian", "wanda"]
    estimators = make_estimators([*names, "activation_frequency"])
    needs, curvature = union_of_needs(estimators.values()), curvature_of(estimators.values())
    seen = subject.observe(subject.problem.calibration, needs, curvature=curvature)
    path = save_statistics(tmp_path / "s", {"a": seen})
    loaded = load_statistics(path, subject.weights)["a"]
    assert_same(loaded, seen)
    assert_same(score(estimators, loaded, subject.weights), score(estimators, seen, subject.weights))
    with pytest.raises(ValueError, match="s: expected "):
        load_statistics(path, subject_of(problem_of("moe")).weights)
