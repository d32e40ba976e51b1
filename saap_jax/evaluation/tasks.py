"""Zero-shot tasks by name: multiple choice from local files, scored as lm-evaluation-harness does, and its own tasks.

| fields of a JSON line                | scored                                  | metrics           |
|--------------------------------------|-----------------------------------------|-------------------|
| `context`, `choices`, `gold`         | `" " + choice` after the context        | `acc`, `acc_norm` |
| `contexts`, `continuation`, `gold`   | `" " + continuation` after each context | `acc`             |

`gold` counts from 0; `id` is optional. The choice of the highest log-likelihood is the answer (`acc`), or that of the
highest log-likelihood a character of the choice (`acc_norm`); of equal ones, the first.
"""

import codecs
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config.use import TasksConfig
from saap_jax.errors import parse_json, read_lines, shown
from saap_jax.evaluation.likelihood import Progress, encode_pair, log_likelihoods
from saap_jax.evaluation.task_results import TaskResult
from saap_jax.extras import need
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama

# --- tasks by name ---------------------------------------------------------------------------------


class Item(NamedTuple):
    """A question: one context for all choices, or one for each; `choices` are what is scored, without the blank."""

    id: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of each choice, as texts.

        >>> Item("1", ("2 + 2 =",), ("4", "5"), 0).pairs
        [('2 + 2 =', ' 4'), ('2 + 2 =', ' 5')]
        """
        contexts = self.contexts * (len(self.choices) // len(self.contexts))
        return [(context, f" {choice}") for context, choice in zip(contexts, self.choices, strict=True)]


class Task(NamedTuple):
    """A local task."""

    name: str
    path: Path
    items: tuple[Item, ...]
    by_length: bool
    """Whether choices differ, so that `acc_norm` says something that `acc` does not."""


class NamedTasks(NamedTuple):
    """What was asked for."""

    local: tuple[Task, ...]
    harness: tuple[str, ...]
    """Names that lm-evaluation-harness is asked for."""
    limit: int
    task_path: str


def find_tasks(config: TasksConfig) -> NamedTasks:
    """Find the tasks of a configuration before any model is loaded, local ones with their items.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that is no task, or a name that is not local where the harness is not installed.
    """
    paths = {name: find_task(name) for name in config.task_names}
    local = tuple(read_task(name, path, config.limit) for name, path in paths.items() if path is not None)
    others = tuple(name for name, path in paths.items() if path is None)
    if others:
        need(
            "eval",
            f"tasks: {others[0]!r}, which is no local task (a JSON-lines file, or zeroshot/NAME.jsonl below SAAP_DATA)",
        )
    return NamedTasks(local, others, config.limit, config.task_path)


def run_named(
    model: Llama, tokenizer: Tokenizer, tasks: NamedTasks, *, batch_size: int = 8, progress: Progress = iter
) -> tuple[TaskResult, ...]:
    """Run a model on tasks: on the local ones, then on the harness's.

    Raises:
        ValueError: a harness task that is unknown or cannot be run.
    """
    results = []
    if tasks.local:
        results += run_tasks(model, tokenizer, tasks.local, batch_size=batch_size, progress=progress)
    if tasks.harness:
        from saap_jax.evaluation.harness import HarnessModel, run_harness_tasks  # needs the extra `eval`

        adapter = HarnessModel(model, tokenizer=tokenizer, batch_size=batch_size)
        results += run_harness_tasks(adapter, tasks.harness, limit=tasks.limit, task_path=tasks.task_path)
    return tuple(results)


def find_task(name: str) -> Path | None:
    """Find the file of a local task: a path, or of NAME `zeroshot/NAME.jsonl` below SAAP_DATA; None where none is.

    Raises:
        FileNotFoundError: a name that is a path, of no file.
    """
    is_path = name.endswith(".jsonl") or "/" in name
    data = os.environ.get("SAAP_DATA")
    tried = [Path(name)] if is_path else []
    if data:
        tried += [Path(data) / (name if is_path else f"zeroshot/{name}.jsonl")]
    found = next((path for path in tried if path.is_file()), None)
    if found is None and is_path:
        where = f" (nor below SAAP_DATA, {data})" if data else ""
        raise FileNotFoundError(f"tasks: expected a JSON-lines file, found none at {name}{where}; check the path")
    return found


def read_task(name: str, path: Path, limit: int = 0) -> Task:
    """Read the items of a local task, the first `limit` of them or all (0).

    Raises:
        ValueError: a line that is no item, with its number, or a file without any.
    """
    items: list[Item] = []
    kinds: set[bool] = set()
    for number, line in read_lines(path):
        if not (line := line.removeprefix(codecs.BOM_UTF8)).strip():
            continue
        if limit and len(items) == limit:
            break
        where = f"{path}, line {number}"
        fields = parse_json(line, where)
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: expected an object, got {type(fields).__name__}")
        items.append(_item(fields, where, number))
        kinds.add("choices" in fields)
    if not items:
        raise ValueError(f"{path}: expected JSON lines with context, choices and gold, found no line")
    if len(kinds) > 1:
        raise ValueError(f"{path}: expected `context` and `choices` on all lines or on none, got some of each")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path}: expected another id on each line, got one twice")
    return Task(name, path, tuple(items), kinds == {True})


def _item(fields: dict[str, Any], where: str, number: int) -> Item:
    """Make an item of a line's fields."""
    many, one = ("choices", "context") if "choices" in fields else ("contexts", "continuation")
    texts = fields.get(many)
    text = fields.get(one)
    gold = fields.get("gold")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(each, str) and each for each in texts):
        raise ValueError(f"{where}: {many}: expected a list of two texts or more, none empty, got {shown(texts)}")
    if not isinstance(text, str):
        raise ValueError(f"{where}: {one}: expected a text beside {many}, got {shown(text)}")
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise ValueError(f"{where}: gold: expected a number from 0 to {len(texts) - 1}, got {shown(gold)}")
    contexts, choices = ((text,), tuple(texts)) if many == "choices" else (tuple(texts), (text,) * len(texts))
    return Item(str(fields.get("id", number)), contexts, choices, gold)


# --- scores ----------------------------------------------------------------------------------------


def run_tasks(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[Task], *, batch_size: int = 16, progress: Progress = iter
) -> list[TaskResult]:
    """Score all items of some tasks, together; so rows of different tasks fill a batch.

    Raises:
        ValueError: a choice that adds no token to its context.
    """
    requests = []
    for task, item in ((each, item) for each in tasks for item in each.items):
        for pair in item.pairs:
            requests.append(encode_pair(tokenizer, *pair))
            if not requests[-1].continuation:
                raise ValueError(f"{task.path}, item {item.id}: {pair[1]!r} adds no token to its context")
    scored = log_likelihoods(model, requests, batch_size=batch_size, progress=progress)
    found = iter([each.log_likelihood for each in scored])
    return [result_of(task, tuple(tuple(next(found) for _ in item.choices) for item in task.items)) for task in tasks]


def result_of(task: Task, log_likelihoods: tuple[tuple[float, ...], ...]) -> TaskResult:
    """Tell who was right, from the log-likelihood of each choice of each item."""
    values: dict[str, list[float]] = {"acc": []} | ({"acc_norm": []} if task.by_length else {})
    for item, likelihoods in zip(task.items, log_likelihoods, strict=True):
        if any(math.isnan(value) for value in likelihoods):
            raise ValueError(f"task {task.name}, item {item.id}: a log-likelihood is not a number; the model is broken")
        values["acc"].append(float(np.argmax(likelihoods) == item.gold))
        if task.by_length:
            lengths = np.array([len(choice) for choice in item.choices], np.float64)
            values["acc_norm"].append(float(np.argmax(likelihoods / lengths) == item.gold))
    ids = tuple(item.id for item in task.items)
    metrics = {name: np.array(each) for name, each in values.items()}
    return TaskResult(task.name, str(task.path), ids, metrics, log_likelihoods)
