"""Estimators by name, and what it takes to add one."""

import re
from pathlib import Path

import numpy as np
import pytest

from saap_jax.api import select_units
from saap_jax.estimation.activations import ACTIVATION_MOMENTS, Moments
from saap_jax.estimation.observe import observe, score, union_of_needs
from saap_jax.estimation.registry import ESTIMATORS, STATISTICS, make_estimator, make_estimators
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
        ("taylor_element(reduction=3)", "reduction: expected one of sum, mean, max, prod, last, got 3"),
        ("fluctuation(standardize=1)", "standardize: expected bool, got 1"),
        ("gate_hessian(probes=1.5)", "probes: expected int, got 1.5"),
        ("gate_hessian(seed=-1)", "gate_hessian.seed: expected a number in [0, 2^32), got -1"),
        ("block_influence(granularity=None)", "granularity: expected one of sub_block, layer, got None"),
        ("gate_hessian(probes=0)", "gate_hessian.probes: expected at least 1, got 0"),
        ("gate_hessian(attention='all')", "'gate_hessian': attention: expected one of exact, probes, got 'all'"),
        ("obs(block=0)", "estimator 'obs': block: expected at least 1, got 0"),
        ("leverage(damping=-1.0)", "estimator 'leverage': damping: expected a number above 0, got -1.0"),
        ("activation_frequency(multiple='1')", "multiple: expected int | float, got '1'"),
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


OWN = """
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import saap_jax.estimation.registry

if TYPE_CHECKING:
    from nowhere import Thing


def mine(*, root: bool = False, sizes: tuple[int, ...] = (1,), way: Literal["a"] | None = None, more: Any = 0):
    return saap_jax.estimation.registry.make_estimator("wanda")


def other(*, share: float, thing: Thing = 0):
    return mine()
"""


def test_hyper_parameters_of_a_file_are_checked_however_they_are_annotated(tmp_path):
    for number, text in enumerate((OWN, OWN.replace("from __future__ import annotations", "Thing = int"))):
        file = tmp_path / f"own{number}.py"
        file.write_text(text)
        wanda = make_estimator("wanda")
        for call in ("mine(root=True)", "mine(sizes=(1, 2), way=a, more='b')", "other(share=1, thing=3)"):
            assert make_estimator(f"{file}:{call}") == wanda
        for call, said in {
            "mine(root=1)": "'mine': root: expected bool, got 1",
            "mine(sizes=(1, 'b'))": r"sizes: expected tuple\[int, ...\], got \(1, 'b'\)",
            "mine(way=b)": "way: expected .*, got 'b'",
            "other()": "'other': missing a required argument: 'share'",
        }.items():
            with pytest.raises(ValueError, match=said):
                make_estimator(f"{file}:{call}")


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValueError, match="estimator 'wanda' is named twice"):
        make_estimators(["wanda", "magnitude", "wanda"])
    with pytest.raises(ValueError, match="expected at least one estimator"):
        make_estimators([])


def test_every_name_is_made_with_its_defaults():
    for name in ESTIMATORS:
        assert make_estimator(f" {name}() ").needs == make_estimator(name).needs <= set(STATISTICS.values())


def test_the_how_to_adds_an_estimator(monkeypatch):
    """The example of docs/estimator.md, as it stands there, is enough."""
    page = (Path(__file__).parents[2] / "docs/estimator.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    module: dict = {}
    exec(compile(code, "docs/estimator.md", "exec"), module)
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
