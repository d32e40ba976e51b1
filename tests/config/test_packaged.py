"""A configuration or a file of limits by its name: a path comes first, then the package; others are refused."""

import pytest

from saap_jax.cli.arguments import load_config, parse
from saap_jax.cli.main import COMMANDS
from saap_jax.config.jobs import CompareConfig, PruneConfig
from saap_jax.config.packaged import CONFIGS, find_file, packaged
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.recipes.registry import RECIPES
from saap_jax.steps.base import STEPS

MINE = "from saap_jax.config import CompareConfig\nCONFIG = CompareConfig(name='mine')\n"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """Run in a directory where nothing is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_paths_below_the_configurations():
    assert packaged()["papers/saap_llama_7b"] == CONFIGS / "papers" / "saap_llama_7b.py"
    assert packaged(".toml")["gates/strict"] == CONFIGS / "gates" / "strict.toml"
    assert not packaged().keys() & packaged(".toml").keys()


def test_a_packaged_configuration_runs_from_an_empty_directory():
    assert load_config("quickstart", CompareConfig).name == "quickstart"
    assert load_config("papers/saap_llama_7b", CompareConfig).name == "saap-llama-7b"
    with pytest.raises(ValueError, match="configuration recover: expected CONFIG of type CompareConfig, got Recover"):
        load_config("recover", CompareConfig)


def test_the_quickstart_compares_what_prune_makes():
    """With the same text and windows; its rows are methods by their names, ours among them."""
    quick, prune = load_config("quickstart", CompareConfig), PruneConfig()
    for name in ("model", "calibration", "evaluation", "remat", "mesh"):
        assert getattr(quick, name) == getattr(CompareConfig(), name) == getattr(prune, name)
    assert {*quick.methods} < {*STEPS, *ESTIMATORS, *RECIPES}
    assert "fast" in quick.methods
    assert quick.cut
    assert quick.new_tokens


def test_a_configuration_and_a_model_of_ones_own(empty):
    (empty / "mine.py").write_text(MINE)
    config = parse("compare", COMMANDS["compare"], ["other.py:problem", "mine.py", "--ratio", "0.3"]).config
    assert (config.name, config.model.name, config.ratios) == ("mine", "other.py:problem", (0.3,))


def test_a_file_wins_and_a_directory_does_not(empty):
    (empty / "quickstart").mkdir()
    assert load_config("quickstart", CompareConfig).name == "quickstart"
    (empty / "quickstart").rmdir()
    (empty / "quickstart").write_text(MINE)
    assert load_config("quickstart", CompareConfig).name == "mine"


@pytest.mark.parametrize(
    ("word", "suffix", "said"),
    [
        ("quikstart", ".py", ("found none at quikstart;", "papers/saap_llama_7b, ", "; did you mean quickstart?")),
        ("quickstart.py", ".py", ("found none at quickstart.py;", "; did you mean quickstart?")),
        ("../configs/quickstart", ".py", ("found none at ../configs/quickstart;",)),
        ("gates/default", ".py", ("fidelity, frontier, ",)),
        ("quickstart", ".toml", ("of the package: gates/default, gates/size, gates/strict",)),
    ],
)
def test_an_unknown_name_lists_those_that_there_are(word, suffix, said):
    with pytest.raises(FileNotFoundError) as refused:
        find_file(word, "configuration: expected a file", suffix)
    assert all(part in str(refused.value) for part in said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("words", ["models/a recover --name b", "recover models/a --name b"])
def test_a_word_of_recover_is_a_configuration_or_a_model(empty, words):
    def read(words: str) -> str:
        return parse("recover", COMMANDS["recover"], words.split())[0].model

    assert read(words) == "models/a"
    assert read("recover") == "models/pruned"
    (empty / "recover").mkdir()
    assert read("recover") == "recover", "a model that lies here"
