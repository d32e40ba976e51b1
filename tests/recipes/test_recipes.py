"""Recipes: found by name, refused clearly, and run beside other variants; each with its own search and compensation."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
from saap_jax.cli.recipes import facts
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.search import PREFERRED, SearchConfig
from saap_jax.selection.calibrate import make_members
from saap_jax.selection.variants import variants_of

from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS, main
from saap_jax.config.jobs import CompareConfig, FrontierConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.traced import for_factory
from saap_jax.jobs import compare, frontier, prune
from saap_jax.llama.files.load import load_keep
from saap_jax.recipes import Recipe, find_recipes, recipes
from saap_jax.runs.commands import prune_command

RUN = [name for name, recipe in recipes().items() if not recipe.missing]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_where_it_is_from(name):
    recipe = recipes()[name]
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", recipe.paper)
    assert recipe.calibration
    assert all(said.endswith(".") for said in recipe.deviations)
    for figure in recipe.published:
        assert 0 < figure.ratio < 1
        assert figure.value > 0
        assert "ppl" not in figure.metric or re.search(r"ppl@\d+", figure.metric)


@pytest.mark.parametrize("name", RUN)
def test_the_estimators_of_a_recipe_exist(name):
    recipe = recipes()[name]
    assert make_members([recipe.estimator], recipe.fusion)


def test_all_stands_for_those_that_can_be_run():
    assert list(find_recipes(["all"])) == RUN
    assert list(find_recipes(["flap"])) == ["flap"]
    assert not find_recipes([])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["flop"], "unknown recipe 'flop'; did you mean 'flap'?"),
        (["flap", "flap"], "expected each name once, got 'flap' 2 times"),
    ],
)
def test_names_that_are_none_are_refused(names, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        find_recipes(names)


def test_what_cannot_be_run_is_refused_with_the_reason(monkeypatch):
    slice_gpt = Recipe(title="SliceGPT", paper="arXiv:2401.15024", calibration="WikiText-2", missing="it rotates")
    monkeypatch.setattr("saap_jax.recipes.recipes", lambda: {"slicegpt": slice_gpt})
    with pytest.raises(ValueError, match="slicegpt cannot be run: it rotates"):
        find_recipes(["slicegpt"])
    assert not find_recipes(["all"])


def test_a_recipe_has_an_estimator_or_a_reason():
    with pytest.raises(ValueError, match="expected an estimator, or why it cannot be run"):
        Recipe(title="nothing", paper="arXiv:0000.00000", calibration="none")


class TestVariants:
    def test_recipes_follow_the_grid_with_their_own_search(self):
        config = CompareConfig(
            estimation=EstimationConfig(estimators=("wanda",)),
            recipes=("flap", "llm-pruner-param-second"),
            search=SearchConfig(allocation="global", device="tpu"),
            compensation=CompensationConfig(method="least_squares", damping=0.1),
        )
        plain, flap, second = variants_of(config)
        assert (plain.name, plain.recipe, plain.compensation) == ("wanda", "", config.compensation)
        assert (flap.search.allocation, flap.search.rank_by, flap.search.device) == ("global", "score", "tpu")
        assert (flap.compensation.method, flap.compensation.propagate) == ("bias", "dense")
        assert (second.scores, second.search.allocation, second.search.device) == ("fisher", "uniform_floor", "tpu")

    def test_they_run_alone_where_no_estimator_is_named(self):
        config = CompareConfig(estimation=EstimationConfig(estimators=()), recipes=("flap",))
        assert [variant.name for variant in variants_of(config)] == ["flap"]
        with pytest.raises(ValueError, match="expected at least one, or recipes beside it, got neither"):
            variants_of(CompareConfig(estimation=EstimationConfig(estimators=())))

    def test_fusions_of_recipes_have_scores_of_their_own(self):
        config = CompareConfig(estimation=EstimationConfig(estimators=("saap",)), recipes=("saap", "saap-paper"))
        assert len({variant.scores for variant in variants_of(config)}) == 3

    def test_a_traced_model_has_none(self):
        with pytest.raises(ValueError, match="recipes: are of attention and MLP of layers"):
            dataclasses.replace(for_factory(CompareConfig, "mine.py:problem"), recipes=("flap",))


@pytest.fixture(scope="module")
def run(tiny_model_directory, tmp_path_factory):
    names = ("flap", "fasp-mlp", "wanda-sp", "minitron", "shortgpt", "saap-paper")
    unprotected = SearchConfig(allocation="adaptive", stability_weight=-0.25)
    paper = dataclasses.replace(recipes()["saap-paper"], search=unprotected)  # the tiny model has few layers
    with pytest.MonkeyPatch.context() as patch:
        found = {**recipes(), "saap-paper": paper}
        for where in ("saap_jax.recipes", "saap_jax.jobs.sweep", "saap_jax.runs.commands"):
            patch.setattr(f"{where}.recipes", lambda: found)
        config = CompareConfig(
            model=ModelConfig(name=str(tiny_model_directory)),
            calibration=CalibrationConfig(examples=8, length=16, batch_size=2),
            evaluation=EvaluationConfig(windows=4, length=16, batch_size=2),
            estimation=EstimationConfig(estimators=("wanda",)),
            recipes=names,
            runs=str(tmp_path_factory.mktemp("runs")),
            ratios=(0.3,),
        )
        yield compare.compare(config)


@pytest.mark.slow
def test_a_run_compares_recipes_beside_estimators(run):
    rows = {row["candidate"]: row for row in run.candidates()}
    assert set(rows) == {f"{name}@0.3" for name in ("wanda", *run.record["config"]["recipes"])}
    assert {row.get("recipe") for row in rows.values()} == {
        None, "flap", "fasp-mlp", "wanda-sp", "minitron", "shortgpt", "saap-paper",
    }  # fmt: skip
    assert rows["flap@0.3"]["compensation"] == "bias"
    assert rows["fasp-mlp@0.3"]["compensation"] == "least_squares"
    whole = run.record["model"]["units"]["attention"]
    assert set(rows["fasp-mlp@0.3"]["kept"]["attention"]) == {whole}
    page = (run.path / "report.html").read_text()
    assert all(row["variant"] in page for row in rows.values())


@pytest.mark.slow
@pytest.mark.slow
def test_the_command_of_a_recipe_prunes_the_same_units(run, tmp_path):
    arrays = run.load_arrays("keeps")
    for name in ("flap@0.3", "fasp-mlp@0.3", "wanda-sp@0.3"):
        row = next(row for row in run.candidates() if row["candidate"] == name)
        words = shlex.split(prune_command(run.record, row))
        config, *_ = parse("prune", COMMANDS["prune"], [*words[2:], "--out", str(tmp_path / name)])
        assert config.compensation == recipes()[row["recipe"]].compensation
        if name == "flap@0.3":  # all that the command says of the method, the recipe says
            said = {part: getattr(PruneConfig(), part) for part in ("estimator", "fusion", "search", "compensation")}
            short = dataclasses.replace(config, recipe="flap", **said)
            assert prune.followed(short) == config
        prune.prune(config)
        kept = load_keep(tmp_path / name)
        for structure, counts in row["kept"].items():
            np.testing.assert_array_equal(kept[structure].sum(1), counts)
            np.testing.assert_array_equal(kept[structure], arrays[f"{name}/{structure}"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"estimator": "wanda"}, "recipe: flap says it all of a language model; expected no estimator beside it"),
        ({"search": SearchConfig(allocation="global")}, "expected no search beside it"),
        ({"from_run": "runs/a"}, "expected no from_run beside it, got runs/a"),
        ({"compensation": CompensationConfig(method="bias")}, "expected no compensation beside it"),
    ],
)
def test_what_a_recipe_says_is_not_said_again(changed, said):
    with pytest.raises(ValueError, match=said):
        PruneConfig(recipe="flap", **changed)
    with pytest.raises(ValueError, match="expected no model.name beside it, got mine.py:problem"):
        for_factory(PruneConfig, "mine.py:problem", recipe="flap")


def test_one_recipe_prunes_with_the_widths_that_are_asked_for():
    wide = dataclasses.replace(PREFERRED, device="tpu")
    assert prune.followed(PruneConfig(recipe="flap", search=wide)).search.device == "tpu"
    few = CalibrationConfig(examples=4)
    assert prune.followed(PruneConfig(recipe="wanda-sp", calibration=few)).calibration == few
    with pytest.raises(ValueError, match="expected at least 4 microbatches"):
        prune.followed(PruneConfig(recipe="saap", calibration=few))
    with pytest.raises(ValueError, match="recipe: expected one, got 'all'"):
        prune.followed(PruneConfig(recipe="all"))
    with pytest.raises(ValueError, match="did you mean 'flap'"):
        prune.followed(PruneConfig(recipe="flip"))


@pytest.mark.slow
def test_a_frontier_has_recipes_too(tiny_model_directory, tmp_path):
    config = FrontierConfig(
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=4, length=16, batch_size=2),
        evaluation=EvaluationConfig(windows=8, length=16, batch_size=4),
        estimation=EstimationConfig(estimators=()),
        recipes=("flap", "wanda-sp"),
        ratios=(0.2, 0.4),
        resamples=10,
        tolerance=0.1,
        runs=str(tmp_path),
    )
    made = frontier.frontier(config)
    rows = made.candidates()
    assert {(row["recipe"], row["compensation"]) for row in rows} == {("flap", "bias"), ("wanda-sp", "none")}
    compared = compare.compare(
        CompareConfig(
            model=config.model, calibration=config.calibration, evaluation=config.evaluation,
            estimation=config.estimation, recipes=("wanda-sp",), ratios=(0.4,), runs=str(tmp_path),
        )
    )  # fmt: skip
    (own,) = (row["keep"] for row in rows if row["candidate"] == "wanda-sp@0.4")
    assert [row["keep"] for row in compared.candidates()] == [own], "chosen layer by layer in both"


class TestCommand:
    def test_all_are_listed(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["recipes"]) == 0
        said = capsys.readouterr().out
        assert all(name in said and recipe.paper in said for name, recipe in recipes().items())

    def test_one_is_told_with_its_options_and_deviations(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        assert main(["recipes", "flap"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        for part in ("fluctuation(standardize=True)", "--search.allocation global", "--compensation.method bias"):
            assert part in said
        assert "WikiText-2 ppl@128 14.62, dense 12.62" in said
        assert all(each in said for each in recipes()["flap"].deviations)

    @pytest.mark.slow
    def test_what_it_prints_as_options_makes_the_recipe(self, tmp_path):
        """Of every recipe: the options, given to `saap prune`, are its search, fusion and compensation."""
        plain = tmp_path / "plain.py"
        for name, recipe in recipes().items():
            if recipe.missing:
                continue
            words = dict(facts(recipe))["options"]
            given = [] if words == "none" else shlex.split(words)
            plain.write_text(
                "from saap_jax.config import *\nCONFIG = PruneConfig(search=SearchConfig(), compensation="
                "CompensationConfig())"
            )
            config, *_ = parse("prune", COMMANDS["prune"], [str(plain), *given])
            assert (config.search, config.fusion, config.compensation) == (
                recipe.search, recipe.fusion, recipe.compensation,
            ), name  # fmt: skip

    def test_an_unknown_name_is_one_line(self, capsys):
        assert main(["recipes", "flop"]) == 2
        error = capsys.readouterr().err
        assert "did you mean 'flap'?" in error
        assert error.count("\n") == 1
