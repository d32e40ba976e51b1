"""Stage 4: what a run costs, and a million tokens of a model, from a table of prices that is meant to be edited.

    device-hours = seconds · devices / 3600
    USD = device-hours · USD an hour
    USD a million tokens = 1e6 / (tokens a second) / 3600 · devices · USD an hour

*Devices* are all that the run holds, whether they are busy or not, because all are paid for; on a CPU they are the
cores that the run may use. The table is `prices.toml` beside this module, or the file that SAAP_PRICES names.
"""

import datetime
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saap_jax.formats.json_files import shown
from saap_jax.formats.toml_files import read_toml
from saap_jax.runs.records import Cost, Devices, PerMillion, RunRecord

TABLE = Path(__file__).with_name("prices.toml")
"""The table that comes with the package."""

MOST_USD = 1e6
"""A price of a device-hour below which a price is one; others overflow when they are multiplied."""

_REQUIRED, _OPTIONAL = {"kind", "device_kinds", "usd_per_hour", "date"}, {"source"}


class Price(NamedTuple):
    """An entry of the table."""

    kind: str
    device_kinds: tuple[str, ...]
    """What jax calls such a device; `*` stands for anything."""
    usd_per_hour: float
    """For one device, or one core of a CPU."""
    date: str


def read_prices(path: str | os.PathLike[str] | None = None) -> tuple[Price, ...]:
    """Read a table of prices: `path`, or else the file that SAAP_PRICES names, or else the one of the package.

    Raises:
        FileNotFoundError: SAAP_PRICES or `path` names no file.
        ValueError: it is no table of prices.
    """
    path = Path(path or os.environ.get("SAAP_PRICES") or TABLE)
    if not path.is_file():
        raise FileNotFoundError(f"prices: expected a file at {path}, found none; check SAAP_PRICES, or unset it")
    table = read_toml(path, "prices")
    entries = table.get("price")
    if set(table) != {"price"} or not isinstance(entries, list) or not entries:
        raise ValueError(f"prices: expected [[price]] entries and nothing else in {path}, got {shown(sorted(table))}")
    return tuple(_price(entry, f"entry {number} of {path}") for number, entry in enumerate(entries, start=1))


def find_price(device_kind: str, prices: Sequence[Price]) -> Price | None:
    """Return the first entry for what jax calls `device_kind`, None if the table has none.

    >>> find_price("NVIDIA H100 80GB HBM3", [Price("NVIDIA H100", ("NVIDIA H100*",), 5.0, "2026")]).usd_per_hour
    5.0
    """
    fits = (price for price in prices for each in price.device_kinds if fnmatch.fnmatchcase(device_kind, each))
    return next(fits, None)


def no_price(device_kind: str) -> str:
    """Say how a price is added for a device that the table does not have."""
    return (
        f"no price for devices of kind {device_kind!r}: copy saap_jax/evaluation/prices.toml, add an entry with "
        f'device_kinds = ["{device_kind}"], and name the copy in SAAP_PRICES'
    )


def device_hours(seconds: float, devices: int) -> float:
    """Return seconds · devices / 3600.

    >>> device_hours(1800.0, 4)
    2.0
    """
    return seconds * devices / 3600


def usd_per_million_tokens(tokens_per_second: float, usd_per_hour: float, devices: int) -> float:
    """Return what a million tokens cost at a measured rate, in US dollars.

    >>> usd_per_million_tokens(1000.0, usd_per_hour=3.6, devices=2)
    2.0
    """
    return device_hours(1e6 / tokens_per_second, devices) * usd_per_hour


def run_cost(run: RunRecord, prices: Sequence[Price]) -> Cost:
    """Return the cost of a run: `cost` of `run.json`, made from its `stages`, `devices` and `best`.

    Returns:
        `device_hours` and the number of `devices`; in US dollars `usd`, and `usd_per_million_tokens` of the `dense`
        and the `cut` model in the timed forward pass (None where none was timed); `prices` is the entry that counted.
        Without an entry for the device, `usd`, `usd_per_million_tokens` and `prices` are None, and `note` says how to
        add one. A run that was taken up again counts as if all of it had been on the devices of its last call.

    Raises:
        ValueError: a run on a CPU whose record does not say how many cores it had.
    """
    about, devices = run["devices"], _billed(run["devices"])
    hours = device_hours(sum((stage["seconds"] for stage in run["stages"]), 0.0), devices)
    cost: Cost = {"device_hours": hours, "devices": devices}
    price = find_price(about["kind"], prices)
    if price is None:
        return {**cost, "usd": None, "usd_per_million_tokens": None, "prices": None, "note": no_price(about["kind"])}
    best, million = run.get("best", {}), None
    if not isinstance(best, list) and {"dense_forward_seconds", "forward_seconds", "forward_tokens"} <= best.keys():
        seconds = (best["dense_forward_seconds"], best["forward_seconds"])
        dense, cut = (usd_per_million_tokens(best["forward_tokens"] / s, price.usd_per_hour, devices) for s in seconds)
        million: PerMillion | None = {"dense": dense, "cut": cut}
    return {
        **cost,
        "usd": hours * price.usd_per_hour,
        "usd_per_million_tokens": million,
        "prices": {"kind": price.kind, "usd_per_hour": price.usd_per_hour, "date": price.date},
    }


def _billed(devices: Devices) -> int:
    """Return how many devices are paid for; of a CPU, how many cores."""
    if devices["platform"] != "cpu":
        return devices["count"]
    if not (cores := devices.get("cores")):
        raise ValueError(f"devices: expected the number of `cores` of a CPU, got {sorted(devices)}; run it again")
    return cores


def _price(entry: Any, where: str) -> Price:
    """Check an entry of the table."""
    if not isinstance(entry, dict) or not _REQUIRED <= set(entry) <= _REQUIRED | _OPTIONAL:
        expected = f"{', '.join(sorted(_REQUIRED))} and at most {', '.join(_OPTIONAL)}"
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"prices: expected {expected} in {where}, got {shown(found)}; correct the file")
    kind, kinds, usd, date = (entry[name] for name in ("kind", "device_kinds", "usd_per_hour", "date"))
    if not isinstance(kinds, list) or not kinds or not all(isinstance(each, str) for each in kinds):
        raise ValueError(f"prices: expected a list of names as device_kinds in {where}, got {shown(kinds)}")
    if type(usd) not in (int, float) or not 0 <= usd < MOST_USD:
        raise ValueError(f"prices: expected a number of US dollars as usd_per_hour in {where}, got {shown(usd)}")
    if not isinstance(kind, str) or not isinstance(date, str | datetime.date):
        raise ValueError(f"prices: expected a text as kind and a date in {where}, got {shown([kind, date])}")
    return Price(kind, tuple(kinds), float(usd), str(date))
