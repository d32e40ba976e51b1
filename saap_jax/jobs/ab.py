"""Is a model better than another, and is it good enough? What `saap ab` runs.

Losses on record are compared as they are; a model that is not of a run is evaluated on the run's texts beside it.
"""

import dataclasses
import difflib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from saap_jax.checks import check_values, read_bound, read_percent
from saap_jax.config.packaged import find_file
from saap_jax.config.use import LIMITS, AbConfig
from saap_jax.data.windows import Windows, evaluation_windows, pairs, window_articles
from saap_jax.errors import reading
from saap_jax.errors import shown as quoted
from saap_jax.evaluation.cost import forward_bytes, forward_seconds
from saap_jax.evaluation.differences import (
    ALL,
    Check,
    check_bytes,
    check_difference,
    check_seconds,
    paired_difference,
    paired_tasks,
)
from saap_jax.evaluation.perplexity import metric_name, window_losses
from saap_jax.evaluation.scales import PERPLEXITY
from saap_jax.evaluation.task_results import TaskResult, compared_metric
from saap_jax.evaluation.tasks import find_tasks, run_named
from saap_jax.jobs.evaluate import scoring
from saap_jax.llama.attention import attending
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.model import Llama
from saap_jax.report.blocks import Block
from saap_jax.report.comparison import Compared, Comparison, comparison_blocks, comparison_json
from saap_jax.runs.ab import Losses, Reference, find, loadable, recorded_losses, text_digests
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.digests import digest_of
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.structures.discovery import weight_bytes
from saap_jax.surgery.cut import cut

_OWN = ("sources", "dtype", "windows", "drawn", "length", "bos", "batch_size")

Texts = dict[str, tuple[str, int, int]]
"""{metric: (source, tokens a window, windows or 0 for all)}."""


def ab(config: AbConfig, *, track: Track = quiet) -> Comparison:
    """Compare two models on the same text, window by window, hold A against the limits that there are, and write the
    result to `config.json` if it is named. A broken limit is no error.

    Raises:
        ValueError: two models that share no text, tokens or seeds, a run without losses, a bad limit, or one that
            cannot be measured of such a model.
    """
    if not (config.a and config.b):
        raise ValueError("ab: expected two models before the options, such as saap ab RUN:CANDIDATE RUN:dense")
    check_target("json", config.json)
    config, a, b = with_limits(config), find(config.a), find(config.b)
    run = [name for name in ("max_latency", "max_memory") if getattr(config, name)]
    names = [loadable(each, f"{run[0]} needs a model that can be run") for each in (a, b) if run]
    comparison = _compare(config, a, b, track)
    if config.tasks:
        comparison = comparison._replace(tasks=compare_tasks(config, a, b, track))
    checks: list[Check] = []
    if config.max_ppl_increase:
        limit = read_percent("max_ppl_increase", config.max_ppl_increase)
        checks += [check_difference(row.name, row.difference, limit) for row in comparison.metrics]
    if config.max_accuracy_drop is not None:
        checks += [check_difference(row.name, row.difference, config.max_accuracy_drop) for row in comparison.tasks]
    if config.max_size or run:
        with attending(config.attention):
            checks += _check_costs(config, a, b, names, track)
    comparison = comparison._replace(checks=tuple(checks))
    if config.json:
        write_atomically(Path(config.json), comparison_json(comparison))
    return comparison


def with_limits(config: AbConfig) -> AbConfig:
    """Fill in the limits of the configuration's file, a TOML file or one of the package; those given come first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no TOML, an unknown key, a bad value, no limit at all, or one on text or tasks where none are named.
    """
    if config.limits:
        path = find_file(config.limits, "limits: expected a TOML file", ".toml")
        with reading(f"limits {path}", "TOML"):
            limits = tomllib.loads(path.read_bytes().decode("utf-8"))
        try:
            if unknown := [key for key in limits if key not in LIMITS]:
                near = difflib.get_close_matches(unknown[0].replace("-", "_"), LIMITS, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown limit {quoted(unknown[0])}, expected {', '.join(LIMITS)}{hint}")
            if not limits:
                raise ValueError('expected at least one limit, such as max_ppl_increase = "5%", found none')
            check_values(AbConfig, limits)
        except ValueError as error:
            raise ValueError(f"limits {config.limits}: {error}") from None
        values = {key: float(value) if isinstance(value, int) else value for key, value in limits.items()}
        missing = {key: value for key, value in values.items() if getattr(config, key) in ("", None)}
        config = dataclasses.replace(config, limits="", **missing)  # what the file has is checked with the rest
    return config


def _compare(config: AbConfig, a: Reference, b: Reference, track: Track) -> Comparison:
    """Compare the losses of two models, each on record or evaluated now; nothing without sources."""
    for each in (a, b):
        if "structures" in each.record:
            raise ValueError(
                f"{each.text}: expected a language model, or a run of one, got a run of a traced model, whose losses "
                "are no perplexities; saap report shows such runs side by side"
            )
    seeds = len(a.seeds or b.seeds or (0,))  # a model without seeds (unpruned, loaded) stands beside each seed
    if a.seeds and b.seeds and a.seeds != b.seeds and (len(a.seeds), len(b.seeds)) != (1, 1):
        of_a, of_b = (", ".join(map(str, each)) for each in (a.seeds, b.seeds))
        raise ValueError(
            f"expected the same calibration seeds of both models, which are compared seed by seed, got {of_a} of "
            f"{a.text} and {of_b} of {b.text}; name one candidate each, or run both with the same seeds"
        )
    if not config.sources:
        return Comparison(a.text, b.text, seeds, max(a.others, b.others), ())
    losses_a, losses_b, known = _losses(config, a, b, track)
    counts = [{metric: each.shape[1] for metric, each in losses.items()} for losses in (losses_a, losses_b)]
    if counts[0] != counts[1]:
        said = [", ".join(f"{count} windows of {metric}" for metric, count in each.items()) for each in counts]
        raise ValueError(
            f"expected as many windows of the same texts of both models, got {said[0]} of {a.text} and {said[1]} of "
            f"{b.text}; evaluate both on the same"
        )
    domains = {metric["name"]: metric.get("domain", "") for metric in (a if a.run else b).record.get("metrics", ())}
    rows = []
    for metric, of_a in losses_a.items():
        windows = counts[0][metric]
        both = [np.broadcast_to(losses, (seeds, windows)) for losses in (of_a, losses_b[metric])]
        difference = paired_difference(*both, others=max(a.others, b.others), articles=known.get(metric, ()))
        of_a, of_b = (PERPLEXITY.value(float(losses.mean())) for losses in both)
        rows.append(Compared(metric, domains.get(metric, ""), windows, (of_a, of_b), difference))
    return Comparison(a.text, b.text, seeds, max(a.others, b.others), tuple(rows))


# --- losses, on record or new --------------------------------------------------------------------


def _losses(config: AbConfig, a: Reference, b: Reference, track: Track) -> tuple[Losses, Losses, dict[str, list[int]]]:
    """Read or measure the losses of both, and tell the articles of windows; two models of runs with the same tokenizer
    load nothing."""
    new = [model for model in (a, b) if model.run is None]
    known = [(model, each) for model in (a, b) if (each := text_digests(model))]
    _check_texts(known)
    config, texts = _setting_of(config, a, b)
    articles = {**b.record.get("articles", {}), **a.record.get("articles", {})}  # no raced run has any
    if not new and a.tokenizer == b.tokenizer:
        return recorded_losses(a), recorded_losses(b), articles
    found = {model.text: recorded_losses(model) for model in (a, b) if model.run is not None}
    windows: dict[str, dict[str, Windows]] = {}
    for name in dict.fromkeys((a.tokenizer, b.tokenizer)):
        how: Any = {"tokenizer": load_tokenizer(name), "bos": config.bos, "drawn": config.drawn}
        asked = {metric: (source, how | {"length": length, "limit": count or None})
                 for metric, (source, length, count) in texts.items()}  # fmt: skip
        windows[name] = {metric: evaluation_windows(source, **each) for metric, (source, each) in asked.items()}
        if a.run is b.run is None:
            articles = {metric: window_articles(source, **each) for metric, (source, each) in asked.items()}
    of_a = windows[a.tokenizer]
    of_b = windows[b.tokenizer]
    for metric in of_a:
        if not np.array_equal(of_a[metric].tokens, of_b[metric].tokens):
            raise ValueError(
                f"{metric}: expected the same tokens of both models, but the tokenizers of {a.tokenizer} and "
                f"{b.tokenizer} differ; their perplexities cannot be compared window by window"
            )
    _check_texts([*known, (new[0] if new else a, {metric: digest_of(each) for metric, each in of_a.items()})])
    names = list(dict.fromkeys(model.text for model in new))
    for name in track("evaluate models", names, len(names)):
        longest = max((length for _, length, _ in texts.values()), default=0)
        model = load_model(name, config.dtype, lengths={"length": longest})
        found[name] = {}
        with attending(config.attention):
            for metric, text in windows[name].items():
                losses = window_losses(model, pairs(text, config.batch_size, model.embedding.shape[0]))
                found[name][metric] = (losses.sums / losses.counts)[None]
    return found[a.text], found[b.text], articles


def _setting_of(config: AbConfig, a: Reference, b: Reference) -> tuple[AbConfig, Texts]:
    """Tell on what two models are compared: as the run of one of them was evaluated, or as the configuration says."""
    run = a if a.run is not None else b
    if run.run is None:
        length = config.length
        windows = config.windows
        texts = {metric_name(length, source): (source, length, windows) for source in config.sources}
        return config, texts
    default = AbConfig()
    if changed := [name for name in _OWN if getattr(config, name) not in (getattr(default, name), ())]:
        raise ValueError(
            f"{changed[0]}: beside {run.text} the text, type and batch size of its run are taken, got "
            f"{getattr(config, changed[0])!r}; leave it out"
        )
    with reading(f"{run.text}: run.json", "a run of saap compare"):
        evaluation = run.record["config"]["evaluation"]
        metrics = [metric["name"] for metric in run.record.get("metrics", ())]
        own = {"dtype": run.model["dtype"], "bos": evaluation.get("bos", "never"), "drawn": evaluation.get("drawn")}
        own |= {name: evaluation[name] for name in ("windows", "batch_size")}
    texts = {}
    for metric in metrics:
        match = re.fullmatch(r"ppl@(\d+) (.+)", metric)
        if not match:
            raise ValueError(f"{run.text}: expected a metric such as {metric_name(128, 'SOURCE')}, got {metric!r}")
        texts[metric] = (match[2], int(match[1]), evaluation["windows"])
    return dataclasses.replace(config, **own), texts


def _check_texts(known: Sequence[tuple[Reference, Mapping[str, str]]]) -> None:
    """Raise ValueError where a metric is of other windows of one model than of another, by their digests."""
    for (one, of_one), (other, of_other) in itertools.pairwise(known):
        if differ := [metric for metric in of_one.keys() & of_other.keys() if of_one[metric] != of_other[metric]]:
            raise ValueError(
                f"{min(differ)}: expected the same windows of both models, got others of {one.text} than of "
                f"{other.text}: the text has changed, or was cut otherwise, as evaluation.bos does; evaluate both again"
            )


# --- tasks ---------------------------------------------------------------------------------------
#
# Runs hold no task results, so every model is loaded and scored. A candidate of a run is cut by the units that the run
# says it keeps; of a variant with several seeds, each seed is a model.


def compare_tasks(config: AbConfig, a: Reference, b: Reference, track: Track) -> tuple[Compared, ...]:
    """Compare the accuracies of two models on each task and over all, item by item.

    A model without seeds (unpruned, loaded) stands beside each seed of the other; with seeds on both sides, the same
    seeds are paired.

    Raises:
        ValueError: no such task, one without a metric to compare, or a model that cannot be had.
    """
    tasks = find_tasks(config)
    dtype = next((each.model["dtype"] for each in (a, b) if each.run), config.dtype)

    def score(reference: Reference) -> list[tuple[TaskResult, ...]]:
        tokenizer = load_tokenizer(reference.tokenizer)
        progress = scoring(track, reference.text)
        with attending(config.attention):
            return [
                run_named(model, tokenizer, tasks, batch_size=config.batch_size, progress=progress)
                for model in models_of(reference, dtype)
            ]

    of_a = score(a)
    of_b = of_a if a.text == b.text else score(b)
    metrics = {result.task: compared_metric(result, config.task_metric) for result in of_a[0]}
    seeds = max(len(of_a), len(of_b))
    outcomes = []
    for results in (of_a, of_b):
        each = {}
        for number, (task, metric) in enumerate(metrics.items()):
            values = np.array([of_seed[number].values[metric] for of_seed in results]) > 0.5
            each[task] = np.broadcast_to(values, (seeds, values.shape[1]))
        outcomes.append(each)
    rows = []
    for task, difference in paired_tasks(*outcomes, others=max(a.others, b.others)).items():
        names = list(metrics) if task == ALL else [task]
        of_a, of_b = (float(np.mean([100 * each[name].mean() for name in names])) for each in outcomes)
        items = sum(outcomes[0][name].shape[1] for name in names)
        metric = " / ".join(dict.fromkeys(metrics[name] for name in names))
        rows.append(Compared(task, metric, items, (of_a, of_b), difference))
    return tuple(rows)


def models_of(reference: Reference, dtype: str) -> Iterator[Llama]:
    """Yield the models that a reference stands for, one of each seed, one at a time.

    Raises:
        ValueError: a candidate of a run that does not say which units it keeps.
    """
    if reference.run is None:
        yield load_model(reference.text, dtype)
        return
    own = reference.model["dtype"]
    dense = reference.model["name"]
    compensated = any(row.get("model") != row.get("keep") for row in reference.rows)
    if reference.candidate == DENSE or compensated or not (reference.run / "keeps.npz").exists():
        if compensated:
            why = "compensation gives a candidate weights of its own"
        else:
            why = "tasks need a model that can be run"
        yield load_model(loadable(reference, why), own)
        return
    model = load_model(dense, own)
    run = RunDirectory(reference.run, reference.record)
    arrays = run.load_arrays("keeps")
    for candidate in (row["candidate"] for row in reference.rows):
        if missing := [name for name in run.structures if f"{candidate}/{name}" not in arrays]:
            raise ValueError(
                f"{reference.text}: {reference.run}/keeps.npz does not say which units of {missing[0]} {candidate} "
                "keeps; run it again with --overwrite"
            )
        yield cut(model, {name: arrays[f"{candidate}/{name}"].astype(bool) for name in run.structures})


# --- bytes and time against their limits ---------------------------------------------------------


def _check_costs(config: AbConfig, a: Reference, b: Reference, names: Sequence[str], track: Track) -> list[Check]:
    """Hold bytes and time against their limits; `names` are those of the models to run, none where bytes suffice."""
    (config, texts) = _setting_of(config, a, b)
    checks = []
    dtypes = [config.dtype if each.run is None else each.model["dtype"] for each in (a, b)]
    models = [load_model(name, dtype) for name, dtype in zip(names, dtypes, strict=False)]
    if config.max_size:
        sizes = []
        for number, (each, dtype) in enumerate(zip((a, b), dtypes, strict=True)):
            if each.run is not None:  # of several seeds, the most
                with reading(each.text, "parameters of a model"):
                    sizes.append(max(int(row["parameters"]) for row in each.rows) * jnp.dtype(dtype).itemsize)
            else:
                sizes.append(weight_bytes(models[number] if models else load_model(each.text, dtype)))
        checks.append(check_bytes("max_size", "weights", read_bound("max_size", config.max_size), *sizes))
    if not models:
        return checks
    if not texts:
        raise ValueError("ab: expected text whose length limits of time and memory are of; name some with --sources")
    length = min(length for _, length, _ in texts.values())
    vocab = min(each.spec.vocab for each in models)
    tokens = (np.arange(config.batch_size * length, dtype=np.int32) % vocab).reshape(config.batch_size, length)
    if config.max_latency:
        limit = read_percent("max_latency", config.max_latency)
        with step(track, "time forward passes"):
            checks.append(check_seconds(limit, *forward_seconds(models, tokens, repeats=config.repeats)))
    if config.max_memory:
        bound = read_bound("max_memory", config.max_memory)
        held = [forward_bytes(each, tokens) for each in models]
        checks.append(check_bytes("max_memory", "forward pass", bound, *held))
    return checks


def shown(config: AbConfig, comparison: Comparison) -> Sequence[Block]:
    """Show the differences, and which limits hold."""
    return comparison_blocks(comparison)
