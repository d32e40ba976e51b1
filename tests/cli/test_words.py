"""Words of a command: names of one thing, lists with commas, and what a wrong one is answered with."""

import shlex

import pytest

from saap_jax.cli import main
from saap_jax.cli.arguments import load_config, parse
from saap_jax.cli.words import options_of
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import PACKAGED_MODELS
from saap_jax.config.recover import MethodConfig
from saap_jax.llama.files.sources import PACKAGED
from tests.cli.test_main import refused


def test_models_of_configurations_are_those_of_packages():
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
        ("comparee", "'compare'"),
        ("compare --metod x", "--methods"),
        ("compare --method.nme x", "--methods"),
        ("compare wanda,unform", "'uniform'"),
        ("compare quikstart", "'quickstart'"),
        ("score --estimators 'wnda+fisher'", "'wanda'"),
        ("compare --model smolm2-135m", "smollm2-135m"),
        ("compare smollm2-135m", "--model smollm2-135m"),
        ("prune --ratio 0.2 --calibration.scenarios builtin:referense", "builtin:reference"),
        ("compare --estimators wanda", "--methods"),
    ],
)
def test_an_unknown_word_has_a_suggestion(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"did you mean {said}" in refused(capsys, shlex.split(words))
    assert [*tmp_path.rglob("*")] == []


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
