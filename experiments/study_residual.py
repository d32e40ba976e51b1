"""Is the width of the residual stream worth pruning, and do norms have to be rescaled? The study of docs/residual.md.

    SAAP_DATA=DATA python experiments/study_residual.py run      # three seeds: about half an hour on two cores
    python experiments/study_residual.py report                  # its tables

SmolLM2-135M, calibrated on 32 windows of C4, evaluated on WikiText-2 and Penn Treebank. First channels of the residual
stream alone, by each score and each scale of the norms. Then `saap prune` by its defaults, with none, a quarter or half
of what goes taken from channels. Appends to a run directory a seed, and goes on where it was stopped.

Scales of norms: `masked` as of the model whose removed channels are zero, which is what `cut` makes; `mean` as they
were, over the channels that stay; `dense` as large as in the whole model, on average over the calibration text.
"""

import argparse
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from study_defaults import CALIBRATION, LENGTH, SHORT, TREEBANK, WIKITEXT
from tables import in_percent, perplexity

import saap_jax
from saap_jax.api import calibrate, select_path
from saap_jax.config.search import STUDIED, ResidualConfig
from saap_jax.data import Windows, pairs
from saap_jax.estimation.channels import Channels, observe_channels
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama import Llama
from saap_jax.llama.model import param
from saap_jax.llama.segments import existing_units
from saap_jax.runs.directory import RunDirectory, read_candidates
from saap_jax.structures import count_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from saap_jax.types import RESIDUAL

SEEDS = (0, 1, 2)
WINDOWS = 32
WIDTHS = (544, 512, 448)
"""Of 576 channels: 5.6, 11 and 22 % go."""
SCALES = ("dense", "mean", "masked")
SCORES = ("gate_fisher", "gate_taylor", "activation", "random")
SHARES = ((0.2, 0.0), (0.2, 0.25), (0.2, 0.5), (0.5, 0.0), (0.5, 0.25))
"""Ratio, and which share of it comes from channels."""


def run_seed(
    seed: int, model: Llama, tokenizer: Any, texts: dict[str, Windows], runs: Path, parts: Sequence[str]
) -> None:
    """Do what the run directory of a seed does not hold yet."""
    config = {"seed": seed, "widths": WIDTHS, "scales": SCALES, "scores": SCORES, "shares": SHARES, "windows": WINDOWS}
    run = RunDirectory.open(runs / f"residual-{seed}", config)
    calibration = saap_jax.calibration_windows(CALIBRATION, tokenizer, 32, LENGTH, seed)
    if "dense" not in run.record:
        run.update(dense=measured(model, texts))
    done = {row["candidate"] for row in run.candidates()}
    makers = {"widths": narrow_ones(model, calibration, seed, done), "shares": shared_ones(model, calibration, done)}
    for part in parts:
        for name, made in makers[part]:
            row = {"candidate": name, **measured(made, texts)}
            run.append(row)
            ppl = "  ".join(f"{each:9.2f}" for each in row["ppl"].values())
            print(f"seed {seed}  {name:<32} {ppl}  {count_parameters(made):,} parameters", flush=True)


def narrow_ones(model: Llama, calibration: Windows, seed: int, done: set[str]) -> Iterator[tuple[str, Llama]]:
    """Return models without channels: each score with the scale `dense`, and some with other scales."""
    arms = [(score, "dense") for score in SCORES] + [("gate_fisher", scale) for scale in SCALES[1:]]
    arms.append(("activation", "masked"))
    names = {f"{score}, {scale}@{width}": (score, scale, width) for width in WIDTHS for score, scale in arms}
    if names.keys() <= done:
        return
    seen = observe_channels(model, pairs(calibration, 8))
    scores = seen.scores | {"random": np.random.default_rng(seed).random(model.spec.embed)}
    for name, (score, scale, width) in names.items():
        if name not in done:
            yield name, narrow_model(model, highest(scores[score], width), seen, scale)


def highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return which channels have the `count` highest scores; equal ones: the lower index goes first."""
    keep = np.ones(len(scores), bool)
    keep[np.argsort(scores, kind="stable")[: len(scores) - count]] = False
    return keep


def narrow_model(model: Llama, keep: np.ndarray, seen: Channels, scale: str) -> Llama:
    """Return the model without the removed channels, its norms rescaled."""
    narrow = cut(model, {**existing_units(model.segments), RESIDUAL: keep[None]})
    if scale == "masked":
        return narrow

    def factor(energy: np.ndarray) -> jax.Array:
        share = keep.mean() if scale == "mean" else energy[..., keep].sum(-1)
        return jnp.asarray(np.broadcast_to(share, energy.shape[:-1]) ** 0.5)

    factors = [{name: factor(energy) for name, energy in run.items()} for run in seen.energy]
    return with_scaled_norms(narrow, factors, float(factor(seen.last)))


def with_scaled_norms(model: Llama, factors: list[dict[str, jax.Array]], last: float) -> Llama:
    """Return the model with each norm's scales multiplied by a number.

    Args:
        model: the model, which is left as it is.
        factors: of each run, `{"attention_norm": [layers], "mlp_norm": [layers]}`.
        last: of the norm after the last layer.
    """
    new = jax.tree.map(lambda x: x, model)
    for run, each in zip(new.segments, factors, strict=True):
        for name, factor in each.items():
            scale = getattr(run, name)
            setattr(run, name, param(scale.axes, scale[...] * factor.astype(scale.dtype)[:, None]))
    new.norm = param(new.norm.axes, new.norm[...] * last)
    return new


def shared_ones(model: Llama, calibration: Windows, done: set[str]) -> Iterator[tuple[str, Llama]]:
    """Return models pruned by the defaults, with a share of the ratio from channels."""
    text = {"calibration": calibration}
    for ratio, share in SHARES:
        name, subject, search = f"share {share:g}@{ratio:g}", LlamaSubject(model), STUDIED
        if name in done:
            continue
        if share:
            subject = LlamaSubject(model, further=(RESIDUAL,))
            search = dataclasses.replace(STUDIED, residual=ResidualConfig(share=share))
        first = calibrate(subject, calibration, ["saap"])
        yield name, cut(model, select_path(subject, first, text, "saap", [ratio], search)[ratio].keep)


def measured(model: Llama, texts: dict[str, Windows]) -> dict[str, Any]:
    """Return the size of a model, and on each text its perplexity and the mean loss of each window."""
    losses = {source: window_losses(model, pairs(windows, 8)) for source, windows in texts.items()}
    return {
        "parameters": count_parameters(model),
        "ppl": {source: each.perplexity for source, each in losses.items()},
        "losses": {source: (each.sums / each.counts).tolist() for source, each in losses.items()},
    }


def print_tables(runs: Path, seeds: Sequence[int]) -> None:
    """Print perplexities over the seeds, and the difference that a share makes at a ratio."""
    present = [seed for seed in seeds if (runs / f"residual-{seed}" / "metrics.jsonl").exists()]
    if not present:
        print(f"no results below {runs} yet")
        return
    rows = [{row["candidate"]: row for row in read_candidates(runs / f"residual-{seed}")[0]} for seed in present]
    names = [name for name in rows[0] if all(name in each for each in rows)]
    losses = {
        (name, source): np.array([each[name]["losses"][source] for each in rows])
        for name in names
        for source in (WIKITEXT, TREEBANK)
    }
    print(f"{len(present)} seeds, ppl@{LENGTH} over {WINDOWS} windows\n")
    print("| model | parameters | WikiText-2 | PTB |\n|---|---:|---:|---:|")
    for name in names:
        cells = [perplexity(losses[name, source]) for source in (WIKITEXT, TREEBANK)]
        print(f"| {name} | {rows[0][name]['parameters'] / 1e6:.1f}M | " + " | ".join(cells) + " |")
    print("\nDifference from share 0 of the same ratio, in per cent (95 %, paired bootstrap over seeds and windows)\n")
    for ratio, share in SHARES:
        name, base = f"share {share:g}@{ratio:g}", f"share 0@{ratio:g}"
        if share and {name, base} <= set(names):
            said = (f"{SHORT[s]} {in_percent(losses[name, s], losses[base, s])}" for s in (WIKITEXT, TREEBANK))
            print(f"- {name}: " + ", ".join(said))


def main() -> None:
    """Run the study, or print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--parts", nargs="+", choices=("widths", "shares"), default=("widths", "shares"))
    arguments = parser.parse_args()
    if arguments.what == "run":
        if "SAAP_DATA" not in os.environ:
            parser.error("expected SAAP_DATA, the directory that holds text/, wikitext2/ and ptb/")
        model, tokenizer = saap_jax.load_model("smollm2-135m"), saap_jax.load_tokenizer("smollm2-135m")
        texts = {s: saap_jax.evaluation_windows(s, tokenizer, LENGTH, WINDOWS) for s in (WIKITEXT, TREEBANK)}
        for seed in arguments.seeds:
            run_seed(seed, model, tokenizer, texts, arguments.runs, arguments.parts)
    print_tables(arguments.runs, arguments.seeds)


if __name__ == "__main__":
    main()
