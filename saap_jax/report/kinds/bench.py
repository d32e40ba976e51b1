"""What `saap bench` found: the sizes of the models, and their times a workload."""

from typing import Any

from saap_jax.report.page.blocks import Table, Words, text_table
from saap_jax.report.page.formats import format_count, format_mebibytes, format_millions, format_milliseconds

Record = dict[str, Any]


def bench_blocks(result: Record) -> list[Table | Words]:
    """Return the sizes of the models, a table of times a workload, and what the columns are."""
    groups: dict[tuple[int, int, int], list[Record]] = {}
    for row in result["workloads"]:
        groups.setdefault((row["batch"], row["prompt"], row["new"]), []).append(row)
    return [_sizes(result), *(_times(rows) for rows in groups.values()), *map(Words, footnotes(result))]


def _sizes(result: Record) -> Table:
    header = ("model", "layers", "params (M)", "MMACs a token", "weights (MiB)")
    lines = [
        (
            row["model"],
            str(row["layers"]),
            *(format_millions(float(row[key])) for key in ("parameters", "macs_per_token")),
            format_mebibytes(float(row["weight_bytes"])),
        )
        for row in result["models"]
    ]
    return text_table(f"size, {result['dtype']}", header, lines)


def _times(rows: list[Record]) -> Table:
    first = rows[0]
    title = f"batch {first['batch']}, {first['prompt']} prompt tokens, {first['new']} new ones"
    header = ("model", "prefill (ms)", "first (ms)", "tokens a second", "memory (MiB)", "prefill x", "decode x")
    lines = []
    for row in rows:
        memory = row["memory_bytes"]
        lines.append(
            (
                row["model"],
                _interval(row["prefill_seconds"], format_milliseconds),
                format_milliseconds(row["first_token_seconds"]["median"]),
                _interval(row["tokens_per_second"], format_rate) if "tokens_per_second" in row else "-",
                "n/a" if memory is None else format_mebibytes(float(memory)),
                format_speed_up(row["prefill_speed_up"]),
                format_speed_up(row["decode_speed_up"]) if "decode_speed_up" in row else "-",
            )
        )
    return text_table(title, header, lines)


def footnotes(result: Record) -> list[str]:
    """Say what the columns are."""
    devices = result["devices"]
    cores = f", {devices['cores']} cores" if devices["platform"] == "cpu" else ""
    where = f"{devices['count']} x {devices['kind']}{cores}"
    return [
        f"median (smallest to largest) of {result['repeats']} measurements, models in turns, on {where}",
        f"x: times faster than {result['baseline']}, measured / predicted; prefill is predicted by operations,"
        " decode by bytes of weights and cache",
        "MACs a token: entries of all matrices, unembedding included; memory: weights, cache and temporaries of the"
        " larger program, as the compiler counts them",
    ]


def _interval(values: Record, form: Any) -> str:
    if values["low"] == values["high"]:  # of one measurement
        return form(values["median"])
    return f"{form(values['median'])} ({form(values['low'])} to {form(values['high'])})"


def format_speed_up(values: Record) -> str:
    """Return measured and predicted speed-up.

    >>> format_speed_up({"median": 1.514, "low": 1.4, "high": 1.6, "predicted": 1.652})
    '1.51 / 1.65'
    """
    return f"{values['median']:.2f} / {values['predicted']:.2f}"


def format_rate(value: float) -> str:
    """Return tokens a second with three digits at least.

    >>> [format_rate(value) for value in (8.127, 24.66, 1534.2)]
    ['8.13', '24.7', '1,534']
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else format_count(value)
