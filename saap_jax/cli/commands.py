"""What each command does with its configuration: the job, and what is shown of its result.

Each imports what it uses when it is called, so that help comes at once.
"""

import dataclasses
import functools
import sys
from pathlib import Path

from saap_jax.cli.arguments import RunOptions
from saap_jax.cli.blocks import show_blocks, show_facts
from saap_jax.cli.console import show, show_lines, show_paths, write
from saap_jax.cli.progress import progress
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
from saap_jax.config.plan import PlanConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.recover import RecoverConfig
from saap_jax.config.use import BenchConfig, GenerateConfig
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.progress import step
from saap_jax.runtime.remote import is_remote


def compare(config: CompareConfig, options: RunOptions) -> None:
    """Run `saap compare`."""
    from saap_jax.jobs import compare as comparison
    from saap_jax.report.pages.common import structure_sentences
    from saap_jax.report.pages.compare import comparison_table, cut_table
    from saap_jax.runs.standing import cut_of

    with progress() as track:
        run = comparison.compare(config, overwrite=options.overwrite, track=track)
    candidates = run.candidates()
    show(*structure_sentences(run.record))
    show_blocks(comparison_table(run.record, candidates))
    if cut_of(run.record):
        show_blocks(cut_table(run.record))
    show_paths(report=run.path / "report.html", model=run.path / "best")


def score(config: ScoreConfig, options: RunOptions) -> None:
    """Run `saap score`."""
    from saap_jax.jobs.score import score_run
    from saap_jax.report.pages.score import find_patterns, fusion_table, pattern_table, rank_table

    with progress() as track:
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


def prune(config: PruneConfig) -> None:
    """Run `saap prune`."""
    from saap_jax.jobs import prune as pruning

    with progress() as track:
        pruned = pruning.prune(config, track=track)
    show_facts(f"{config.method} at {pruned.selection.asked:.1%}", pruning.summary_rows(pruned))
    if pruned.reached:
        header = ("target", "asked", "unpruned", "predicted", "reached", "prediction off")
        show_facts("", pruning.target_rows(pruned), header)
    show_lines(*pruning.warnings(pruned))
    show_paths(model=config.out)
    if pruned.further:
        show_lines("next:", *(f"  saap {command}" for command in pruned.further))


def recover(config: RecoverConfig, options: RunOptions) -> None:
    """Run `saap recover`."""
    from saap_jax.jobs import recover as job
    from saap_jax.report.pages.recover import recovery_table, summary

    with progress() as track:
        run = job.recover(config, overwrite=options.overwrite, track=track, note=track.note)
    show_blocks(recovery_table(run.record))
    show(*summary(run.record))
    show_paths(report=run.path / "report.html", model=run.record["out"])


def fidelity(config: FidelityConfig, options: RunOptions) -> None:
    """Run `saap fidelity`."""
    from saap_jax.jobs import fidelity as job
    from saap_jax.report.pages.fidelity import BRIEF, fidelity_table

    with progress() as track:
        run, rows, *_ = job.judge(config, overwrite=options.overwrite, track=track)
    show_blocks(*(fidelity_table(rows, scope, BRIEF) for scope in dict.fromkeys(row.scope for row in rows)))
    show_paths(report=run.path / "report.html", beside_it="fidelity.svg, fidelity.md, fidelity.csv")


def frontier(config: FrontierConfig, options: RunOptions) -> None:
    """Run `saap frontier`."""
    from saap_jax.evaluation.crossing import found_variants
    from saap_jax.jobs import frontier as job
    from saap_jax.report.pages.common import suggestion_blocks
    from saap_jax.report.pages.frontier import frontier_table, summary

    with progress() as track:
        run = job.frontier(config, overwrite=options.overwrite, track=track)
    found = found_variants(run.record, run.candidates())
    show_blocks(frontier_table(run.record, found))
    show(summary(run.record, found))
    show_blocks(*suggestion_blocks(run.record))
    show_paths(report=run.path / "report.html", beside_it="frontier.svg, frontier.md, frontier.csv, curve.csv")


def sensitivity(config: SensitivityConfig, options: RunOptions) -> None:
    """Run `saap sensitivity`."""
    from saap_jax.jobs import sensitivity as job
    from saap_jax.report.pages.common import suggestion_blocks
    from saap_jax.report.pages.sensitivity import extreme_table

    with progress() as track:
        run = job.sensitivity(config, overwrite=options.overwrite, track=track)
    show_blocks(extreme_table(run.record, run.candidates()), *suggestion_blocks(run.record))
    show_paths(report=run.path / "report.html", beside_it="sensitivity.svg, sensitivity.md, sensitivity.csv")


def export(config: ExportConfig) -> None:
    """Run `saap export`."""
    from saap_jax.jobs.export import export_model

    with progress() as track:
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


def evaluate(config: EvaluateConfig) -> None:
    """Run `saap evaluate`."""
    from saap_jax.jobs import evaluate as job
    from saap_jax.report.pages.measured import evaluation_blocks

    with progress() as track:
        rows = job.evaluate(config, track=track)
    show_blocks(*evaluation_blocks(rows))


def report(config: ReportConfig) -> None:
    """Run `saap report`."""
    from saap_jax.report.write import write_reports

    written = write_reports(config.runs, config.out, config.figures, overwrite=config.overwrite)
    drawn = [path for path in written if path.suffix in (".svg", ".png", ".pdf")]
    show_paths(report="   ".join(str(path) for path in written if path not in drawn))
    if drawn:
        show_paths(figures=f"{len(drawn)} files in {config.figures}")


def ab(config: AbConfig) -> int:
    """Run `saap ab`; return 1 when a limit is broken."""
    from saap_jax.jobs import ab as job
    from saap_jax.report.pages.measured import comparison_blocks

    with progress() as track:
        comparison = job.ab(config, track=track)
    show_blocks(*comparison_blocks(comparison))
    return 0 if comparison.held else 1


def generate(config: GenerateConfig) -> None:
    """Run `saap generate`."""
    from saap_jax.jobs.generate import write_texts

    write_texts(config, write, with_prompts=sys.stdout.isatty())


def bench(config: BenchConfig) -> None:
    """Run `saap bench`."""
    from saap_jax.jobs import bench as benchmark
    from saap_jax.report.pages.measured import bench_blocks

    with progress() as track:
        result = benchmark.bench(config, track=track)
    show_blocks(*bench_blocks(result))


def plan(config: PlanConfig) -> None:
    """Run `saap plan`."""
    from saap_jax.cli.plan import plan_job, shown

    with progress() as track:
        result = plan_job(config, track=track)
    show_blocks(*shown(config, result))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods:
    """List the steps, estimators and recipes that chains are made of; with names, what each is."""

    names: tuple[str, ...] = ()
    """Steps, estimators or recipes to describe: options, formula, source, where a recipe differs from its paper."""


def methods(config: Methods) -> None:
    """Run `saap methods`."""
    from saap_jax.cli.methods import show_methods

    show_methods(config.names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discover:
    """Print the coupled structures of a model, or of what a factory returns: (function, params, *inputs)."""

    model: str = "smollm2-135m"
    """A model, or MODULE:FACTORY or FILE.py:FACTORY."""
    drawing: str = ""
    """An .svg file for a picture of parameters, axes and structures; empty: none."""
    details: bool = False
    """Print of a factory's function every member, gate and reason."""

    def __post_init__(self) -> None:
        if self.drawing and not self.drawing.endswith(".svg"):
            raise ValueError(f"--drawing: expected the name of an .svg file, got {self.drawing}")


def discover(config: Discover) -> None:
    """Run `saap discover`."""
    check_target("--drawing", config.drawing)
    if ":" in config.model and not is_remote(config.model):
        from saap_jax.trace.factory import traced_factory
        from saap_jax.trace.listing import describe, traced_tables

        traced, verdicts = traced_factory(config.model)
        show(*traced_tables(config.model, traced, verdicts))
        if config.details:
            show_lines(describe(traced))
    else:
        from saap_jax.llama import load_model
        from saap_jax.trace.listing import listing, traced_model

        model = load_model(config.model)
        show(*listing(config.model, model))
        traced = traced_model(model) if config.drawing else None
    if config.drawing and traced is not None:
        from saap_jax.report.figures.couplings import couplings_svg

        write_atomically(Path(config.drawing), couplings_svg(traced).encode())
        show_paths(drawing=Path(config.drawing))
