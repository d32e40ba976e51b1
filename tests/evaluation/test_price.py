"""Prices: arithmetic by hand, the table that comes with the package, and tables that are wrong."""

import re
from pathlib import Path

import pytest

import saap_jax
from saap_jax.evaluation import price
from saap_jax.evaluation.price import Price, find_price, no_price, read_prices, run_cost, usd_per_million_tokens

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


def test_a_cpu_is_paid_by_the_core():
    cost = run_cost(record("cpu", best=BEST), TABLE)
    assert (cost["devices"], cost["device_hours"], cost["usd"]) == (16, 16.0, pytest.approx(0.8))
    other = record("cpu")
    other["devices"].pop("cores")
    with pytest.raises(ValueError, match="expected the number of `cores` of a CPU"):
        run_cost(other, TABLE)


def test_without_a_timed_model_there_is_no_price_of_tokens():
    assert run_cost(record(), TABLE)["usd_per_million_tokens"] is None
    assert run_cost(record(best={"forward_tokens": 5}), TABLE)["usd_per_million_tokens"] is None


def test_an_unknown_device_costs_unknown_and_says_what_to_do():
    cost = run_cost(record("TPU v99", best=BEST), TABLE)
    assert cost == {
        "device_hours": 2.0,
        "devices": 2,
        "usd": None,
        "usd_per_million_tokens": None,
        "prices": None,
        "note": no_price("TPU v99"),
    }
    assert 'device_kinds = ["TPU v99"]' in cost["note"]
    assert "SAAP_PRICES" in cost["note"]
    assert "\n" not in cost["note"]


def test_the_entry_that_the_note_tells_to_add_is_found(tmp_path):
    entry = re.search(r"device_kinds = \[.*?\]", no_price("TPU v99"))
    assert entry is not None
    path = tmp_path / "prices.toml"
    path.write_text(
        price.TABLE.read_text() + f'\n[[price]]\nkind = "new"\n{entry[0]}\nusd_per_hour = 1\ndate = 2026-11-25\n'
    )
    found = find_price("TPU v99", read_prices(path))
    assert found == Price("new", ("TPU v99",), 1.0, "2026-11-25")


def test_the_first_entry_that_fits_counts_and_case_matters():
    table = (Price("a", ("GPU 1",), 1.0, "2026"), Price("b", ("GPU*",), 2.0, "2026"))
    assert [getattr(find_price(kind, table), "kind", None) for kind in ("GPU 1", "GPU 2", "gpu 2")] == ["a", "b", None]


def test_tokens_cost_less_on_a_faster_device():
    assert usd_per_million_tokens(2000.0, 3.0, 1) == usd_per_million_tokens(1000.0, 3.0, 1) / 2


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
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB"),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v3", None),
    ],
)
def test_the_packages_table(device_kind, kind, monkeypatch):
    monkeypatch.delenv("SAAP_PRICES", raising=False)
    found = find_price(device_kind, read_prices())
    assert getattr(found, "kind", None) == kind
    assert found is None or 0 < found.usd_per_hour < 100


def test_the_table_is_part_of_the_package():
    project = (Path(saap_jax.__file__).parent.parent / "pyproject.toml").read_text()
    listed = re.search(r"^saap_jax = \[(.*)\]$", project, re.M)
    assert listed is not None
    patterns = re.findall(r'"([^"]+)"', listed[1])
    inside = price.TABLE.relative_to(Path(saap_jax.__file__).parent)
    assert any(inside.match(pattern) for pattern in patterns)
    assert not inside.with_suffix(".json").match("evaluation/*.toml")


GOOD = '[[price]]\nkind = "a"\ndevice_kinds = ["a"]\nusd_per_hour = 1\ndate = "2026"\n'


def test_saap_prices_names_another_table(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    monkeypatch.setenv("SAAP_PRICES", str(path))
    assert read_prices() == (Price("a", ("a",), 1.0, "2026"),)
    monkeypatch.setenv("SAAP_PRICES", str(tmp_path / "missing.toml"))
    with pytest.raises(FileNotFoundError, match="check SAAP_PRICES"):
        read_prices()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[price", "expected TOML"),
        ("", "expected \\[\\[price\\]\\] entries"),
        ("price = 3", "expected \\[\\[price\\]\\] entries"),
        (GOOD + "[other]\n", "expected \\[\\[price\\]\\] entries"),
        (GOOD.replace('date = "2026"\n', ""), "expected date, device_kinds"),
        (GOOD + "usd = 3\n", "expected date, device_kinds"),
        (GOOD.replace('["a"]', '"a"'), "list of names as device_kinds"),
        (GOOD.replace('["a"]', "[]"), "list of names as device_kinds"),
        (GOOD.replace("= 1", "= -1"), "usd_per_hour in entry 1 of .*, got -1"),
        (GOOD.replace("= 1", "= nan"), "usd_per_hour"),
        (GOOD.replace("= 1", "= true"), "usd_per_hour"),
        (GOOD + GOOD.replace("= 1", '= "1"'), "usd_per_hour in entry 2"),
        (GOOD.replace("= 1", f"= 1{'0' * 400}"), "usd_per_hour"),
        (GOOD.replace("= 1", "= 1e300"), "usd_per_hour"),
        (GOOD.replace('"a"\nd', "[1]\nd"), "a text as kind and a date in entry 1 of"),
        (GOOD.replace('"2026"', "07:32:00"), "a text as kind and a date in entry 1 of"),
        ("x = " + "[" * 4_000, "expected TOML"),
        ("x = '\x00'", "expected TOML"),
        ("x" * 4_000 + " = 1", "expected \\[\\[price\\]\\] entries"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_prices(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(path) in str(caught.value)
