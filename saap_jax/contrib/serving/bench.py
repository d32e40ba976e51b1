"""What `saap bench` runs: models loaded beside each other, each workload timed, the result as plain values."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saap_jax.config.use import BenchConfig
from saap_jax.evaluation.cost import prefill_macs, step_bytes, token_macs
from saap_jax.evaluation.timing import Programs, Times, Workload, compile_programs, speed_up, spread, time_in_turns
from saap_jax.llama.files.load import load_model
from saap_jax.llama.generate import decoder_of, rounded
from saap_jax.report.blocks import Block, Words, text_table
from saap_jax.report.formats import format_count, format_mebibytes, format_millions, format_milliseconds
from saap_jax.runtime.digests import provenance
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.progress import Track, quiet
from saap_jax.structures.discovery import count_parameters, weight_bytes

Record = dict[str, Any]


def bench(config: BenchConfig, *, track: Track = quiet) -> Record:
    """Measure every model on every workload, and write the result to `config.json` if that is named.

    All models are in memory together, because they take turns.

    Returns:
        `baseline`, `models` (a row a model), `workloads` (a row a model and workload; seconds and bytes), `versions`,
        `devices`.

    Raises:
        ValueError: a workload does not fit a model; the file's directory does not exist.
        FileNotFoundError: no such model.
    """
    check_target("json", config.json)
    baseline = config.baseline or config.models[0]
    names = list(dict.fromkeys([baseline, *config.models]))
    models = {name: decoder_of(load_model(name, config.dtype)) for name in track("load models", names, len(names))}
    sizes = [
        {
            "model": name,
            "parameters": count_parameters(model),
            "macs_per_token": token_macs(model),
            "weight_bytes": weight_bytes(model),
            "layers": len(model.spec.layers),
        }
        for name, model in models.items()
    ]
    rows: list[Record] = []
    for batch, prompt in itertools.product(config.batch_sizes, config.prompt_lengths):
        workload = Workload(batch, prompt, config.new_tokens)
        what = f"{batch} x {prompt} + {config.new_tokens}"
        programs = [
            compile_programs(model, workload) for model in track(f"compile {what}", models.values(), len(names))
        ]
        turns = config.repeats + 1
        times = time_in_turns(programs, config.repeats, progress=lambda each: track(f"time {what}", each, turns))  # noqa: B023
        place = names.index(baseline)
        for name, mine, measured in zip(names, programs, times, strict=True):
            rows.append({"model": name} | _row(mine, measured, programs[place], times[place]))
    result = {
        "baseline": baseline,
        "dtype": config.dtype,
        "repeats": config.repeats,
        "models": sizes,
        "workloads": rows,
        **provenance(),
    }
    if config.json:
        write_atomically(Path(config.json), json.dumps(result, indent=1).encode() + b"\n")
    return result


def _row(mine: Programs, times: list[Times], base: Programs, base_times: list[Times]) -> Record:
    batch, prompt, new = mine.workload
    faster = speed_up(mine, times, base, base_times)
    row: Record = {
        "batch": batch,
        "prompt": prompt,
        "padded": rounded(prompt),
        "new": new,
        "memory_bytes": mine.memory_bytes,
        "prefill_macs": prefill_macs(mine.model, batch, rounded(prompt)),
        "step_bytes": step_bytes(mine.model, batch, prompt + new / 2),
        "prefill_seconds": spread(t.prefill for t in times)._asdict(),
        "first_token_seconds": spread(t.first_token for t in times)._asdict(),
        "prefill_speed_up": {"predicted": faster.prefill, **faster.measured_prefill._asdict()},
    }
    if new > 1:
        row["step_seconds"] = spread(t.step for t in times)._asdict()
        row["tokens_per_second"] = spread(batch / t.step for t in times)._asdict()
        row["decode_speed_up"] = {"predicted": faster.step, **faster.measured_step._asdict()}
    return row


def shown(config: BenchConfig, result: Record) -> list[Block]:
    """Show the sizes of the models, a table of times a workload, and what the columns are."""
    header = ("model", "layers", "params (M)", "MMACs a token", "weights (MiB)")
    lines = [
        (row["model"], str(row["layers"]), format_millions(row["parameters"]), format_millions(row["macs_per_token"]),
         format_mebibytes(row["weight_bytes"]))
        for row in result["models"]
    ]  # fmt: skip
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in result["workloads"]:
        title = f"batch {row['batch']}, {row['prompt']} prompt tokens, {row['new']} new ones"
        memory = row["memory_bytes"]
        decoded = "tokens_per_second" in row
        groups.setdefault(title, []).append(
            (
                row["model"],
                _range(row["prefill_seconds"], format_milliseconds),
                format_milliseconds(row["first_token_seconds"]["median"]),
                _range(row["tokens_per_second"], format_rate) if decoded else "-",
                "n/a" if memory is None else format_mebibytes(memory),
                "{median:.2f} / {predicted:.2f}".format(**row["prefill_speed_up"]),
                "{median:.2f} / {predicted:.2f}".format(**row["decode_speed_up"]) if decoded else "-",
            )
        )
    columns = ("model", "prefill (ms)", "first (ms)", "tokens a second", "memory (MiB)", "prefill x", "decode x")
    devices = result["devices"]
    if devices["platform"] == "cpu":
        cores = f", {devices['cores']} cores"
    else:
        cores = ""
    where = f"{devices['count']} x {devices['kind']}{cores}"
    return [
        text_table(f"size, {result['dtype']}", header, lines),
        *(text_table(title, columns, rows) for title, rows in groups.items()),
        Words(f"median (smallest to largest) of {result['repeats']} measurements, models in turns, on {where}"),
        Words(
            f"x: times faster than {result['baseline']}, measured / predicted; prefill is predicted by operations,"
            " decode by bytes of weights and cache"
        ),
        Words(
            "MACs a token: entries of all matrices, unembedding included; memory: weights, cache and temporaries of the"
            " larger program, as the compiler counts them"
        ),
    ]


def _range(values: dict[str, Any], form: Callable[[float], str]) -> str:
    if values["low"] == values["high"]:  # of one measurement
        return form(values["median"])
    return f"{form(values['median'])} ({form(values['low'])} to {form(values['high'])})"


def format_rate(value: float) -> str:
    """Write tokens a second with three digits at least.

    >>> [format_rate(value) for value in (8.127, 24.66, 1534.2)]
    ['8.13', '24.7', '1,534']
    """
    if value < 10:
        return f"{value:.2f}"
    if value < 100:
        return f"{value:.1f}"
    return format_count(value)
