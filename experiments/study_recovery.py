"""What does training bring back, and does quantising first cost anything? The study of recovery.

    SAAP_DATA=DATA python experiments/study_recovery.py run     # three seeds, 20 % and 50 %: about an hour on two cores
    SAAP_DATA=DATA python experiments/study_recovery.py speed   # tokens a second of the first seed, on an idle machine
    python experiments/study_recovery.py report                 # its tables

SmolLM2-135M, units chosen as `study_defaults.py` found best, with MLP widths to multiples of 64 (the groups of the
quantisation), calibrated on C4. Groups of 64, because this SmolLM2 comes from a file of 4-bit blocks of 32: rounding to
those again would lose nothing. Every arm trains the same pruned model on the same tokens: 16 steps of 4 rows of 256
tokens, 16,384 in all, half of the rows text (C4), half responses to instructions (Alpaca). That is little: LLM-Pruner
takes several hundred times as much. Read the differences between arms, not how far recovery can go. Evaluated on
WikiText-2 and Penn Treebank, neither of which is trained on. Appends to a run directory a seed, and goes on where it
was stopped, within a training at its last checkpoint.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from study_compensation import chosen
from study_defaults import CALIBRATION, LENGTH, RATIOS, SHORT, TREEBANK, WIKITEXT
from tables import in_percent, perplexity

import saap_jax
from saap_jax.config.recover import MethodConfig, TrainingConfig
from saap_jax.data.windows import Windows, pairs
from saap_jax.evaluation.cost import weight_bytes
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.evaluation.timing import Workload, compile_programs, spread, time_in_turns
from saap_jax.llama.generate import decoder_of
from saap_jax.llama.model import Llama
from saap_jax.recovery.checkpoints import Checkpoints
from saap_jax.recovery.command import method_of
from saap_jax.recovery.loop import Training, train
from saap_jax.recovery.objective import Objective
from saap_jax.recovery.packing import Rows, pack, read_pieces
from saap_jax.recovery.quantization import quantize
from saap_jax.recovery.train import Schedule, join, split
from saap_jax.runs.directory import RunDirectory, read_candidates, read_run
from saap_jax.steps.chain import parse
from saap_jax.surgery.cut import cut

SEEDS = (0, 1, 2)
WINDOWS = 32
SOURCES = (CALIBRATION, "instruct:instruct/alpaca_random9k.jsonl")
ROW, BATCH, STEPS = 256, 4, 16
GROUP = 64
METHOD = f"fused > within(protect=(0.13, -0.07), attention=0.1, multiple_of={{mlp: {GROUP}}}) > uniform > rounds(0.1)"
"""What `study_defaults.py` found best, with widths that groups divide."""


class Arm(NamedTuple):
    """A method, how fast it learns, and how what it made is rounded afterwards, to how many bits."""

    method: str = ""
    rate: float = 0.0
    bits: int = 4
    rounding: Literal["", "nearest", "search"] = ""


ARMS = {
    "pruned": Arm(),
    "pruned, then 4 bits": Arm(rounding="nearest"),
    "group-wise, 4 bits": Arm("groupwise", 3e-2),
    "LoRA": Arm("lora", 3e-3),
    "LoRA, then 4 bits": Arm("lora", 3e-3, rounding="nearest"),
    "LoRA, then 4 bits, scales searched": Arm("lora", 3e-3, rounding="search"),
    "all parameters": Arm("full", 5e-5),
}
"""Group-wise training begins with searched scales, the default of `saap recover`. Learning rates were compared on other
rows of the same text with another seed, at 20 %: loss 3.89, 3.75 and 3.69 at 3e-3, 1e-2 and 3e-2 for group-wise, 3.61
and 3.58 at 1e-3 and 3e-3 for LoRA, 3.75 of the pruned model; larger ones were not tried."""


def run_seed(seed: int, model: Llama, tokenizer: Any, texts: dict[str, Windows], runs: Path, arms: list[str]) -> None:
    """Do what the run directory of a seed does not hold yet."""
    config = {
        "seed": seed,
        "method": parse(METHOD).written,
        "sources": SOURCES,
        "steps": STEPS,
        "windows": WINDOWS,
    }
    run = RunDirectory.open(runs / f"recovery-{seed}", config)
    keeps = chosen(run, model, saap_jax.calibration_windows(CALIBRATION, tokenizer, 32, LENGTH, seed), METHOD)
    rows = rows_of(tokenizer, seed)
    if "dense" not in run.record:
        losses = evaluated(model, texts)
        run.update(dense={"ppl": perplexities(losses), "losses": losses, "bytes": weight_bytes(model)})
    for ratio in RATIOS:
        pruned = cut(model, keeps[ratio])
        for name in arms:
            if f"{name}@{ratio:g}" in {row["candidate"] for row in run.candidates()}:
                continue
            start = time.perf_counter()
            made = recovered(ARMS[name], pruned, rows, seed, run.claim(directory_of(ARMS[name], ratio)))
            seconds = time.perf_counter() - start
            losses = evaluated(made, texts)
            measured = {"ppl": perplexities(losses), "losses": losses, "bytes": weight_bytes(made), "seconds": seconds}
            run.append({"candidate": f"{name}@{ratio:g}", **measured})
            ppl = "  ".join(f"{each:8.2f}" for each in perplexities(losses).values())
            print(f"seed {seed}  {name:<28} {ratio:.0%} {ppl}  {seconds:.0f} s", flush=True)


def perplexities(losses: dict[str, list[float]]) -> dict[str, float]:
    """Return the perplexity on each text."""
    return {source: float(np.exp(np.mean(each))) for source, each in losses.items()}


def directory_of(arm: Arm, ratio: float) -> str:
    """Return the name of the checkpoints of a training, which arms that differ in rounding afterwards share."""
    return f"checkpoints-{ratio:g}-{arm.method}" + (f"-{arm.bits}" if arm.method == "groupwise" else "")


def rows_of(tokenizer: Any, seed: int) -> Rows:
    """Return the rows that every arm is trained on, half of them of each source."""
    parts = []
    for source in SOURCES:
        pieces = read_pieces([source], tokenizer, length=ROW, template="alpaca", seed=seed).pieces
        parts.append(pack(pieces, ROW).first(STEPS * BATCH // len(SOURCES)))
    tokens, segments, positions, targets = (
        np.concatenate(each) for each in zip(*(part.arrays().values() for part in parts), strict=True)
    )
    return Rows(tokens, segments, positions, targets, sum((part.names for part in parts), ()))


def recovered(arm: Arm, pruned: Llama, rows: Rows, seed: int, directory: Path) -> Llama:
    """Return the pruned model as an arm makes it; a training goes on from its checkpoint, or is read from its last."""
    model = pruned
    if arm.method:
        quantised: Any = {"bits": arm.bits, "group_size": GROUP} if arm.method == "groupwise" else {}
        method = method_of(MethodConfig(name=arm.method, **quantised))  # type: ignore[arg-type]
        trained, frozen = split(method.prepare(pruned, jax.random.key(seed)), method.trainable)
        plan = TrainingConfig(batch_size=BATCH, microbatch=BATCH, epochs=1, check_every=8, seed=seed)
        schedule = Schedule(learning_rate=arm.rate, warmup=4, steps=STEPS)
        about = {"arm": list(arm[:2]), "seed": seed}
        with Checkpoints(directory, keep=1) as checkpoints:
            training = Training(trained, frozen, rows, None, Objective(), schedule, plan, about)
            outcome = train(training, checkpoints)
        model = method.merge(join(outcome.trained, frozen))
    if arm.rounding:
        matrices = MethodConfig().matrices
        model = quantize(model, bits=arm.bits, group_size=GROUP, matrices=matrices, rounding=arm.rounding)
    return model


def evaluated(model: Llama, texts: dict[str, Windows]) -> dict[str, list[float]]:
    """Return the mean loss of each window of each text."""
    losses = {source: window_losses(model, pairs(windows, 8)) for source, windows in texts.items()}
    return {source: each.means.tolist() for source, each in losses.items()}


def measure_speeds(model: Llama, tokenizer: Any, runs: Path) -> None:
    """Time greedy decoding of what the arms made with the first seed, in turns; on an idle machine, after `run`."""
    seed = SEEDS[0]
    run = RunDirectory.open(runs / f"recovery-{seed}", read_run(runs / f"recovery-{seed}")["config"])
    calibration = saap_jax.calibration_windows(CALIBRATION, tokenizer, 32, LENGTH, seed)
    keeps, rows, speeds = chosen(run, model, calibration, METHOD), rows_of(tokenizer, seed), {}
    for ratio in RATIOS:
        pruned = cut(model, keeps[ratio])
        arms = [name for name in ARMS if f"{name}@{ratio:g}" in {row["candidate"] for row in run.candidates()}]
        made = [recovered(ARMS[name], pruned, rows, seed, run.claim(directory_of(ARMS[name], ratio))) for name in arms]
        programs = [compile_programs(decoder_of(each), Workload(1, LENGTH, 33)) for each in [model, *made]]
        steps = [1 / spread(each.step for each in times).median for times in time_in_turns(programs, 5)]
        speeds |= {f"{name}@{ratio:g}": step for name, step in zip(["dense", *arms], steps, strict=True)}
        print({name: round(value, 1) for name, value in speeds.items()}, flush=True)
    run.update(tokens_per_second=speeds)


def print_tables(runs: Path, seeds: Sequence[int]) -> None:
    """Print perplexities over the seeds, sizes and speeds, and differences from plain LoRA."""
    present = [seed for seed in seeds if (runs / f"recovery-{seed}" / "metrics.jsonl").exists()]
    if not present:
        print(f"no results below {runs} yet")
        return
    rows = [{row["candidate"]: row for row in read_candidates(runs / f"recovery-{seed}")[0]} for seed in present]
    record = read_run(runs / f"recovery-{present[0]}")
    dense, measured = record["dense"], record.get("tokens_per_second", {})
    columns = [(source, ratio) for source in (WIKITEXT, TREEBANK) for ratio in RATIOS]
    whole = [arm for arm in ARMS if all(f"{arm}@{ratio:g}" in each for each in rows for ratio in RATIOS)]
    losses = {
        (arm, source, ratio): np.array([each[f"{arm}@{ratio:g}"]["losses"][source] for each in rows])
        for arm in whole
        for source, ratio in columns
    }
    said = ", ".join(f"{SHORT[source]} {np.exp(np.mean(each)):.1f}" for source, each in dense["losses"].items())
    print(f"{len(present)} seeds, {STEPS * BATCH * ROW:,} tokens of training; dense: {said}; ppl@{LENGTH}\n")
    head = [f"{SHORT[s]} {r:.0%}" for s, r in columns] + [f"MiB {r:.0%}" for r in RATIOS]
    head += [f"tokens/s {r:.0%}" for r in RATIOS]
    print("| arm | " + " | ".join(head) + " |\n|---" + "|---:" * len(head) + "|")
    for arm in whole:
        cells = [perplexity(losses[arm, *column]) for column in columns]
        cells += [f"{rows[0][f'{arm}@{ratio:g}']['bytes'] / 2**20:.0f}" for ratio in RATIOS]
        speeds = [measured.get(f"{arm}@{ratio:g}") for ratio in RATIOS]
        print(f"| {arm} | " + " | ".join([*cells, *("-" if each is None else f"{each:.1f}" for each in speeds)]) + " |")
    for base in (base for base in ("LoRA", "LoRA, then 4 bits") if base in whole):
        print(f"\nDifference from {base} in per cent (95 % interval, that of `saap ab`)\n")
        print("| arm | " + " | ".join(head[:4]) + " |\n|---" + "|---:" * 4 + "|")
        for arm in (arm for arm in whole if arm != base):
            print(f"| {arm} | " + " | ".join(in_percent(losses[arm, *c], losses[base, *c]) for c in columns) + " |")


def model_and_tokenizer() -> tuple[Llama, Any]:
    """Return those of SmolLM2-135M."""
    return saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")


def main() -> None:
    """Run the study, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "speed", "report"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    arguments = parser.parse_args()
    if arguments.what != "report" and "SAAP_DATA" not in os.environ:
        parser.error("expected SAAP_DATA, the directory that holds text/, instruct/, wikitext2/ and ptb/")
    if arguments.what == "speed":
        measure_speeds(*model_and_tokenizer(), arguments.runs)
    if arguments.what == "run":
        model, tokenizer = model_and_tokenizer()
        texts = {s: saap_jax.evaluation_windows(s, tokenizer, LENGTH, WINDOWS) for s in (WIKITEXT, TREEBANK)}
        for seed in arguments.seeds:
            run_seed(seed, model, tokenizer, texts, arguments.runs, arguments.arms)
    print_tables(arguments.runs, arguments.seeds)


if __name__ == "__main__":
    main()
