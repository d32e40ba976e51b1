"""Two models on the same items of the same tasks: what `saap ab --tasks` runs.

Runs hold no task results, so every model is loaded and scored. A candidate of a run is cut by the units that the run
says it keeps; of a variant with several seeds, each seed is a model.
"""

from collections.abc import Iterator

import numpy as np

from saap_jax.config.use import AbConfig
from saap_jax.evaluation.differences import ALL, paired_tasks
from saap_jax.evaluation.task_results import TaskResult, compared_metric
from saap_jax.evaluation.tasks import find_tasks, run_named
from saap_jax.jobs.evaluate import scoring
from saap_jax.llama import Llama, load_model, load_tokenizer
from saap_jax.llama.attention import attending
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.outcomes import ComparedTask
from saap_jax.runs.references import Reference, loadable
from saap_jax.runs.standing import DENSE
from saap_jax.runtime.progress import Track
from saap_jax.surgery.cut import cut


def compare_tasks(config: AbConfig, a: Reference, b: Reference, track: Track) -> tuple[ComparedTask, ...]:
    """Compare the accuracies of two models on each task and over all, by the paired bootstrap over items.

    A model without seeds (unpruned, loaded) stands beside each seed of the other; with seeds on both sides, the same
    seeds are paired.

    Raises:
        ValueError: no such task, one without a metric to compare, or a model that cannot be had.
    """
    tasks = find_tasks(config)

    def score(reference: Reference) -> list[tuple[TaskResult, ...]]:
        tokenizer, progress = load_tokenizer(reference.tokenizer), scoring(track, reference.text)
        with attending(config.attention):
            return [
                run_named(model, tokenizer, tasks, batch_size=config.batch_size, progress=progress)
                for model in models_of(reference, config.dtype)
            ]

    of_a = score(a)
    of_b = of_a if a.text == b.text else score(b)
    metrics = {result.task: compared_metric(result, config.task_metric) for result in of_a[0]}
    seeds, outcomes = max(len(of_a), len(of_b)), []
    for results in (of_a, of_b):
        each = {}
        for number, (task, metric) in enumerate(metrics.items()):
            values = np.array([of_seed[number].values[metric] for of_seed in results]) > 0.5
            each[task] = np.broadcast_to(values, (seeds, values.shape[1]))
        outcomes.append(each)
    rows = []
    for task, difference in paired_tasks(*outcomes, resamples=config.resamples, seed=config.seed).items():
        names = list(metrics) if task == ALL else [task]
        of_a, of_b = (float(np.mean([100 * each[name].mean() for name in names])) for each in outcomes)
        items = sum(outcomes[0][name].shape[1] for name in names)
        metric = " / ".join(dict.fromkeys(metrics[name] for name in names))
        rows.append(ComparedTask(task, metric, items, (of_a, of_b), difference))
    return tuple(rows)


def models_of(reference: Reference, dtype: str) -> Iterator[Llama]:
    """Yield the models that a reference stands for, one of each seed, one at a time.

    Raises:
        ValueError: a candidate of a run that does not say which units it keeps.
    """
    if reference.run is None:
        yield load_model(reference.text, dtype)
        return
    own, dense = reference.model["dtype"], reference.model["name"]
    compensated = any(row.get("model") != row.get("keep") for row in reference.rows)
    if reference.candidate == DENSE or compensated or not (reference.run / "keeps.npz").exists():
        why = (
            "compensation gives a candidate weights of its own" if compensated else "tasks need a model that can be run"
        )
        yield load_model(loadable(reference, why), own)
        return
    model, run = load_model(dense, own), RunDirectory(reference.run, reference.record)
    arrays = run.load_arrays("keeps")
    for candidate in (row["candidate"] for row in reference.rows):
        if missing := [name for name in run.structures if f"{candidate}/{name}" not in arrays]:
            raise ValueError(
                f"{reference.text}: {reference.run}/keeps.npz does not say which units of {missing[0]} {candidate} "
                "keeps; run it again with --overwrite"
            )
        yield cut(model, {name: arrays[f"{candidate}/{name}"].astype(bool) for name in run.structures})
