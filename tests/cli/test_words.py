"""Words of a command: names of one thing, lists with commas, and what is known to be wrong before jax is loaded."""

import shlex
import subprocess
import sys

import pytest

from saap_jax.cli import main
from saap_jax.cli.arguments import load_config, parse
from saap_jax.cli.words import check_names, options_of, steps_and_estimators
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import PACKAGED_MODELS
from saap_jax.config.recover import MethodConfig
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.llama.files.sources import PACKAGED
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.base import STEPS
from saap_jax.steps.score.oracles import ORACLES


def test_names_in_the_sources_are_those_that_are_registered():
    ours = {name for name, step in STEPS.items() if step.__module__.startswith("saap_jax.")}
    made = {name for name, each in ESTIMATORS.items() if each.__module__.startswith("saap_jax.")}
    assert {*steps_and_estimators()} == ours | made | {*ORACLES, *RECIPES}
    assert tuple(PACKAGED) == PACKAGED_MODELS


@pytest.mark.parametrize(
    ("command", "words", "field", "value"),
    [
        ("compare", "--ratio 0.2,0.3", "ratios", (0.2, 0.3)),
        ("compare", "--ratios=0.2,0.3 --seeds 0,1", "seeds", (0, 1)),
        ("compare", "--recipes fast flap", "methods", ("fast", "flap")),
        ("compare", "--methods wanda,uniform", "methods", ("wanda,uniform",)),
        ("prune", "--methods wanda --ratios 0.3", "method", "wanda"),
        ("score", "--estimators wanda", "estimators", ("wanda",)),
        ("recover", "--model.name a/b", "model", "a/b"),
        ("recover", "a/b --method lora", "method", MethodConfig(name="lora")),
        ("compare", "--no-race --model a/b", "race", False),
        ("compare", "--name a --name b", "name", "b"),
        ("generate", "model '- one' '-1 or two' --seed 3", "prompts", ("- one", "-1 or two")),
    ],
)
def test_options_are_known_by_each_of_their_names(command, words, field, value):
    config = parse(command, main.COMMANDS[command], shlex.split(words)).config
    assert getattr(config, field) == value


@pytest.mark.parametrize("words", ["wanda --methods flap", "--method wanda --methods=flap", "--ratio 0.2 --ratios 0.3"])
def test_what_takes_several_values_is_said_once(words):
    with pytest.raises(ValueError, match=r"compare: --(methods|ratios): expected once, with all its values behind it"):
        parse("compare", main.COMMANDS["compare"], words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare wanda,unform", "'uniform'"),
        ("compare quikstart", "'quickstart'"),
        ("score --estimators 'wnda+fisher'", "'wanda'"),
        ("compare --model smolm2-135m", "smollm2-135m"),
        ("compare smollm2-135m", "--model smollm2-135m"),
        ("prune --ratio 0.2 --calibration.scenarios builtin:referense", "builtin:reference"),
        ("compare --estimators wanda", "--methods"),
    ],
)
def test_what_is_wrong_is_said_before_jax_is_loaded(words, said):
    code = "import sys; from saap_jax.cli.main import main; code = main(sys.argv[1:]); "
    code += "assert 'jax' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, *words.replace("'", "").split()], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"did you mean {said}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("known", ["wanda", "a = {wanda,fisher+wanda/obs} > {uniform,none}", "mine.py:own > global"])
def test_what_is_known_is_not_refused_by_its_name(known, monkeypatch):
    monkeypatch.delitem(sys.modules, "saap_jax.steps.chain")
    check_names(CompareConfig(methods=(known,)))
    with pytest.raises(ValueError, match="unknown step 'wnda'"):
        check_names(CompareConfig(methods=(known, "wnda")))
    with pytest.raises(ValueError, match="unknown step 'wnda'"):
        check_names(CompareConfig(methods=(f"{99 * 'wanda > '}wnda",)))


@pytest.mark.parametrize("words", ["quickstart --ratio 0.3 --mesh.data -1", "mine.py:problem", "wanda,uniform"])
def test_a_printed_configuration_is_the_same_again(words, capsys, tmp_path):
    command = main.COMMANDS["compare"]
    asked = parse("compare", command, words.split()).config
    assert main.main(["compare", *words.split(), "--print-config"]) == 0
    (tmp_path / "again.py").write_text(capsys.readouterr().out)
    again = load_config(str(tmp_path / "again.py"), CompareConfig)
    assert again == asked
    assert again != CompareConfig(), "control"


def test_every_option_has_one_name():
    assert {"model", "model.dtype", "ratios"} <= options_of(CompareConfig).keys()
    assert "model.name" not in options_of(CompareConfig)
