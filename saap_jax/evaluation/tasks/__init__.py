"""Zero-shot tasks by name: local files, and those of lm-evaluation-harness, scored by one core (`likelihood`)."""

import importlib.util
from typing import NamedTuple

from saap_jax.config.use import TasksConfig
from saap_jax.evaluation.tasks.likelihood import Progress
from saap_jax.evaluation.tasks.local import Task, TaskResult, find_task, read_task, run_tasks
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.model import Llama


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
    if others and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f"tasks: {others[0]!r} is no local task, which is a JSON-lines file or the name of zeroshot/NAME.jsonl "
            "below SAAP_DATA; lm-evaluation-harness, which may know it, is not installed: pip install 'saap_jax[eval]'"
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
        from saap_jax.evaluation.tasks.harness import HarnessModel, run_harness_tasks  # needs the extra `eval`

        adapter = HarnessModel(model, tokenizer=tokenizer, batch_size=batch_size)
        results += run_harness_tasks(adapter, tasks.harness, limit=tasks.limit, task_path=tasks.task_path)
    return tuple(results)
