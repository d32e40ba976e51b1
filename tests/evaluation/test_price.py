"""Prices: arithmetic by hand, the table that comes with the package, and the price of one's own."""

import pytest

from saap_jax.evaluation.price import PRICES, Price, find_price, read_prices, run_cost

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
    other = record("cpu")
    other["devices"].pop("cores")
    with pytest.raises(ValueError, match="expected the number of `cores` of a CPU"):
        run_cost(other, TABLE)


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


@pytest.mark.parametrize(
    ("device_kind", "kind"),
    [
        ("cpu", "cpu"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v3", None),
    ],
)
def test_the_table(device_kind, kind):
    assert getattr(find_price(device_kind, PRICES), "kind", None) == kind
