"""`saap frontier` on a tiny model: what it finds is what independent calls find; one program; taken up again."""

import dataclasses
import itertools
import json
import math
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from saap_jax.config.search import PerStructure, SearchConfig
from saap_jax.selection.variants import seeds_of, variants_of

from saap_jax.api import calibrate, perplexity, select_path
from saap_jax.cli import main
from saap_jax.config.jobs import CompareConfig, FrontierConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, GridConfig, ModelConfig
from saap_jax.evaluation.candidates import candidates_step
from saap_jax.evaluation.crossing import found_variants
from saap_jax.jobs import compare, frontier, job
from saap_jax.llama import load_model, load_tokenizer
from saap_jax.report.markdown import escaped
from saap_jax.report.pages.frontier import frontier_files, summary
from saap_jax.subjects.llama import scenarios_of, texts_of
from saap_jax.types import STRUCTURES
from tests.report.shown import missing_from_page

OUT = "ppl@16 builtin:descriptions"
SEARCH = SearchConfig(allocation="global")
STEPS = SearchConfig(allocation="global", rescore_every=0.15)


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> FrontierConfig:
    return FrontierConfig(
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=3, length=16, batch_size=2),
        estimation=EstimationConfig(estimators=("gate_fisher", "wanda")),
        evaluation=EvaluationConfig(windows=4, length=16, batch_size=2),
        search=SEARCH,
        grid=GridConfig(seeds=(0, 3)),
        ratios=(0.1, 0.3, 0.5),
        max_ppl_increase="6%",
        tolerance=0.01,
        resamples=50,
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def run(config):
    candidates_step.clear_cache()
    run = frontier.frontier(config)
    assert candidates_step._cache_size() == 1, "one program for dense model, curves and every round"
    return run


def kept_at(config, variant, seed, ratio, *others):
    """Return what `select_path` keeps at a ratio (asked for together with others), from scores of its own."""
    model, tokenizer = load_model(config.model.name), load_tokenizer(config.model.name)
    scenarios = scenarios_of(dataclasses.replace(config.calibration, seed=seed), tokenizer)
    scores = calibrate(model, scenarios, [variant.estimator], batch_size=2)
    options = {"batch_size": config.calibration.batch_size}
    return select_path(model, scores, scenarios, variant.estimator, [ratio, *others], variant.search, **options)[ratio]


def same(first, second) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in STRUCTURES)


class TestLargestRatio:
    @pytest.mark.slow
    def test_holds_the_limit_and_a_tolerance_more_does_not(self, config, run):
        """By other code: each keep-set searched anew, its perplexity by the program for one set of gates."""
        model, tokenizer = load_model(config.model.name), load_tokenizer(config.model.name)
        windows = texts_of(config.evaluation, tokenizer)[OUT]
        limit = 1.06 * perplexity(model, windows)
        assert run.record["frontier"]["limit"] == pytest.approx(limit, rel=1e-5)
        variants = {variant.name: variant for variant in variants_of(config)}
        for line in run.record["frontier"]["lines"]:
            ppl = {
                ratio: perplexity(model, windows, kept_at(config, variants[line["variant"]], line["seed"], ratio).keep)
                for ratio in (line["ratio"], line["ratio"] + config.tolerance)
                if ratio > 0
            }
            assert all(value <= limit for ratio, value in ppl.items() if ratio == line["ratio"])
            assert ppl[line["ratio"] + config.tolerance] > limit
            assert 0 < line["breaks_at"] - line["ratio"] <= config.tolerance

    def test_seeds_and_variants_have_lines_of_their_own(self, config, run):
        lines = run.record["frontier"]["lines"]
        assert [(line["variant"], line["seed"]) for line in lines] == list(
            itertools.product(("gate_fisher", "wanda"), (0, 3))
        )
        assert len({line["ratio"] for line in lines}) > 1
        found = found_variants(run.record, run.candidates())
        for each in found:
            own = [line["ratio"] for line in lines if line["variant"] == each.variant]
            assert each.ratio.mean == pytest.approx(np.mean(own))
            assert each.seeds == 2

    def test_rounds_are_logarithmic(self, run):
        assert run.record["frontier"]["rounds"] <= 6  # log2 of 0.2 / 0.01 is 4.3; one more beyond the grid

    @pytest.mark.slow
    @pytest.mark.parametrize(("limit", "judged"), [("100000%", "out"), ("0%", "in")])
    def test_beyond_both_ends_of_the_grid(self, config, tmp_path, limit, judged):
        """Everything holds: the largest ratio that the search can meet. Or nothing may, and 0 is the answer."""
        search = dataclasses.replace(SEARCH, min_keep=PerStructure(attention=1, mlp=2))
        changes = {"runs": str(tmp_path), "max_ppl_increase": limit, "judged": judged, "search": search}
        other = dataclasses.replace(config, grid=GridConfig(), ratios=(0.3,), **changes)
        run = frontier.frontier(other)
        for line in run.record["frontier"]["lines"]:
            if limit == "0%":
                dense = run.record["dense"]["ppl"][run.record["frontier"]["metric"]]
                assert run.record["frontier"]["limit"] == dense
                assert line["breaks_at"] is None or line["breaks_at"] - line["ratio"] <= config.tolerance
            else:
                assert line["breaks_at"] is None
                assert line["ratio"] == line["largest_possible"] > 0.7
        if limit != "0%":
            found = found_variants(run.record, run.candidates())
            assert all(each.everywhere == 1 for each in found)
            assert "up to the largest ratio that its search can meet" in (run.path / "frontier.md").read_text()


@pytest.fixture(scope="module", params=[0.0, 0.15])
def steps(request, config, tmp_path_factory):
    other = dataclasses.replace(
        config,
        runs=str(tmp_path_factory.mktemp("steps")),
        search=dataclasses.replace(
            STEPS, attention_share=0.4 if request.param else STEPS.attention_share, attention_from=request.param
        ),
        ratios=(0.1, 0.2, 0.5),
        estimation=EstimationConfig(estimators=("gate_fisher",)),
    )
    return other, frontier.frontier(other)


@pytest.mark.slow
class TestSteps:
    """With `rescore_every` every point is what `saap prune` makes at its ratio."""

    def test_every_point_is_that_of_its_ratio_alone(self, steps):
        config, run = steps
        arrays = run.load_arrays("keeps")
        (variant,) = variants_of(config)
        rows = run.candidates()
        assert len(rows) > 2 * 3 + 2
        for row in rows:
            alone = kept_at(config, variant, row["seed"], row["ratio_asked"]).keep
            assert same({n: arrays[f"{row['candidate']}/{n}"] for n in STRUCTURES}, alone)
        once = kept_at(config, variant._replace(search=SEARCH), 0, 0.5).keep
        assert not same({n: arrays[f"gate_fisher,seed=0@0.5/{n}"] for n in STRUCTURES}, once), "steps matter"

    def test_a_comparison_of_the_single_ratio_makes_the_same(self, steps, tmp_path, monkeypatch):
        monkeypatch.setattr(job, "write_report", lambda path, status: None)
        config, run = steps
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(CompareConfig) if hasattr(config, f.name)}
        fields |= {"runs": str(tmp_path), "ratios": (0.5,), "best_ratio": 0.5}
        compared = compare.compare(CompareConfig(**fields))
        rows = {row["candidate"]: row for row in run.candidates()}
        for row in compared.candidates():
            assert row["keep"] == rows[row["candidate"]]["keep"]
            assert row["losses"][OUT] == pytest.approx(rows[row["candidate"]]["losses"][OUT], rel=1e-5)

    def test_scores_on_the_way_are_kept(self, steps, tmp_path, monkeypatch):
        config, run = steps
        files = {path.name for path in run.path.iterdir()}
        own = "-to0.5" if config.search.attention_from else ""
        assert {f"scores-road0-seed{seed}-{at}{own}.npz" for seed in (0, 3) for at in (0.15, 0.3, 0.45)} <= files
        resumed(config, run, tmp_path, 3)
        monkeypatch.setattr(frontier, "calibrate", lambda *_, **__: pytest.fail("observed again"))
        again = frontier.frontier(dataclasses.replace(config, runs=str(tmp_path)))
        assert stripped(again) == stripped(run)


def stripped(run):
    """Return what a run found, without times; in whatever order candidates came."""
    rows = sorted(({**row, "seconds": 0} for row in run.candidates()), key=lambda row: row["candidate"])
    return rows, run.record["frontier"], {**run.record["dense"], "seconds": 0}


def resumed(config, run, path, rows: int) -> None:
    """Make a run directory that holds what another one held after so many candidates, the last line torn."""
    (path / run.path.name).mkdir()
    for file in run.path.iterdir():
        if file.suffix == ".npz" and file.name != "keeps.npz":
            (path / run.path.name / file.name).write_bytes(file.read_bytes())
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / run.path.name / "metrics.jsonl").write_bytes(b"".join(lines[:rows]) + lines[rows][:30])
    record = json.loads((run.path / "run.json").read_text())
    record.pop("frontier")
    if rows == 0:
        record.pop("dense")
    record |= {"status": "running", "config": {**record["config"], "runs": str(path)}}
    (path / run.path.name / "run.json").write_text(json.dumps(record))


def test_nothing_is_held_against_what_is_not_finite():
    assert frontier.limit_of("ppl@16 a", 20.0, 5.0) == pytest.approx(21)
    for dense in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"expected a finite perplexity of the unpruned model on .*, got {dense}"):
            frontier.limit_of("ppl@16 a", dense, 5.0)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [0, 1, 7, 12, 13, 20])
def test_taken_up_again_to_the_last_bit(config, run, tmp_path, rows):
    """A run that was killed on the curve or in a round of the bisection finds what the one nobody killed found."""
    assert len(run.candidates()) > 20
    resumed(config, run, tmp_path, rows)
    again = frontier.frontier(dataclasses.replace(config, runs=str(tmp_path)))
    assert stripped(again) == stripped(run)


@pytest.mark.slow
def test_killed_while_it_writes(config, run, tmp_path, monkeypatch):
    """Negative control of the above: interrupted for real, at three moments, in one directory."""
    other, append = dataclasses.replace(config, runs=str(tmp_path)), frontier.RunDirectory.append
    for moment in (2, 9, 5):
        count = itertools.count()

        def dying(self, row, count=count, moment=moment):
            if next(count) == moment:
                raise KeyboardInterrupt
            append(self, row)

        monkeypatch.setattr(frontier.RunDirectory, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            frontier.frontier(other)
    monkeypatch.setattr(frontier.RunDirectory, "append", append)
    again = frontier.frontier(other)
    assert stripped(again) == stripped(run)
    (tmp_path / "less").mkdir()
    less = frontier.frontier(dataclasses.replace(other, runs=str(tmp_path / "less"), tolerance=0.1))
    assert stripped(less) != stripped(run)


class TestOutput:
    def test_files(self, config, run):
        svg = (run.path / "frontier.svg").read_text()
        ElementTree.fromstring(svg)
        found = found_variants(run.record, run.candidates())
        for each in found:
            assert f"{each.variant}: {100 * each.ratio.mean:.1f} %" in svg
        for name, text in frontier_files(run.record, run.candidates()).items():
            assert (run.path / name).read_text() == text, "equal records, equal bytes"
        table = (run.path / "frontier.md").read_text()
        assert table.startswith(escaped(summary(run.record, found)))
        lines = (run.path / "frontier.csv").read_text().splitlines()
        assert len(lines) == 1 + 2 * len(seeds_of(config))
        assert len((run.path / "curve.csv").read_text().splitlines()) == 2 + len(run.candidates())

    def test_page_shows_all_that_is_written(self, run, tmp_path):
        assert missing_from_page(run.path) == []
        copy = shutil.copytree(run.path, tmp_path / "run")
        for name, old, new in (("frontier.svg", "<title>", "<title>x"), ("curve.csv", "candidate", "model"),
                               ("frontier.md", "| wanda", "| wandas")):  # fmt: skip
            (copy / name).write_text((copy / name).read_text().replace(old, new))
        assert missing_from_page(copy) == ["curve.csv", "frontier.md", "frontier.svg"], "negative control"

    @pytest.mark.slow
    def test_on_the_command_line(self, config, tmp_path, capsys, tiny_model_directory):
        words = [
            *("--model.name", str(tiny_model_directory), "--runs", str(tmp_path), "--ratios", "0.2", "0.4", "0.6"),
            *("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2"),
            *("--evaluation.windows", "8", "--evaluation.length", "16", "--evaluation.batch-size", "2"),
            *("--estimation.estimators", "magnitude", "--max-ppl-increase", "20%"),
        ]
        assert main.main(["frontier", *words]) == 0
        text = capsys.readouterr().out
        assert "largest ratio within +20 %" in text
        assert max(map(len, text.partition("saap prune")[0].splitlines())) <= 100
        assert "saap prune" in text, "a command is one line, however long"
        assert main.main(["frontier", *words]) == 0, "the same again prints what is there"
        assert "magnitude" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--max-ppl-increase", "10"], "max_ppl_increase: expected a percentage with its sign, got '10'"),
            (["--ratios", "0.0", "0.2"], "ratios: expected numbers above 0"),
            (["--tolerance", "0"], "tolerance: expected a ratio in [0.0005, 1), got 0.0"),
            (["--ratios", "0.2", "0.99"], "ratios: expected at most 0.7"),
            (["--estimation.estimators", "gate_fischer"], "did you mean 'gate_fisher'"),
        ],
    )
    def test_refused(self, config, tmp_path, capsys, words, message, tiny_model_directory):
        more = ["--calibration.examples", "3", "--calibration.length", "16", "--runs", str(tmp_path / "runs")]
        evaluation = ["--evaluation.windows", "3", "--evaluation.length", "16"]
        assert main.main(["frontier", "--model.name", str(tiny_model_directory), *more, *evaluation, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "runs").exists()
