"""The command line, `saap`: reads arguments, shows progress and tables, turns errors into one line and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable

from saap_jax.cli.arguments import configure, parse, run_command, show_progress, split_words
from saap_jax.cli.console import show, show_lines, show_paths, write
from saap_jax.cli.failures import UsageError, fail, failed, suggestion
from saap_jax.config.jobs import (
    CompareConfig,
    ExportConfig,
    FidelityConfig,
    FrontierConfig,
    ReportConfig,
    ScoreConfig,
    SensitivityConfig,
)
from saap_jax.config.judge import AbConfig, EvaluateConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import RecoverConfig
from saap_jax.config.use import BenchConfig, GenerateConfig
from saap_jax.runtime.interrupts import interruption
from saap_jax.version import __version__

USAGE = """\
saap: structured pruning of LLaMA-family language models in JAX

  saap compare [CONFIG]        compare importance estimators on a model, also your own (MODULE:FACTORY)
  saap recipes [NAME ...]      list the published methods that `saap compare --recipes` runs
  saap discover [MODEL]        print the coupled structures of a model, also of your own (MODULE:FACTORY)
  saap score [CONFIG]          score every unit from one calibration pass, keep the scores
  saap prune [CONFIG]          prune with one estimator at one ratio, save it; also your own (MODULE:FACTORY)
  saap recover [MODEL] [CONFIG]  fine-tune a pruned model; --resume goes on with a run that was killed
  saap export MODEL OUT        write a model for transformers, llama.cpp, MaxText, Tunix; compare what was written
  saap evaluate [MODEL ...]    perplexity of models, pruned or not; accuracy on zero-shot --tasks
  saap fidelity [CONFIG]       judge estimators by the exact effect of removing a unit
  saap frontier [CONFIG]       perplexity against ratio, the largest ratio that holds a limit, the knee
  saap sensitivity [CONFIG]    what a layer's attention or MLP costs when it alone is pruned; suggestions
  saap report RUN [RUN ...]    one page of one run or several, any kind; figures for papers
  saap ab A B                  is A better than B, by how much, how sure; with limits, exit code 1 when one is broken
  saap generate MODEL "text"   continue a text (- for standard input) with a model, pruned or not
  saap bench [MODEL ...]       parameters, operations, memory, prefill and decode time, side by side
  saap plan [MODEL] [TARGET]   does a job fit a TPU or GPUs, and what does it cost there; none is needed
  saap completion SHELL        print what bash, zsh or fish needs to complete all this
  saap help COMMAND            what a command takes, --help-all for all of it; saap --version says the version

A CONFIG is a Python file that exports CONFIG, or one of the package by its name, as quickstart is;
fields given after it, such as --ratios 0.3, override it, and `saap COMMAND --help-all` lists them.
On many devices and hosts: docs/pods.md.
compare, score, prune, fidelity, frontier and sensitivity take a JAX model of your own too, named as
MODULE:FACTORY or FILE.py:FACTORY: docs/discovery.md.

Start with `saap compare quickstart`."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0 when it did its work, 2 for an error (one line on the error stream).

    A command may return another code for what it found: `ab` returns 1 when a limit is broken. Where nobody reads
    the output any more, as with `saap ... | head -1`, it ends quietly with 141.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return fail(*interruption())
    except Exception as error:
        if os.environ.get("SAAP_DEBUG") and not isinstance(error, BrokenPipeError):
            raise
        return failed(error)


def _run(words: list[str]) -> int:
    if words[:1] == ["help"] and len(words) > 1:
        words = ["--help"] if words[1] == "help" else [words[1], *(words[2:] or ["--help"])]
    match words:
        case ["--version" | "-V", *_]:
            show_lines(f"saap {__version__}")
            return 0
        case [] | ["-h" | "--help" | "help"]:
            show(USAGE)
            return 0 if words else 2
    command, *rest = words
    if command not in COMMANDS:
        raise UsageError(
            f"unknown command {command!r}{suggestion(command, COMMANDS) or '; `saap help` lists those that there are'}"
        )
    return run_command(command, COMMANDS[command], rest)


# --- commands ----------------------------------------------------------------------------------------


def compare(words: list[str]) -> None:
    """Run `saap compare`."""
    config, options = configure("compare", CompareConfig, words, overwrite=True)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import compare as comparison
    from saap_jax.report.kinds.variants import cut_rows, cut_table, structure_sentences, variant_table
    from saap_jax.runs.standing import comparison_rows

    with show_progress() as track:
        run = comparison.compare(config, overwrite=options.overwrite, track=track)
    candidates = run.candidates()
    if run.corrupt_lines:
        show(f"{run.corrupt_lines} unreadable lines of {run.path / 'metrics.jsonl'} were skipped")
    show(*structure_sentences(run.record))
    show_blocks(variant_table(run.record, comparison_rows(run.record, candidates)))
    if cut_rows(run.record):
        show_blocks(cut_table(run.record))
    show_paths(report=run.path / "report.html", model=run.path / "best")


def recipes(words: list[str]) -> None:
    """Run `saap recipes`."""
    from saap_jax.cli.recipes import run

    run(words)


def discover(words: list[str]) -> None:
    """Run `saap discover`."""
    from saap_jax.cli.discover import run

    run(words)


def score(words: list[str]) -> None:
    """Run `saap score`."""
    config, options = configure("score", ScoreConfig, words, overwrite=True)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs.score import score_run
    from saap_jax.report.kinds.fusion import fusion_table
    from saap_jax.report.kinds.patterns import pattern_table
    from saap_jax.report.kinds.score import find_patterns
    from saap_jax.report.kinds.scores import rank_table

    with show_progress() as track:
        run, calibrated = score_run(config, overwrite=options.overwrite, track=track)
    for scenario, scores in calibrated.scenarios.items():
        show_blocks(rank_table(scores, scenario if len(calibrated.scenarios) > 1 else None))
    if any(run.record["fusions"].values()):
        show_blocks(fusion_table(run.record["fusions"]))
    if found := find_patterns(run.record, calibrated.scenarios):
        show_blocks(*(pattern_table(found, structure) for structure in found.structures))
    if left_out := run.record.get("left_out"):
        show(f"left out, since {config.from_run} does not serve them (--keep-statistics all): {', '.join(left_out)}")
    show_paths(report=run.path / "report.html", scores=run.path / "scores.npz")


def prune(words: list[str]) -> None:
    """Run `saap prune`."""
    config, _ = configure("prune", PruneConfig, words)
    from saap_jax.cli.blocks import show_facts
    from saap_jax.jobs import prune as pruning

    with show_progress() as track:
        pruned = pruning.prune(config, track=track)
    show_facts(f"{config.recipe or config.estimator} at {pruned.selection.asked:.1%}", pruning.summary_rows(pruned))
    if pruned.reached:
        header = ("target", "asked", "unpruned", "predicted", "reached", "prediction off")
        show_facts("", pruning.target_rows(pruned), header)
    show_lines(*pruning.warnings(pruned))
    show_paths(model=config.out)
    if pruned.further:
        show_lines("next:", *(f"  saap {command}" for command in pruned.further))


def recover(words: list[str]) -> None:
    """Run `saap recover`."""
    config, options = configure("recover", RecoverConfig, words, overwrite=True, model=True)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import recover as job
    from saap_jax.report.kinds.recover import recovery_table, summary

    with show_progress() as track:
        run = job.recover(config, overwrite=options.overwrite, track=track, note=track.note)
    show_blocks(recovery_table(run.record))
    show(*summary(run.record))
    show_paths(report=run.path / "report.html", model=run.record["out"])


def export(words: list[str]) -> None:
    """Run `saap export`."""
    positional, rest = split_words(words)
    if len(positional) > 2:
        raise UsageError(f"export: expected MODEL and OUT, got {len(positional)} words: {' '.join(positional)}")
    default = ExportConfig(**dict(zip(("model", "out"), positional, strict=False)))
    config, _ = parse("export MODEL OUT", default, rest)
    from saap_jax.cli.blocks import show_facts
    from saap_jax.jobs.export import export_model
    from saap_jax.runtime.progress import step

    with show_progress() as track:
        exported = export_model(config, step=functools.partial(step, track))
    agreement = exported.agreement
    share = f"{agreement.deviation:.2g} of their spread (accepted for {config.dtype}: {agreement.tolerance:g})"
    rows = [
        ("parameters", f"{exported.parameters:,}"),
        ("parameters in the files", f"{exported.written:,}"),
        ("zeros added by the format", f"{exported.added:,} ({exported.added / exported.parameters:.1%})"),
        ("bytes", f"{exported.bytes:,}"),
        (f"logits on {agreement.tokens} tokens", f"largest difference {agreement.largest:.2g}"),
        ("  root mean square", share),
        ("  same most likely token", f"{agreement.argmax:.1%}"),
    ]
    show_facts(exported.kind, rows)
    show_lines(*exported.notes)
    show_paths(model=config.out)


def evaluate(words: list[str]) -> None:
    """Run `saap evaluate`."""
    positional, rest = split_words(words)
    default = EvaluateConfig(models=tuple(positional)) if positional else EvaluateConfig()
    config, _ = parse("evaluate [MODEL ...]", default, rest)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import evaluate as job
    from saap_jax.report.kinds.tasks import evaluation_blocks

    with show_progress() as track:
        rows = job.evaluate(config, track=track)
    show_blocks(*evaluation_blocks(rows))


def fidelity(words: list[str]) -> None:
    """Run `saap fidelity`."""
    config, options = configure("fidelity", FidelityConfig, words, overwrite=True)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import fidelity as job
    from saap_jax.report.kinds.fidelity import BRIEF, fidelity_table

    with show_progress() as track:
        run, rows, *_ = job.judge(config, overwrite=options.overwrite, track=track)
    show_blocks(*(fidelity_table(rows, scope, BRIEF) for scope in dict.fromkeys(row.scope for row in rows)))
    show_paths(report=run.path / "report.html", beside_it="fidelity.svg, fidelity.md, fidelity.csv")


def frontier(words: list[str]) -> None:
    """Run `saap frontier`."""
    config, options = configure("frontier", FrontierConfig, words, overwrite=True)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.evaluation.crossing import found_variants
    from saap_jax.jobs import frontier as job
    from saap_jax.report.kinds.common import suggestion_blocks
    from saap_jax.report.kinds.frontier import frontier_table, summary

    with show_progress() as track:
        run = job.frontier(config, overwrite=options.overwrite, track=track)
    found = found_variants(run.record, run.candidates())
    show_blocks(frontier_table(run.record, found))
    show(summary(run.record, found))
    show_blocks(*suggestion_blocks(run.record))
    show_paths(report=run.path / "report.html", beside_it="frontier.svg, frontier.md, frontier.csv, curve.csv")


def sensitivity(words: list[str]) -> None:
    """Run `saap sensitivity`."""
    config, options = configure("sensitivity", SensitivityConfig, words, overwrite=True)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import sensitivity as job
    from saap_jax.report.kinds.common import suggestion_blocks
    from saap_jax.report.kinds.sensitivity import extreme_table

    with show_progress() as track:
        run = job.sensitivity(config, overwrite=options.overwrite, track=track)
    show_blocks(extreme_table(run.record, run.candidates()), *suggestion_blocks(run.record))
    show_paths(report=run.path / "report.html", beside_it="sensitivity.svg, sensitivity.md, sensitivity.csv")


def report(words: list[str]) -> None:
    """Run `saap report`."""
    positional, rest = split_words(words)
    config, _ = parse("report RUN [RUN ...]", ReportConfig(runs=tuple(positional)), rest)
    from saap_jax.report.write import write_reports

    written = write_reports(config.runs, config.out, config.figures, overwrite=config.overwrite)
    drawn = [path for path in written if path.suffix in (".svg", ".png", ".pdf")]
    show_paths(report="   ".join(str(path) for path in written if path not in drawn))
    if drawn:
        show_paths(figures=f"{len(drawn)} files in {config.figures}")


def ab(words: list[str]) -> int:
    """Run `saap ab`; return 1 when a limit is broken."""
    positional, rest = split_words(words)
    if len(positional) > 2:
        raise UsageError(f"ab: expected two models, A and B, got {len(positional)}: {', '.join(positional)}")
    default = AbConfig(**dict(zip(("a", "b"), positional, strict=False)))
    config, _ = parse("ab A B", default, rest)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import ab as job
    from saap_jax.report.kinds.quality import comparison_blocks

    with show_progress() as track:
        comparison = job.ab(config, track=track)
    show_blocks(*comparison_blocks(comparison))
    return 0 if comparison.held else 1


def generate(words: list[str]) -> None:
    """Run `saap generate`."""
    options = next((place for place, word in enumerate(words) if word.startswith("-") and word != "-"), len(words))
    model, *prompts = words[:options] or [""]
    if {"-h", "--help"} & set(words):
        model, prompts = "MODEL", ["TEXT"]
    elif not prompts:
        raise UsageError(f'generate: expected a model and a text, as in MODEL "text", got {" ".join(words) or "none"}')
    default = GenerateConfig(model=model, prompts=tuple(prompts))
    config, _ = parse("generate MODEL TEXT [TEXT ...]", default, words[options:])
    from saap_jax.jobs.generate import write_texts

    write_texts(config, write, with_prompts=sys.stdout.isatty())


def plan(words: list[str]) -> None:
    """Run `saap plan`."""
    from saap_jax.cli.plan import run

    run(words)


def completion(words: list[str]) -> None:
    """Run `saap completion`."""
    from saap_jax.cli.completion import run

    run(words, [*COMMANDS])


def bench(words: list[str]) -> None:
    """Run `saap bench`."""
    positional, rest = split_words(words)
    default = BenchConfig(models=tuple(positional)) if positional else BenchConfig()
    config, _ = parse("bench [MODEL ...]", default, rest)
    from saap_jax.cli.blocks import show_blocks
    from saap_jax.jobs import bench as benchmark
    from saap_jax.report.kinds.bench import bench_blocks

    with show_progress() as track:
        result = benchmark.bench(config, track=track)
    show_blocks(*bench_blocks(result))


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare,
    "recipes": recipes,
    "discover": discover,
    "score": score,
    "prune": prune,
    "recover": recover,
    "export": export,
    "evaluate": evaluate,
    "fidelity": fidelity,
    "frontier": frontier,
    "sensitivity": sensitivity,
    "report": report,
    "ab": ab,
    "generate": generate,
    "bench": bench,
    "plan": plan,
    "completion": completion,
}
