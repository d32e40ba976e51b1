"""Methods that somebody else registers can be named in configurations; a name that is none is refused in one line."""

import numpy as np
import pytest
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.registries import ALLOCATIONS, CORRECTIONS, Allocation, CorrectionMethod, Registry
from saap_jax.config.search import SearchConfig
from saap_jax.selection.budget import shares_of
from saap_jax.selection.search import search

from saap_jax.config.method import GridConfig
from saap_jax.surgery.corrections import SOLVERS


def test_a_registry():
    registry: Registry[Allocation] = Registry()
    mine = registry.register("mine", Allocation())
    assert registry.register("mine", mine) is mine
    with pytest.raises(ValueError, match="register: 'mine' exists already; choose another name"):
        registry.register("mine", Allocation(stability=True))
    with pytest.raises(ValueError, match="register: expected an identifier, got 'a b'"):
        registry.register("a b", mine)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SearchConfig(allocation="globl"),
            "search.allocation: expected one of uniform, uniform_floor, log, softmax, global, adaptive, got",
        ),
        (lambda: GridConfig(allocations=("globl",)), "grid.allocations: .* got 'globl'; did you mean 'global'"),
        (lambda: CompensationConfig(method="bia"), "compensation.method: expected one of none, bias, least_squares"),
        (lambda: GridConfig(compensations=("bia",)), "grid.compensations: .* got 'bia'; did you mean 'bias'"),
    ],
)
def test_an_unknown_name_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_every_correction_is_solved():
    assert {name for name, method in CORRECTIONS.items() if method.solve is None} == {"none", *SOLVERS}


def test_an_allocation_of_ones_own_decides_the_widths(monkeypatch):
    scores = {"attention": np.ones((3, 4)), "mlp": np.arange(1.0, 31).reshape(3, 10)}
    costs = {"attention": np.full(3, 10), "mlp": np.full(3, 4)}
    existing = {name: np.ones(values.shape, bool) for name, values in scores.items()}

    def kept(config: SearchConfig) -> list[int]:
        return search(scores, costs, existing, 0.1, config).keep["mlp"].sum(axis=1).tolist()

    monkeypatch.setitem(ALLOCATIONS, "last", Allocation(budgets=lambda size: size * [0, 0, 1] / size[-1]))
    monkeypatch.setitem(
        ALLOCATIONS, "reversed", Allocation(priority=lambda scores, _: {n: -s for n, s in scores.items()})
    )
    last, plain = kept(SearchConfig(allocation="last", attention_share=0.0)), kept(SearchConfig(attention_share=0.0))
    assert last[:2] == [10, 10]
    assert last[2] < min(plain)
    ranked = {name: kept(SearchConfig(allocation=name, attention_share=0.0)) for name in ("global", "reversed")}
    assert ranked["global"] == ranked["reversed"][::-1] != ranked["reversed"]
    with pytest.raises(ValueError, match="search.allocation: solver 'exact' needs a ranking"):
        SearchConfig(allocation="last", solver="exact")
    half = Allocation(budgets=lambda size: size / 2)
    with pytest.raises(ValueError, match="expected shares of at least 0 that make 1 for 2 budgets, got"):
        shares_of(half, np.array([1, 0, 2]), np.ones(3), SearchConfig(), np.ones(3), 1)
    with pytest.raises(ValueError, match="Allocation: expected budgets or budgets_by_scores, got both"):
        Allocation(budgets=lambda size: size, budgets_by_scores=lambda size, scores, _: size)


def test_a_correction_with_a_damping_holds_text_out(monkeypatch):
    monkeypatch.setitem(CORRECTIONS, "mine", CorrectionMethod(damped=True))
    with pytest.raises(ValueError, match="expected at least 4 microbatches"):
        CompensationConfig(method="mine").check_microbatches(3)
    monkeypatch.setitem(CORRECTIONS, "mine", CorrectionMethod())
    CompensationConfig(method="mine").check_microbatches(3)
