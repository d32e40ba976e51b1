"""Multiple-choice tasks from local files: JSON lines with a context and its choices, scored as the harness does.

| fields of a line                             | scored                                     | metrics         |
|----------------------------------------------|--------------------------------------------|-----------------|
| `context`, `choices`, `gold`                 | `" " + choice` after the context           | `acc`, `acc_norm` |
| `contexts`, `continuation`, `gold`           | `" " + continuation` after each context    | `acc`           |

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

from saap_jax.evaluation.tasks.encode import encode_pair
from saap_jax.evaluation.tasks.likelihood import Progress, log_likelihoods
from saap_jax.evaluation.tasks.results import TaskResult
from saap_jax.formats.json_files import fields_of, parse_json, read_lines, shown
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama


class Item(NamedTuple):
    """A question: one context for all choices, or one for each; `choices` are what is scored, without the blank."""

    id: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


class Task(NamedTuple):
    """A local task."""

    name: str
    path: Path
    items: tuple[Item, ...]
    by_length: bool
    """Whether choices differ, so that `acc_norm` says something that `acc` does not."""


def find_task(name: str) -> Path | None:
    """Return the file of a local task: a path, or of NAME `zeroshot/NAME.jsonl` below SAAP_DATA; None where none is.

    Raises:
        FileNotFoundError: a name that is a path, of no file.
    """
    data = Path(os.environ["SAAP_DATA"]) if os.environ.get("SAAP_DATA") else None
    if name.endswith(".jsonl") or "/" in name:
        for path in (Path(name), *([data / name] if data else [])):
            if path.is_file():
                return path
        where = f" (nor below SAAP_DATA, {data})" if data else ""
        raise FileNotFoundError(f"tasks: expected a JSON-lines file, found none at {name}{where}; check the path")
    path = data / "zeroshot" / f"{name}.jsonl" if data else None
    return path if path is not None and path.is_file() else None


def read_task(name: str, path: Path, limit: int = 0) -> Task:
    """Read the items of a local task, the first `limit` of them or all (0).

    Raises:
        ValueError: a line that is no item, with its number, or a file without any.
    """
    items: list[Item] = []
    kinds: set[bool] = set()
    for number, line in read_lines(path):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        if limit and len(items) == limit:
            break
        fields = parse_json(line, f"{path}, line {number}")
        try:
            items.append(_item(fields, number))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        kinds.add("choices" in fields)
    if not items:
        raise ValueError(f"{path}: expected JSON lines with context, choices and gold, found no line")
    if len(kinds) > 1:
        raise ValueError(f"{path}: expected `context` and `choices` on all lines or on none, got some of each")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path}: expected another id on each line, got one twice")
    return Task(name, path, tuple(items), kinds == {True})


def _item(fields: Any, number: int) -> Item:
    """Make an item of a line's fields."""
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with context, choices and gold, got {type(fields).__name__}")
    if "choices" in fields:
        contexts, choices = (_text(fields, "context"),), _texts(fields, "choices")
        if not all(choices):
            raise ValueError("choices: expected texts with a character or more, got an empty one")
    elif "contexts" in fields:
        contexts, choices = _texts(fields, "contexts"), (_text(fields, "continuation"),)
        choices *= len(contexts)
    else:
        raise ValueError(f"expected context and choices, or contexts and continuation, got {fields_of(fields)}")
    gold = fields.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise ValueError(f"gold: expected a number from 0 to {len(choices) - 1}, got {shown(gold)}")
    return Item(str(fields.get("id", number)), contexts, choices, gold)


def _text(fields: dict[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise ValueError(f"{name}: expected a text, got {shown(fields.get(name))}")
    return fields[name]


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    texts = fields[name]
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a list of two texts or more, got {shown(texts)}")
    return tuple(texts)


def pairs_of(item: Item) -> list[tuple[str, str]]:
    """Return (context, continuation) of each choice, as texts.

    >>> pairs_of(Item("1", ("2 + 2 =",), ("4", "5"), 0))
    [('2 + 2 =', ' 4'), ('2 + 2 =', ' 5')]
    """
    contexts = item.contexts * (len(item.choices) // len(item.contexts))
    return [(context, f" {choice}") for context, choice in zip(contexts, item.choices, strict=True)]


def run_tasks(
    model: Llama,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    batch_size: int = 16,
    progress: Progress = iter,
) -> list[TaskResult]:
    """Score all items of some tasks, together; so rows of different tasks fill a batch.

    Raises:
        ValueError: a choice that adds no token to its context.
    """
    requests, owners = [], []
    for task in tasks:
        for item in task.items:
            for pair in pairs_of(item):
                request = encode_pair(tokenizer, *pair)
                if not request.continuation:
                    raise ValueError(f"{task.path}, item {item.id}: {pair[1]!r} adds no token to its context")
                requests.append(request)
            owners.append(len(item.choices))
    scored = log_likelihoods(model, requests, batch_size=batch_size, progress=progress)
    found = iter([each.log_likelihood for each in scored])
    each_item = iter([tuple(next(found) for _ in range(count)) for count in owners])
    return [result_of(task, tuple(next(each_item) for _ in task.items)) for task in tasks]


def result_of(task: Task, log_likelihoods: tuple[tuple[float, ...], ...]) -> TaskResult:
    """Return who was right, from the log-likelihood of each choice of each item."""
    values: dict[str, list[float]] = {"acc": []} | ({"acc_norm": []} if task.by_length else {})
    for item, likelihoods in zip(task.items, log_likelihoods, strict=True):
        if any(math.isnan(value) for value in likelihoods):
            raise ValueError(f"task {task.name}, item {item.id}: a log-likelihood is not a number; the model is broken")
        values["acc"].append(float(np.argmax(likelihoods) == item.gold))
        if task.by_length:
            lengths = np.array([len(choice) for choice in item.choices], np.float64)
            values["acc_norm"].append(float(np.argmax(likelihoods / lengths) == item.gold))
    return TaskResult(
        task.name,
        str(task.path),
        tuple(item.id for item in task.items),
        {name: np.array(each) for name, each in values.items()},
        log_likelihoods,
    )
