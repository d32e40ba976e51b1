"""`saap compare` and `saap prune` for a researcher's own model, named as `MODULE:FACTORY` or `FILE.py:FACTORY`."""

import dataclasses
from typing import Any

from saap_jax.cli.arguments import Options, UsageError, load_config, parse, show_progress, split_words
from saap_jax.cli.console import show, show_paths
from saap_jax.config.traced import TracedCompareConfig, TracedPruneConfig


def compare(words: list[str]) -> None:
    """Run `saap compare FACTORY`."""
    config, options = _configured("compare", TracedCompareConfig, words, Options)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import traced
    from saap_jax.report.kinds.traced import traced_sentences, traced_table

    with show_progress() as track:
        run = traced.compare(config, overwrite=options.overwrite, track=track)
    show_blocks(traced_table(run.record, run.candidates(), kept=False))
    show(*traced_sentences(run.record))
    show_paths(report=run.path / "report.html", drawing=run.path / "couplings.svg")


def prune(words: list[str]) -> None:
    """Run `saap prune FACTORY`."""
    config, _ = _configured("prune", TracedPruneConfig, words, None)
    from saap_jax.cli.blocks import show_facts
    from saap_jax.jobs import traced

    with show_progress() as track:
        pruned = traced.prune(config, track=track)
    selection = pruned.selection
    rows = [
        ("prunable parameters removed", f"{selection.actual:.2%} (asked {selection.asked:.2%})"),
        ("parameters", "{:,} -> {:,}".format(*pruned.parameters)),
        ("held-out loss", "{:.4g} -> {:.4g}".format(*pruned.losses)),
    ]
    for name, copies, before, after in pruned.structures:
        times = f" in each of {copies} copies" if copies > 1 else ""
        rows.append((f"units of {name}", f"{before} -> {after}{times}"))
    show_facts(f"{config.estimator} at {selection.asked:.1%}", rows)
    show(pruned.own_code)
    show_paths(model=f"{config.out}   read it with saap_jax.traced.load_pruned")


def _configured(command: str, kind: type, words: list[str], options: type | None) -> tuple[Any, Any]:
    """Return the configuration for `FACTORY [CONFIG.py] …`."""
    positional, rest = split_words(words)
    factories = [word for word in positional if ":" in word]
    files = [word for word in positional if ":" not in word]
    if len(factories) > 1 or len(files) > 1:
        raise UsageError(f"{command}: expected one factory and at most one configuration, got {' '.join(positional)}")
    default = load_config(files[0], kind) if files else kind()
    return parse(f"{command} FACTORY [CONFIG.py]", dataclasses.replace(default, factory=factories[0]), rest, options)
