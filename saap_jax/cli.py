"""The command line, `saap`: reads arguments, shows progress and tables, turns errors into one line and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable

from rich.table import Table

from saap_jax.arguments import (
    UsageError,
    configure,
    console,
    fail,
    model_first,
    names_factory,
    one_line,
    parse,
    run_command,
    show_progress,
    split_words,
)
from saap_jax.config import (
    AbConfig,
    CompareConfig,
    ExportConfig,
    FidelityConfig,
    FrontierConfig,
    GateConfig,
    PruneConfig,
    ReportConfig,
    ScoreConfig,
    SensitivityConfig,
)
from saap_jax.config_recover import RecoverConfig
from saap_jax.config_use import BenchConfig, EvaluateConfig, GenerateConfig

USAGE = """\
saap: structured pruning of LLaMA-family language models in JAX

  saap compare [CONFIG.py]     compare importance estimators on a model, also your own (MODULE:FACTORY)
  saap discover [MODEL]        print the coupled structures of a model, also of your own (MODULE:FACTORY)
  saap score [CONFIG.py]       score every unit from one calibration pass, keep the scores
  saap prune [CONFIG.py]       prune with one estimator at one ratio, save it; also your own (MODULE:FACTORY)
  saap recover [MODEL] [CONFIG.py]  fine-tune a pruned model; --resume goes on with a run that was killed
  saap export MODEL OUT        write a model for transformers or llama.cpp, and compare what was written
  saap evaluate [MODEL ...]    perplexity of models, pruned or not; accuracy on zero-shot --tasks
  saap fidelity [CONFIG.py]    judge estimators by the exact effect of removing a unit
  saap frontier [CONFIG.py]    perplexity against ratio, the largest ratio that holds a limit, the knee
  saap sensitivity [CONFIG.py] what a layer's attention or MLP costs when it alone is pruned; suggestions
  saap report RUN [RUN ...]    one page of one run or several, any kind; figures for papers
  saap ab A B                  is A better than B, by how much, and how sure is that
  saap gate MODEL              hold a model against limits; exit code 1 when one is broken
  saap generate MODEL "text"   continue a text (- for standard input) with a model, pruned or not
  saap bench [MODEL ...]       parameters, operations, memory, prefill and decode time, side by side
  saap plan [MODEL] [TARGET]   does a job fit a TPU or GPUs, and what does it cost there; none is needed

A CONFIG.py is a Python file that exports CONFIG; fields given after it, such as --ratios 0.3,
override it, and `saap COMMAND --help` lists them. On many devices and hosts: docs/pods.md.

Start with `saap compare configs/quickstart.py`."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; return 0 when it did its work, 2 for bad input (one line on the error stream).

    A command may return another code for what it found: `gate` returns 1 when a limit is broken.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            console.print(USAGE, markup=False)
            return 0 if words else 2
        if words[0] not in COMMANDS:
            raise UsageError(f"unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}")
        return run_command(words[0], COMMANDS[words[0]], words[1:])
    except KeyboardInterrupt:
        return fail("interrupted; what was finished is kept, and the same command goes on from there", 130)
    except (ValueError, OSError, UsageError) as error:
        if os.environ.get("SAAP_DEBUG"):
            raise
        return fail(one_line(error), 2)


# --- commands ----------------------------------------------------------------------------------------


def compare(words: list[str]) -> None:
    """Run `saap compare`, on one of our models or on what a factory returns."""
    if names_factory(words):
        from saap_jax.traced import command

        return command.compare(words)
    config, options = configure("compare", CompareConfig, words, overwrite=True)
    from saap_jax import comparison
    from saap_jax.report import cut_rows, rich_cut_table, rich_table

    with show_progress() as track:
        run = comparison.compare(config, overwrite=options.overwrite, track=track)
    candidates = run.candidates()
    if run.corrupt_lines:
        console.print(f"{run.corrupt_lines} unreadable lines of {run.path / 'metrics.jsonl'} were skipped")
    console.print(rich_table(run.record, candidates))
    if cut_rows(run.record):
        console.print(rich_cut_table(run.record))
    console.print(f"report: {run.path / 'report.html'}   model: {run.path / 'best'}", markup=False)


def discover(words: list[str]) -> None:
    """Run `saap discover`."""
    from saap_jax import structures_command

    structures_command.run(words)


def score(words: list[str]) -> None:
    """Run `saap score`."""
    config, options = configure("score", ScoreConfig, words, overwrite=True)
    from saap_jax import pipeline
    from saap_jax.report.fusion import rich_fusions
    from saap_jax.report.patterns import rich_patterns
    from saap_jax.report.score_page import find_patterns
    from saap_jax.report.scores import rank_table

    with show_progress() as track:
        run, calibrated = pipeline.score_run(config, overwrite=options.overwrite, track=track)
    for scenario, scores in calibrated.scenarios.items():
        console.print(rank_table(scores, scenario if len(calibrated.scenarios) > 1 else None))
    if any(run.record["fusions"].values()):
        console.print(rich_fusions(run.record["fusions"]))
    if found := find_patterns(run.record, calibrated.scenarios):
        for structure in found.structures:
            console.print(rich_patterns(found, structure))
    if left_out := run.record.get("left_out"):
        said = f"left out, since {config.from_run} does not serve them (--keep-statistics all): {', '.join(left_out)}"
        console.print(said, markup=False, soft_wrap=True)
    console.print(f"report: {run.path / 'report.html'}   scores: {run.path / 'scores.npz'}", markup=False)


def prune(words: list[str]) -> None:
    """Run `saap prune`, on one of our models or on what a factory returns."""
    if names_factory(words):
        from saap_jax.traced import command

        return command.prune(words)
    config, _ = configure("prune", PruneConfig, words)
    from saap_jax import pruning

    with show_progress() as track:
        pruned = pruning.prune(config, track=track)
    title = f"{config.estimator} at {pruned.selection.asked:.1%}"
    table = Table(title=title, title_justify="left", show_header=False)
    for row in pruning.summary_rows(pruned):
        table.add_row(*row)
    console.print(table)
    if pruned.reached:
        table = Table("target", "asked", "unpruned", "predicted", "reached", "prediction off")
        for row in pruning.target_rows(pruned):
            table.add_row(*row)
        console.print(table)
    for line in pruning.warnings(pruned):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"model: {config.out}", markup=False)


def recover(words: list[str]) -> None:
    """Run `saap recover`."""
    config, options = configure("recover", RecoverConfig, model_first("recover", words), overwrite=True)
    from saap_jax import recover as job
    from saap_jax.report.recovery import rich_recovery, summary

    with show_progress() as track:
        run = job.recover(config, overwrite=options.overwrite, track=track, note=track.note)
    console.print(rich_recovery(run.record))
    for line in summary(run.record):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"model: {run.record['out']}   run: {run.path}", markup=False)


def export(words: list[str]) -> None:
    """Run `saap export`."""
    positional, rest = split_words(words)
    if len(positional) > 2:
        raise UsageError(f"export: expected MODEL and OUT, got {len(positional)} words: {' '.join(positional)}")
    default = ExportConfig(**dict(zip(("model", "out"), positional, strict=False)))
    config, _ = parse("export MODEL OUT", default, rest)
    from saap_jax.export import export_model
    from saap_jax.pipeline import step

    with show_progress() as track:
        exported = export_model(config, step=functools.partial(step, track))
    agreement = exported.agreement
    table = Table(title=exported.kind, title_justify="left", show_header=False)
    table.add_row("parameters", f"{exported.parameters:,}")
    table.add_row("zeros added by the format", f"{exported.added:,} ({exported.added / exported.parameters:.1%})")
    table.add_row("bytes", f"{exported.bytes:,}")
    table.add_row(f"logits on {agreement.tokens} tokens", f"largest difference {agreement.largest:.2g}")
    share = f"{agreement.deviation:.2g} of their spread (accepted for {config.dtype}: {agreement.tolerance:g})"
    table.add_row("  root mean square", share)
    table.add_row("  same most likely token", f"{agreement.argmax:.1%}")
    console.print(table)
    for note in exported.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"model: {config.out}", markup=False)


def evaluate(words: list[str]) -> None:
    """Run `saap evaluate`."""
    positional, rest = split_words(words)
    default = EvaluateConfig(models=tuple(positional)) if positional else EvaluateConfig()
    config, _ = parse("evaluate [MODEL ...]", default, rest)
    from saap_jax import pipeline
    from saap_jax.report.tasks import rich_perplexities, rich_tasks

    with show_progress() as track:
        rows = pipeline.evaluate(config, track=track)
    if config.sources:
        console.print(rich_perplexities(rows))
    if config.tasks:
        console.print(rich_tasks(rows))


def fidelity(words: list[str]) -> None:
    """Run `saap fidelity`."""
    config, options = configure("fidelity", FidelityConfig, words, overwrite=True)
    from saap_jax import fidelity as job
    from saap_jax.report import fidelity as report

    with show_progress() as track:
        run, rows, scores, exact = job.judge(config, overwrite=options.overwrite, track=track)
    for scope in ("attention", "mlp", "pooled"):
        console.print(report.rich_fidelity_table(rows, scope))
    files = {
        "fidelity.svg": report.fidelity_scatter(scores, exact, rows),
        "fidelity.md": report.markdown_fidelity(rows),
        "fidelity.csv": report.csv_fidelity(rows),
    }
    for name, text in files.items():
        run.save_text(name, text)
    console.print(f"plots and tables: {', '.join(str(run.path / name) for name in files)}", markup=False)


def frontier(words: list[str]) -> None:
    """Run `saap frontier`."""
    config, options = configure("frontier", FrontierConfig, words, overwrite=True)
    from saap_jax import frontier as job
    from saap_jax.evaluation.frontier import found_variants
    from saap_jax.report import frontier as report
    from saap_jax.report.suggestions import suggestion_lines

    with show_progress() as track:
        run = job.frontier(config, overwrite=options.overwrite, track=track)
    found = found_variants(run.record, run.candidates())
    console.print(report.rich_frontier(run.record, found))
    console.print(report.summary(run.record, found), markup=False)
    for line in suggestion_lines(run.record):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"figure: {run.path / 'frontier.svg'}   tables: frontier.md, frontier.csv, curve.csv", markup=False)


def sensitivity(words: list[str]) -> None:
    """Run `saap sensitivity`."""
    config, options = configure("sensitivity", SensitivityConfig, words, overwrite=True)
    from saap_jax import sensitivity as job
    from saap_jax.report import sensitivity as report
    from saap_jax.report.suggestions import suggestion_lines

    with show_progress() as track:
        run = job.sensitivity(config, overwrite=options.overwrite, track=track)
    console.print(report.rich_sensitivity(run.record, run.candidates()))
    for line in suggestion_lines(run.record):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"heat maps: {run.path / 'sensitivity.svg'}   tables: sensitivity.md, sensitivity.csv", markup=False)


def report(words: list[str]) -> None:
    """Run `saap report`."""
    positional, rest = split_words(words)
    config, _ = parse("report RUN [RUN ...]", ReportConfig(runs=tuple(positional)), rest)
    from saap_jax.report.reports import write_reports

    written = write_reports(config.runs, config.out, config.figures, overwrite=config.overwrite)
    drawn = [path for path in written if path.suffix in (".svg", ".png", ".pdf")]
    console.print(f"report: {'   '.join(str(path) for path in written if path not in drawn)}", markup=False)
    if drawn:
        console.print(f"figures: {len(drawn)} files in {config.figures}", markup=False)


def ab(words: list[str]) -> None:
    """Run `saap ab`."""
    positional, rest = split_words(words)
    if len(positional) > 2:
        raise UsageError(f"ab: expected two models, A and B, got {len(positional)}: {', '.join(positional)}")
    default = AbConfig(**dict(zip(("a", "b"), positional, strict=False)))
    config, _ = parse("ab A B", default, rest)
    from saap_jax import quality
    from saap_jax.report.quality import rich_comparison, rich_task_comparison, sentences

    with show_progress() as track:
        comparison = quality.ab(config, track=track)
    if comparison.metrics:
        console.print(rich_comparison(comparison))
    if comparison.tasks:
        console.print(rich_task_comparison(comparison))
    for sentence in sentences(comparison):
        console.print(sentence, markup=False)


def gate(words: list[str]) -> int:
    """Run `saap gate`; return 1 when a limit is broken."""
    positional, rest = split_words(words)
    if len(positional) > 1:
        raise UsageError(f"gate: expected one model, got {len(positional)}: {', '.join(positional)}")
    config, _ = parse("gate MODEL", GateConfig(model=positional[0]) if positional else GateConfig(), rest)
    from saap_jax import quality
    from saap_jax.evaluation.gate import verdict
    from saap_jax.report.quality import rich_checks

    with show_progress() as track:
        checks = quality.gate(config, track=track)
    console.print(rich_checks(config.model, config.baseline, checks))
    console.print(verdict(checks), markup=False)
    return 0 if all(check.passed for check in checks) else 1


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
    from saap_jax.generation import continuations

    pieces = continuations(config)
    if len(config.prompts) == 1:
        for _, piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = [""] * len(config.prompts)
    for row, piece in pieces:
        texts[row] += piece
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{text}")


def plan(words: list[str]) -> None:
    """Run `saap plan`."""
    from saap_jax.planning import command

    command.run(words)


def bench(words: list[str]) -> None:
    """Run `saap bench`."""
    positional, rest = split_words(words)
    default = BenchConfig(models=tuple(positional)) if positional else BenchConfig()
    config, _ = parse("bench [MODEL ...]", default, rest)
    from saap_jax import benchmark
    from saap_jax.report.bench import footnotes, rich_bench

    with show_progress() as track:
        result = benchmark.bench(config, track=track)
    console.print(rich_bench(result))
    for line in footnotes(result):
        console.print(line, markup=False)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "compare": compare,
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
    "gate": gate,
    "generate": generate,
    "bench": bench,
    "plan": plan,
}
