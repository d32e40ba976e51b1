"""What `saap evaluate` runs: perplexity of models on texts, and their accuracy on tasks."""

from collections.abc import Sequence
from pathlib import Path

from saap_jax.api import perplexity
from saap_jax.config.use import EvaluateConfig
from saap_jax.data import evaluation_windows
from saap_jax.evaluation.likelihood import Progress
from saap_jax.evaluation.perplexity import metric_name
from saap_jax.evaluation.tasks import find_tasks, run_named
from saap_jax.llama import load_model, load_tokenizer
from saap_jax.llama.attention import attending
from saap_jax.report.blocks import Block
from saap_jax.report.pages.measured import evaluation_blocks
from saap_jax.runs.ab import Evaluated, evaluation_json
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.mesh import layout_of_job
from saap_jax.runtime.progress import Track, quiet
from saap_jax.structures import count_parameters


def evaluate(config: EvaluateConfig, *, track: Track = quiet) -> dict[str, Evaluated]:
    """Measure the perplexity of every model on every text, and run it on tasks; one model is in memory at a time.

    The results are written to `config.json` if it is named.
    """
    check_target("json", config.json)
    layout = layout_of_job(config.mesh, batch_size=config.batch_size)
    if layout is not None and config.tasks:
        raise ValueError(f"tasks: expected none on a mesh of several devices, got {', '.join(config.tasks)}")
    rows, tasks, lengths = {}, find_tasks(config), {"length": config.length} if config.sources else {}
    with attending(config.attention):
        for name in track("evaluate models", config.models, len(config.models)):
            model, tokenizer = load_model(name, config.dtype, layout=layout, lengths=lengths), load_tokenizer(name)
            ppl = {}
            for source in config.sources:
                windows = evaluation_windows(source, tokenizer, config.length, config.windows or None, bos=config.bos)
                ppl[metric_name(config.length, source)] = perplexity(model, windows, batch_size=config.batch_size)
            results = run_named(model, tokenizer, tasks, batch_size=config.batch_size, progress=scoring(track, name))
            rows[name] = Evaluated(count_parameters(model), ppl, results)
    if config.json:
        write_atomically(Path(config.json), evaluation_json(rows))
    return rows


def scoring(track: Track, name: str) -> Progress:
    """Show the progress of a model's tasks."""
    return lambda batches: track(f"score tasks of {name}", batches, len(batches))


def shown(config: EvaluateConfig, rows: dict[str, Evaluated]) -> Sequence[Block]:
    """Show a table of the models."""
    return evaluation_blocks(rows)
