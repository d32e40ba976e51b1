"""What a run costs, and a million tokens of a model.

    device-hours = seconds · devices / 3600
    USD = device-hours · USD an hour
    USD a million tokens = 1e6 / (tokens a second) / 3600 · devices · USD an hour

*Devices* are all that the run holds, whether they are busy or not, because all are paid for; on a CPU they are the
cores that the run may use. SAAP_USD_PER_HOUR says what one of yours costs, in the place of `PRICES`.
"""

import fnmatch
import os
from collections.abc import Sequence
from typing import NamedTuple

from saap_jax.runs.records import Cost, Devices, PerMillion, RunRecord


class Price(NamedTuple):
    """What an hour of a device costs, or of one core of a CPU."""

    kind: str
    device_kinds: tuple[str, ...]
    """What jax calls such a device; `*` stands for anything."""
    usd_per_hour: float
    date: str


PRICES = (
    Price("TPU v4", ("TPU v4",), 3.22, "2025"),
    Price("TPU v5e", ("TPU v5 lite", "TPU v5e"), 1.20, "2025"),
    Price("TPU v5p", ("TPU v5", "TPU v5p"), 4.20, "2025"),
    Price("TPU v6e", ("TPU v6 lite", "TPU v6e"), 2.70, "2025"),
    Price("NVIDIA H100", ("NVIDIA H100*",), 6.88, "2026-11"),
    Price("NVIDIA A100 80GB", ("NVIDIA A100*80GB*",), 3.43, "2026-11"),
    Price("NVIDIA A100", ("NVIDIA A100*",), 2.74, "2026-11"),
    Price("cpu", ("cpu",), 0.041, "2026-06"),
)
"""List prices on demand, without any discount, the first that fits: of Google Cloud for TPUs, of AWS for the rest (an
eighth of p5.48xlarge, p4de.24xlarge and p4d.24xlarge, half of m7g.large). A starting point, not an offer."""


def read_prices() -> tuple[Price, ...]:
    """Take the prices of `PRICES`, or the one that SAAP_USD_PER_HOUR names for every device.

    Raises:
        ValueError: it names no price.
    """
    if not (said := os.environ.get("SAAP_USD_PER_HOUR")):
        return PRICES
    try:
        usd = float(said)
    except ValueError:
        usd = -1.0
    if not 0 <= usd < 1e6:
        raise ValueError(f"SAAP_USD_PER_HOUR: expected US dollars an hour of a device, such as 2.10, got {said[:60]!r}")
    return (Price("SAAP_USD_PER_HOUR", ("*",), usd, ""),)


def find_price(device_kind: str, prices: Sequence[Price]) -> Price | None:
    """Find the first price for what jax calls `device_kind`.

    >>> find_price("NVIDIA H100 80GB HBM3", PRICES).usd_per_hour
    6.88
    """
    fits = (price for price in prices for each in price.device_kinds if fnmatch.fnmatchcase(device_kind, each))
    return next(fits, None)


def run_cost(run: RunRecord, prices: Sequence[Price]) -> Cost:
    """Add up `cost` of `run.json` from its `stages`, `devices` and `best`.

    Without a price for the device, amounts in US dollars are None and `note` says how to give one. A run that was taken
    up again counts as if all of it had been on the devices of its last call.

    Raises:
        ValueError: a run on a CPU whose record does not say how many cores it had.
    """
    about: Devices = run["devices"]
    devices = about["count"] if about["platform"] != "cpu" else about.get("cores")
    if not devices:
        raise ValueError(f"devices: expected the number of `cores` of a CPU, got {sorted(about)}; run it again")
    hours = sum((stage["seconds"] for stage in run["stages"]), 0.0) * devices / 3600
    cost: Cost = {"device_hours": hours, "devices": devices}
    price = find_price(about["kind"], prices)
    if price is None:
        note = f"no price for devices of kind {about['kind']!r}: set SAAP_USD_PER_HOUR to that of one"
        return {**cost, "usd": None, "usd_per_million_tokens": None, "prices": None, "note": note}
    best, million = run.get("best", {}), None
    if not isinstance(best, list) and {"dense_forward_seconds", "forward_seconds", "forward_tokens"} <= best.keys():
        seconds = (best["dense_forward_seconds"], best["forward_seconds"])
        dense, cut = (1e6 / (best["forward_tokens"] / s) * devices / 3600 * price.usd_per_hour for s in seconds)
        million: PerMillion | None = {"dense": dense, "cut": cut}
    record = {"kind": price.kind, "usd_per_hour": price.usd_per_hour, "date": price.date}
    return {**cost, "usd": hours * price.usd_per_hour, "usd_per_million_tokens": million, "prices": record}
