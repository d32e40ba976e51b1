"""The page of a score run: complete, true to the scores, escaped, and made for odd runs too."""

import base64
import json
import re

import numpy as np
import pytest
from saap_jax.selection.calibrate import Calibrated
from saap_jax.selection.fusion import fuse

from saap_jax.config.jobs import ScoreConfig
from saap_jax.report.kinds.patterns import pattern_data
from saap_jax.report.kinds.score import facts, find_patterns, read_scores, summary
from saap_jax.report.kinds.scores import rank_cells
from saap_jax.report.page.csv_text import data_text
from saap_jax.report.page.formats import format_correlation
from saap_jax.report.write import render_report, write_report
from saap_jax.runs.directory import RunDirectory, plain
from saap_jax.runs.scores import save_scores
from saap_jax.types import Scores
from tests.report.test_html import Page
from tests.report.test_scores import units

NAN = np.nan
USAGE = "activation_frequency(multiple=1.0)"


def invented(names: tuple[str, ...], scenarios: tuple[str, ...], seed: int = 0) -> dict[str, dict[str, Scores]]:
    """Return scores of 4 layers with 2 attention units and up to 6 channels; `magnitude` is the same everywhere."""
    random = np.random.default_rng(seed)
    gone = np.arange(6) >= np.array([6, 0, 3, 6])[:, None]

    def one() -> Scores:
        return {"attention": random.random((4, 2)), "mlp": np.where(gone, NAN, random.random((4, 6)))}

    weights = one()
    return {
        scenario: {name: weights if name.startswith("magnitude") else one() for name in names} for scenario in scenarios
    }


NAMES = ("random", "magnitude", "gate_fisher", "wanda", USAGE)


def kept(path, scores: dict[str, dict[str, Scores]], fused: bool = False, **fields) -> RunDirectory:
    """Return a run that keeps these scores as `saap score` does, and of the first two members a fusion."""
    run = RunDirectory.open(path, {"name": path.name, "model": {"name": "invented", "dtype": "float32"}, **fields})
    fusions = {s: {"a+b": fuse(dict(list(by.items())[:2]), "learned")} for s, by in scores.items()} if fused else {}
    with run.stage("score"):
        save_scores(run, Calibrated(scores, None, {s: fusions.get(s, {}) for s in scores}))
    run.update(kind="score", scenarios={name: [32, 128] for name in scores})
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    """Five estimators, two scenarios, a learned fusion in each."""
    return kept(tmp_path_factory.mktemp("runs") / "both", invented(NAMES, ("web", "code")), fused=True)


@pytest.fixture(scope="module")
def text(run) -> str:
    return render_report(run.path)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def drawings(page: Page) -> list[str]:
    """Return the labels of the large drawings."""
    return [attrs["aria-label"] for attrs in page.of("svg") if "aria-label" in attrs]


class TestPage:
    def test_needs_no_network(self, text, page):
        assert set(re.findall(r"https?://[^\"'\s<)]*", text)) == {"http://www.w3.org/2000/svg"}
        assert all(match.startswith("#") for match in re.findall(r"url\(([^)]*)", text))
        assert page.of("link") == page.of("img") == page.of("iframe") == []
        assert page.of("script") == [{}], "its own, which copies the configuration"
        assert all(attrs["href"].startswith("data:image/png;base64,") for attrs in page.of("image"))
        assert all(attrs["href"].startswith(("data:text/csv;base64,", "#")) for attrs in page.of("a"))
        policy = next(attrs["content"] for attrs in page.of("meta") if "content" in attrs and "http-equiv" in attrs)
        assert "script-src 'sha256-" in policy, "no other script may run"

    def test_shows_the_correlations_of_each_scenario(self, run, page):
        scores = read_scores(run.path)
        cells = [text for tag, text in page.texts if tag == "td"][: 2 * len(NAMES) ** 2]
        for scenario, by_estimator in enumerate(scores.values()):
            part = cells[scenario * len(NAMES) ** 2 :][: len(NAMES) ** 2]
            wanted = [
                "·" if i == j else format_correlation(value)
                for i, row in enumerate(rank_cells(by_estimator))
                for j, value in enumerate(row)
            ]
            assert part == wanted
        assert cells[: len(NAMES) ** 2] != cells[len(NAMES) ** 2 :]

    def test_tints_tell_sign_and_size(self, tmp_path):
        scores = {"a": units(1.0, 2.0, 3.0), "b": units(2.0, 1.0, 3.0), "c": units(3.0, 2.0, 1.0)}
        page = Page(render_report(kept(tmp_path / "r", {"s": scores}).path))
        tints = [attrs["style"] for attrs in page.of("td") if "style" in attrs]
        assert tints[2] == "background: rgba(0, 114, 178, 0.28)"  # b and a: 0.5
        assert tints[4] == "background: rgba(213, 94, 0, 0.55)"  # c and a: -1
        assert len(tints) == 6

    def test_shows_figures_with_their_alternatives(self, page):
        labels = [attrs["aria-label"] for attrs in page.of("svg") if "aria-label" in attrs]
        assert labels == ["Fusion: σ and weights", "Patterns by scenario: attention", "Patterns by scenario: mlp"]

    def test_identifiers_are_unique_and_references_resolve(self, text, page):
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
        assert used
        assert used <= set(ids)

    def test_offers_the_units_that_are_unimportant_everywhere(self, run, page):
        link = next(attrs for attrs in page.of("a") if attrs.get("download") == "unimportant.csv")
        found = find_patterns(run.record, read_scores(run.path))
        assert found is not None
        said = base64.b64decode(link["href"].partition("base64,")[2]).decode()
        assert said == data_text(pattern_data(found))
        assert said.count("\n") == 1 + sum(part.agreed for part in found.structures.values())

    def test_counts_them_by_layer(self, run, page):
        found = find_patterns(run.record, read_scores(run.path))
        assert found is not None
        cells = [text for tag, text in page.texts if tag == "td"]
        for part in found.structures.values():
            wanted = [*map(str, range(4)), *map(str, part.layers)]
            assert any(cells[i : i + 8] == wanted for i in range(len(cells)))

    def test_tells_how_to_reproduce(self, run, page):
        config = json.loads(next(text for tag, text in page.texts if tag == "pre"))
        assert config == plain(run.record["config"])
        values = [text for tag, text in page.texts if tag == "dd"]
        assert "web (32 windows of 128 tokens), code (32 windows of 128 tokens)" in values
        assert ", ".join(NAMES) in values

    def test_is_written_whole_and_alike_for_equal_scores(self, tmp_path):
        paths = []
        for seed, place in [(0, "first"), (0, "again"), (1, "other")]:
            run = kept(tmp_path / place / "run", invented(NAMES[:3], ("web",), seed))
            run.update(stages=[])  # no two runs take the same time
            paths.append(write_report(run.path))
        first, again, other = (path.read_bytes() for path in paths)
        assert first == again != other
        assert sorted(entry.name for entry in paths[0].parent.iterdir()) == [
            "report.html", "run.json", "scores.npz", "stability.npz",
        ]  # fmt: skip

    def test_looks_like_the_page_of_a_comparison(self, text):
        style = text.partition("<style>")[2].partition("</style>")[0]
        assert "prefers-color-scheme: dark" in style
        assert ".matrix" in style
        assert style.count("{") == style.count("}")


class TestOddRuns:
    def test_a_run_that_has_only_begun(self, tmp_path):
        run = RunDirectory.open(tmp_path / "begun", {"keep_statistics": "all"}).begin()
        page = Page(render_report(run.path))
        assert any("Nothing is scored yet." in text for _, text in page.texts)
        assert any(text == "score, running" for _, text in page.texts)
        assert page.of("table") == page.of("svg") == []

    def test_a_directory_without_a_run(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no run\.json in"):
            render_report(tmp_path)

    @pytest.mark.parametrize("key", ["gate_fisher/mlp", "web//mlp", "web/gate_fisher/heads", "mlp"])
    def test_scores_of_another_layout(self, tmp_path, key):
        run = RunDirectory.open(tmp_path / "old", {})
        run.save_arrays("scores", {key: np.ones((1, 2))})
        with pytest.raises(ValueError, match=r"expected arrays named scenario/estimator/structure, got '.*' in .*npz"):
            render_report(run.path)

    @pytest.mark.slow
    def test_one_scenario_without_usage_or_fusion(self, tmp_path):
        text = render_report(kept(tmp_path / "one", invented(NAMES[:4], ("web",))).path)
        assert drawings(Page(text)) == []
        assert "fused" not in text
        assert "Patterns" not in text
        assert text.count('class="w1 matrix"') == 1

    @pytest.mark.slow
    def test_one_scenario_with_usage(self, tmp_path):
        text = render_report(kept(tmp_path / "one", invented(NAMES, ("web",))).path)
        page = Page(text)
        assert len(drawings(page)) == 2
        assert "Importance and usage" in text
        assert "in all scenarios" not in text
        assert not any("download" in attrs for attrs in page.of("a"))

    def test_one_estimator(self, tmp_path):
        page = Page(render_report(kept(tmp_path / "one", invented(("wanda",), ("web",))).path))
        assert page.of("table")
        assert not any("Do estimators agree?" in text for _, text in page.texts)
        assert any(text.startswith("1 estimator scored all units (8 attention, 15 mlp)") for _, text in page.texts)

    @pytest.mark.slow
    def test_a_model_without_attention_units(self, tmp_path):
        scores = invented(NAMES[1:], ("web", "code"))
        for by_estimator in scores.values():
            for values in by_estimator.values():
                values["attention"] = np.full((4, 2), NAN)
        page = Page(render_report(kept(tmp_path / "none", scores).path))
        assert drawings(page) == ["Patterns by scenario: mlp"]
        assert any("No attention units." in text for _, text in page.texts)
        assert sum(text == "n/a" for tag, text in page.texts if tag == "td") == 2 * 6

    def test_many_estimators(self, tmp_path):
        names = tuple(f"taylor_element(reduction='max', number={n})" for n in range(25))
        page = Page(render_report(kept(tmp_path / "many", invented(names, ("web",))).path))
        said = [name.partition(",")[0] for name in names]
        assert sum(text == f"{i + 1} {name}," for i, name in enumerate(said) for _, text in page.texts) == 25
        matrix = next(i for i, (_, attrs) in enumerate(page.tags) if attrs.get("class") == "w1 matrix")
        assert page.tags[matrix - 1][1]["class"] == "scroll"

    @pytest.mark.slow
    def test_escapes_names_everywhere(self, tmp_path):
        odd = '<script>alert("x")</script>&'
        known = invented(NAMES, ("web", "code"))
        scores = {
            odd.replace("/", ""): {odd: known["web"]["wanda"], "b": known["web"]["gate_fisher"]},
            "code": {odd: known["code"]["wanda"], "b": known["code"]["gate_fisher"]},
        }
        fusions = {scenario: {odd: fuse(by_estimator)} for scenario, by_estimator in scores.items()}
        run = RunDirectory.open(tmp_path / "odd", {"model": {"name": odd}})
        save_scores(run, Calibrated(scores, None, fusions))
        run.update(kind="score", name=odd, scenarios={odd: [1, 2]}, git_commit=odd)
        with run.stage(odd):
            pass
        text = render_report(run.path)
        assert text.count("<script") == 1, "the page's own"
        assert "<script>alert" not in text
        page = Page(text)
        assert len(drawings(page)) == 3
        assert any(f"1 {odd}" == text for tag, text in page.texts if tag == "th")

    def test_a_fusion_with_a_usage_is_no_usage(self):
        scores = invented(("random+wanda", f"{USAGE}+wanda"), ("web", "code"))
        for by_estimator in scores.values():
            for name, values in by_estimator.items():
                by_estimator[name] = {structure: 1e6 * v for structure, v in values.items()}
        found = find_patterns({}, scores)
        assert found is not None
        assert (found.usage, found.importance) == (None, "random+wanda")


class TestWhichEstimators:
    def test_the_first_that_reads_the_text(self):
        found = find_patterns({}, invented(NAMES, ("web", "code")))
        assert found is not None
        assert (found.importance, found.usage, found.share) == ("gate_fisher", USAGE, 0.2)

    def test_what_the_configuration_says(self):
        asked = {"config": {"patterns": {"importance": "wanda", "share": 0.5}}}
        found = find_patterns(asked, invented(NAMES, ("web", "code")))
        assert found is not None
        assert (found.importance, found.share) == ("wanda", 0.5)
        asked["config"]["patterns"]["importance"] = "wand"
        with pytest.raises(
            ValueError, match="expected scores of wand in scenario web, got those of: random, magnitude"
        ):
            find_patterns(asked, invented(NAMES, ("web", "code")))

    @pytest.mark.parametrize(
        ("names", "scenarios", "importance"),
        [
            (("random(seed=1)", "magnitude", USAGE), ("web",), "magnitude"),
            (("random", "magnitude"), ("web", "code"), "magnitude"),
            (("random", "magnitude"), ("web",), None),
            (("random", USAGE), ("web", "code"), None),
            ((), ("web", "code"), None),
            (NAMES, (), None),
        ],
        ids=str,
    )
    def test_what_is_left(self, names, scenarios, importance):
        found = find_patterns({}, invented(names, scenarios))
        assert (found and found.importance) == importance

    def test_fields_are_those_of_the_configuration(self):
        config = ScoreConfig()
        assert (config.patterns.importance, config.patterns.share) == ("", 0.2)
        assert config.fusion.scope_constant is False


class TestSummary:
    def test_names_who_agrees_most_and_least(self):
        scores = {
            "web": {
                "random": units(3.0, 1.0, 2.0, mlp=(2.0, 1.0)),
                "a": units(1.0, 2.0, 3.0),
                "b": units(1.0, 2.0, 4.0),
                "c": units(3.0, 2.0, 1.0, mlp=(2.0, 2.0)),
            }
        }
        assert summary(scores, None) == [
            "4 estimators scored all units (3 attention, 2 mlp) in 1 scenario: web.",
            "On attention units, a and b agree most (Spearman 1.00), a and c least (−1.00).",
        ]

    def test_adds_what_scenarios_have_in_common(self):
        scores = invented(NAMES, ("web", "code"))
        said = summary(scores, find_patterns({}, scores))
        assert said[0] == "5 estimators scored all units (8 attention, 15 mlp) in 2 scenarios: web, code."
        assert said[1].startswith("On attention units of scenario web, ")
        assert "attention units (" in said[3]
        assert said[4].endswith("equal ones 20.0 %.")

    def test_facts(self):
        run = {"config": {"calibration": {"scenarios": ["a", "b"], "seed": 0}, "from_run": "runs/x"}}
        assert facts(run, {"web": {"wanda": units(1.0)}}) == {
            "scenarios": "web",
            "calibration": "scenarios a, b, seed 0",
            "statistics of": "runs/x",
            "estimators": "wanda",
        }
        assert facts({}, {}) == {}
