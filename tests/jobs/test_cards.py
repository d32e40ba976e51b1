"""Model cards beside what commands make: each step is on them, with the command that makes the same model again."""

import shlex
import shutil

import pytest
from huggingface_hub.repocard import metadata_load

from saap_jax.cli import main
from saap_jax.config.recover import MethodConfig, RecoverConfig
from saap_jax.llama.files.sources import source_of
from saap_jax.recovery.command import origin_step
from saap_jax.runs.directory import read_candidates, read_run
from saap_jax.runs.origin import read_origin
from tests.jobs.test_table import SMALL

CALIBRATION = SMALL[:6]


@pytest.fixture(scope="module")
def pruned(tiny_model_directory, tmp_path_factory):
    """Return a model that `saap prune` made of one whose card names a licence."""
    place = tmp_path_factory.mktemp("cards")
    shutil.copytree(tiny_model_directory, place / "dense")
    (place / "dense" / "README.md").write_text("---\nlicense: mit\nbase_model: org/other\n---\n# dense\n")
    words = ("--method", "wanda > global", "--ratio", "0.3", "--runs", str(place))
    made = str(place / "pruned")
    assert main.main(["prune", "--model.name", str(place / "dense"), "--out", made, *words, *CALIBRATION]) == 0
    return place / "pruned"


def test_each_step_is_on_the_card(pruned, tmp_path):
    text = (pruned / "README.md").read_text()
    assert metadata_load(pruned / "README.md")["license"] == "mit"
    for said in (
        "- method: wanda",
        "3 windows of 16 tokens of builtin:reference, seed 0",
        "--ratio 0.3",
        "# pruned\n",
    ):
        assert said in text
    assert main.main(["export", str(pruned), str(tmp_path / "padded"), "--format", "padded"]) == 0
    made, before = read_origin(tmp_path / "padded"), read_origin(pruned)
    assert made is not None
    assert before is not None
    assert made["steps"][:1] == before["steps"]
    assert [step["kind"] for step in made["steps"]] == ["prune", "export"]
    assert made["steps"][0]["parameters"][1] == made["steps"][1]["parameters"][0]
    assert made["steps"][1]["parameters"][0] < made["steps"][1]["parameters"][1]
    assert (before["loader"], made["loader"]) == ("saap_jax", "transformers")
    said = metadata_load(tmp_path / "padded" / "README.md")
    assert (said["license"], said["library_name"], said["tags"]) == ("mit", "transformers", ["pruned", "saap_jax"])


def test_the_command_on_a_card_makes_the_same_model(pruned, tmp_path):
    (step,) = read_origin(pruned)["steps"]
    again = step["command"].replace(str(pruned), str(tmp_path / "again"))
    assert main.main(shlex.split(again)[1:]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_best_of_a_comparison_has_figures_with_intervals(tiny_model_directory, tmp_path):
    words = ["--model.name", str(tiny_model_directory), "--runs", str(tmp_path), *CALIBRATION, "--ratios", "0.3"]
    words += ["--methods", "magnitude", "--evaluation.windows", "8", "--evaluation.length", "16", "--cut"]
    assert main.main(["compare", *words]) == 0
    (row,) = read_candidates(tmp_path / "compare")
    (step,) = read_origin(tmp_path / "compare" / "best")["steps"]
    found = {(figure["model"], figure["metric"]): figure for figure in step["figures"]}
    for model, ppl in (("pruned", row["ppl"]), ("dense", read_run(tmp_path / "compare")["dense"]["ppl"])):
        for metric, value in ppl.items():
            assert found[model, metric]["value"] == pytest.approx(value)
            assert found[model, metric]["low"] < value < found[model, metric]["high"]
            assert found[model, metric]["windows"] == 8
    text = (tmp_path / "compare" / "best" / "README.md").read_text()
    assert "No perplexity" not in text
    assert "license: other" in text
    assert "do not say its licence" in text


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "lora", "rank": 4, "matrices": ("up", "down")}, "lora --rank 4 --matrices up down"),
        ({"name": "groupwise"}, "groupwise"),
    ],
)
def test_the_method_of_a_recovered_model_is_what_is_not_usual(method, said):
    training, data, size = {"steps": 4, "best_step": 3, "rows": 8}, {"rows": 1}, {"parameters": 9}
    run = {"training": training, "data": data, "before": size, "after": size}
    facts = origin_step(RecoverConfig(method=MethodConfig(**method)), run)["facts"]
    assert (facts["method"], facts["learned from"]) == (said, "")
    assert facts["training"] == "4 steps of 8 rows, seed 0; the model is that of step 3"


@pytest.mark.parametrize(
    ("name", "card", "expected"),
    [
        ("smollm2-135m", None, {"repository": "HuggingFaceTB/SmolLM2-135M-Instruct"}),
        ("org/name", "license: gemma", {"repository": "org/name", "license": "gemma"}),
        ("here", "license: Some Licence", {"license": "other", "license_name": "Some Licence"}),
        ("org/x", "license: other\nlicense_link: LICENSE", {
            "repository": "org/x", "license": "other", "license_link": "https://huggingface.co/org/x/blob/main/LICENSE",
        }),
        ("here", "license: mit\nlicense_link: LICENSE", {"license": "mit"}),
        ("here", "license: [a, b]", {}),
        ("here", "{: bad", {}),
    ],
)  # fmt: skip
def test_what_files_say_of_their_source(name, card, expected, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    assert source_of(name, tmp_path) == {"name": name} | expected
