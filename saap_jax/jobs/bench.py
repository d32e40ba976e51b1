"""What `saap bench` runs: models loaded beside each other, each workload timed, the result as plain values."""

import json
from pathlib import Path
from typing import Any

from saap_jax.config.use import BenchConfig
from saap_jax.evaluation.cost import prefill_macs, step_bytes, token_macs, weight_bytes
from saap_jax.evaluation.timing import Programs, Times, Workload, compile_programs, speed_up, spread, time_in_turns
from saap_jax.llama import Llama, load_model
from saap_jax.llama.generate import decoder_of, rounded
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.progress import Track, quiet
from saap_jax.runtime.provenance import provenance
from saap_jax.structures import count_parameters

Record = dict[str, Any]


def bench(config: BenchConfig, *, track: Track = quiet) -> Record:
    """Measure every model on every workload; return the result, and write it to `config.json` if that is named.

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
    workloads = [
        Workload(batch, prompt, config.new_tokens) for batch in config.batch_sizes for prompt in config.prompt_lengths
    ]
    rows = []
    for workload in workloads:
        rows += _measured(models, baseline, workload, config.repeats, track)
    result = {
        "baseline": baseline,
        "dtype": config.dtype,
        "repeats": config.repeats,
        "models": [_size(name, model) for name, model in models.items()],
        "workloads": rows,
        **provenance(),
    }
    if config.json:
        write_atomically(Path(config.json), json.dumps(result, indent=1).encode() + b"\n")
    return result


def _size(name: str, model: Llama) -> Record:
    return {
        "model": name,
        "parameters": count_parameters(model),
        "macs_per_token": token_macs(model),
        "weight_bytes": weight_bytes(model),
        "layers": len(model.spec.layers),
    }


def _measured(models: dict[str, Llama], baseline: str, workload: Workload, repeats: int, track: Track) -> list[Record]:
    """Return a row a model of one workload."""
    what = f"{workload.batch} x {workload.prompt} + {workload.new}"
    programs = {
        name: compile_programs(model, workload) for name, model in track(f"compile {what}", models.items(), len(models))
    }
    times = time_in_turns(
        list(programs.values()), repeats, progress=lambda turns: track(f"time {what}", turns, repeats + 1)
    )
    by_name = dict(zip(programs, times, strict=True))
    return [_row(name, programs, by_name, baseline) for name in models]


def _row(name: str, programs: dict[str, Programs], times: dict[str, list[Times]], baseline: str) -> Record:
    mine, (batch, prompt, new) = programs[name], programs[name].workload
    context = prompt + new / 2
    row: Record = {
        "model": name,
        "batch": batch,
        "prompt": prompt,
        "padded": rounded(prompt),
        "new": new,
        "memory_bytes": mine.memory_bytes,
        "prefill_macs": prefill_macs(mine.model, batch, rounded(prompt)),
        "step_bytes": step_bytes(mine.model, batch, context),
        "prefill_seconds": spread(t.prefill for t in times[name])._asdict(),
        "first_token_seconds": spread(t.first_token for t in times[name])._asdict(),
    }
    if new > 1:
        row["step_seconds"] = spread(t.step for t in times[name])._asdict()
        row["tokens_per_second"] = spread(batch / t.step for t in times[name])._asdict()
    faster = speed_up(mine, times[name], programs[baseline], times[baseline])
    row["prefill_speed_up"] = {"predicted": faster.prefill, **faster.measured_prefill._asdict()}
    if new > 1:
        row["decode_speed_up"] = {"predicted": faster.step, **faster.measured_step._asdict()}
    return row
