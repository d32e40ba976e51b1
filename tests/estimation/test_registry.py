"""Estimators by name, and what it takes to add one."""

import re
from pathlib import Path

import numpy as np
import pytest

from saap_jax.api import select_units
from saap_jax.estimation import (
    ACTIVATION_MOMENTS,
    ESTIMATORS,
    STATISTICS,
    Moments,
    make_estimator,
    make_estimators,
    observe,
    score,
    union_of_needs,
)
from saap_jax.llama.segments import existing_units
from tests.helpers import layers_of, ragged_model, random_tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taylor_elemnt", "unknown estimator 'taylor_elemnt'; did you mean 'taylor_element'"),
        ("wanda(reduction='max')", "estimator 'wanda': unknown hyper-parameter 'reduction'; it takes none"),
        ("taylor_element('max')", "expected NAME or NAME"),
        ("taylor_element(reduction=max())", "expected NAME or NAME"),
        ("taylor_element(**{'reduction': 'max'})", "expected NAME or NAME"),
        ("taylor_element(", "expected NAME or NAME"),
        ("taylor_element(reduction=3)", "reduction: expected 'sum' or 'mean' or 'max' or 'prod' or 'last', got 3"),
        ("fluctuation(standardize=1)", "standardize: expected bool, got 1"),
        ("gate_hessian(probes=1.5)", "probes: expected int, got 1.5"),
        ("gate_hessian(seed=-1)", "gate_hessian: seed: expected a number in [0, 2^32), got -1"),
        ("block_influence(granularity=None)", "granularity: expected 'sub_block' or 'layer', got None"),
        ("gate_hessian(probes=0)", "expected probes >= 1, got 0"),
        ("gate_hessian(attention='all')", "expected attention 'exact' or 'probes', got 'all'"),
        ("obs(block=0)", "obs: block: expected at least 1, got 0"),
        ("leverage(damping=-1.0)", "leverage: expected damping above 0, got -1.0"),
        ("activation_frequency(multiple='1')", "multiple: expected float or int, got '1'"),
        (f"wanda({'(' * 400}", "expected NAME or NAME"),
        (f"wanda(x={'-' * 900}1)", "expected NAME or NAME"),
        ("wan\0da", "expected NAME or NAME"),
        ("", "expected NAME or NAME"),
    ],
)
def test_bad_names_are_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_estimator(text)
    assert "\n" not in str(error.value)


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValueError, match="estimator 'wanda' is named twice"):
        make_estimators(["wanda", "magnitude", "wanda"])
    with pytest.raises(ValueError, match="expected at least one estimator"):
        make_estimators([])


def test_every_name_is_made_with_its_defaults():
    for name in ESTIMATORS:
        assert make_estimator(f" {name}() ").needs == make_estimator(name).needs <= set(STATISTICS.values())


def test_the_how_to_adds_an_estimator(monkeypatch):
    """The example of docs/new_estimator.md, as it stands there, is enough."""
    page = (Path(__file__).parents[2] / "docs/new_estimator.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    module: dict = {}
    exec(compile(code, "docs/new_estimator.md", "exec"), module)
    monkeypatch.setitem(ESTIMATORS, "energy", module["energy"])

    model = ragged_model()
    made = make_estimators(["energy", "energy(root=True)"])
    statistics = observe(model, [(random_tokens(3, 8), np.ones((3, 8), bool))], union_of_needs(made.values()))
    scores = score(made, statistics, model)

    moments: Moments = statistics.of(ACTIVATION_MOMENTS)
    down = layers_of(model)[2]["mlp/down"]
    by_hand = [moments.square["mlp"][2, unit, 0] * (down[unit] ** 2).sum() for unit in range(3)]
    np.testing.assert_allclose(scores["energy"]["mlp"][2], [*by_hand, *[np.nan] * 3], rtol=1e-5)
    np.testing.assert_allclose(scores["energy(root=True)"]["mlp"] ** 2, scores["energy"]["mlp"], rtol=1e-5)

    existing = existing_units(model.segments)
    selection = select_units(model, scores["energy"], 0.3, "global")
    assert selection.actual >= 0.3
    for layer in range(4):
        kept, gone = selection.keep["mlp"][layer], existing["mlp"][layer] & ~selection.keep["mlp"][layer]
        if gone.any():
            assert scores["energy"]["mlp"][layer][gone].max() <= scores["energy"]["mlp"][layer][kept].min()
    with pytest.raises(ValueError, match="did you mean 'energy'"):
        make_estimator("enrgy")
