"""Costs: bytes and dollars are exact; times are numbers, about whose size no test can say anything."""

import jax
import jax.numpy as jnp
import pytest

from saap_jax.evaluation.cost import (
    Price,
    forward_bytes,
    forward_seconds,
    forward_step,
    prefill_macs,
    read_prices,
    run_cost,
    step_bytes,
    token_macs,
)
from saap_jax.llama.decoder import empty_cache, extend, fused_layers, single_layers
from saap_jax.llama.segments import existing_units
from saap_jax.planning.count import work_of
from saap_jax.structures.discovery import count_parameters, weight_bytes
from saap_jax.surgery.cut import cut
from tests.helpers import dense_model, ragged_model, random_keep, random_tokens


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes(tied):
    model = dense_model("gqa", layers=2, mlp=6, tied=tied)
    parameters = 2 * (2 * 192 + 6 * 24 + 2 * 8) + 8 + (1 if tied else 2) * 24 * 8
    assert count_parameters(model) == parameters
    assert weight_bytes(model) == 4 * parameters
    assert weight_bytes(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)) == 2 * parameters


def test_forward_seconds_times_compiled_programs():
    """Each model compiles once, before its time is taken."""
    model, before = dense_model(mlp=8), forward_step._cache_size()
    forward_seconds([model, model], random_tokens(2, 6), repeats=3)
    assert forward_step._cache_size() == before + 1


def test_forward_bytes_are_weights_results_and_temporaries():
    model, tokens = dense_model(), random_tokens(2, 6)
    pruned = cut(model, random_keep(existing_units(model.segments), 0.5))
    logits = 4 * 2 * 6 * model.spec.vocab
    assert forward_bytes(model, tokens) >= weight_bytes(model) + logits
    assert forward_bytes(model, tokens) == forward_bytes(model, tokens)
    assert forward_bytes(pruned, tokens) < forward_bytes(model, tokens) < forward_bytes(model, random_tokens(4, 6))


def counted(function, *arguments) -> float:
    """Return the multiply-accumulates of a function's matrix products, read off its program."""
    return work_of(jax.make_jaxpr(function)(*arguments), frozenset()).flops / 2


@pytest.mark.slow
@pytest.mark.parametrize("form", [single_layers, fused_layers])
@pytest.mark.parametrize("make", [dense_model, ragged_model, lambda: dense_model("mqa", tied=True)])
def test_operations_are_those_of_the_programs(make, form):
    model = form(make())
    start, slot = jnp.zeros(3, jnp.int32), jnp.int32(0)

    def read(tokens, empty):
        hidden, _ = extend(model, tokens, empty_cache(model, 3, 16), start, slot, empty=empty)
        return model.logits(hidden[:, -1:])

    tokens = jnp.zeros((3, 7), jnp.int32)
    assert counted(lambda t: read(t, True), tokens) == prefill_macs(model, 3, 7)
    assert counted(lambda t: read(t, False), tokens[:, :1]) == 3 * token_macs(model, 16)
    assert counted(lambda t: read(t, False), tokens[:, :1]) != 3 * token_macs(model, 15)


def test_operations_by_hand():
    model = dense_model("gqa", layers=2, mlp=6)
    assert token_macs(model) == 2 * (2 * 192 + 6 * 24) + 24 * 8
    assert token_macs(model, 10, unembed=False) == 2 * (2 * 192 + 6 * 24) + 2 * 2 * 4 * 4 * 10


def test_a_step_reads_weights_and_cache():
    tied, untied = dense_model(tied=True), dense_model()
    cache = 2 * 2 * 2 * 4 * 4  # layers, keys and values, heads, head_dim, bytes
    assert step_bytes(tied, 3, 10) == weight_bytes(tied) + 3 * 10 * cache
    assert step_bytes(untied, 3, 10) == weight_bytes(untied) - 4 * (24 - 3) * 8 + 3 * 10 * cache


# --- dollars -------------------------------------------------------------------------------------

TABLE = (Price("gpu", ("NVIDIA X*",), 4.0, "2026-01"), Price("cpu", ("cpu",), 0.05, "2026-02"))
BEST = {"forward_tokens": 1000, "forward_seconds": 0.25, "dense_forward_seconds": 0.5}
STAGES = [{"name": "load", "seconds": 900.0}, {"name": "score", "seconds": 2700.0}]


def record(kind: str = "NVIDIA X9", **fields) -> dict:
    platform = "cpu" if kind == "cpu" else "gpu"
    return {"devices": {"platform": platform, "kind": kind, "count": 2, "cores": 16}, "stages": STAGES} | fields


def test_cost_of_a_run():
    assert run_cost(record(best=BEST), TABLE) == {
        "device_hours": 2.0,
        "devices": 2,
        "usd": 8.0,
        "usd_per_million_tokens": {"dense": pytest.approx(500 / 3600 * 8), "cut": pytest.approx(250 / 3600 * 8)},
        "prices": {"kind": "gpu", "usd_per_hour": 4.0, "date": "2026-01"},
    }
    assert run_cost(record(best={"forward_tokens": 5}), TABLE)["usd_per_million_tokens"] is None, "nothing was timed"


def test_a_cpu_is_paid_by_the_core():
    cost = run_cost(record("cpu", best=BEST), TABLE)
    assert (cost["devices"], cost["device_hours"], cost["usd"]) == (16, 16.0, pytest.approx(0.8))


def test_of_an_unknown_device_one_says_the_price(monkeypatch):
    cost = run_cost(record("TPU v99", best=BEST), TABLE)
    assert (cost["device_hours"], cost["usd"], cost["prices"]) == (2.0, None, None)
    assert "'TPU v99': set SAAP_USD_PER_HOUR" in cost["note"]
    monkeypatch.setenv("SAAP_USD_PER_HOUR", "2.10")
    assert run_cost(record("TPU v99"), read_prices())["usd"] == 4.2
    for wrong in ("two", "-1", "nan", "1e300"):
        monkeypatch.setenv("SAAP_USD_PER_HOUR", wrong)
        with pytest.raises(ValueError, match="SAAP_USD_PER_HOUR: expected US dollars"):
            read_prices()
