"""Cards of what commands make, and `saap push`: one commit to a hub that is not there, or one line why not."""

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.repocard import metadata_load

from saap_jax.cli import main
from saap_jax.jobs import push
from saap_jax.llama.files.source import source_of
from saap_jax.runs.origin import read_origin
from saap_jax.runs.reading import read_candidates, read_run
from tests.cli.test_main import refused

CALIBRATION = ("--calibration.examples", "3", "--calibration.length", "16", "--calibration.batch-size", "2")


@pytest.fixture(scope="module")
def pruned(tiny_model_directory, tmp_path_factory):
    """Return a model that `saap prune` made of one whose card names a licence."""
    place = tmp_path_factory.mktemp("cards")
    shutil.copytree(tiny_model_directory, place / "dense")
    (place / "dense" / "README.md").write_text("---\nlicense: mit\nbase_model: org/other\n---\n# dense\n")
    words = (
        "--estimator",
        "wanda",
        "--ratio",
        "0.3",
        "--compensation.method",
        "none",
        "--search.allocation",
        "global",
        "--search.skip-layers",
    )
    made = str(place / "pruned")
    assert main.main(["prune", "--model.name", str(place / "dense"), "--out", made, *words, *CALIBRATION]) == 0
    return place / "pruned"


def test_each_step_is_on_the_card(pruned, tmp_path):
    text = (pruned / "README.md").read_text()
    assert metadata_load(pruned / "README.md")["license"] == "mit"
    for said in (
        "- estimator: wanda",
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
    assert main.main(again.split()[1:]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_best_of_a_comparison_has_figures_with_intervals(tiny_model_directory, tmp_path):
    words = ["--model.name", str(tiny_model_directory), "--runs", str(tmp_path), *CALIBRATION, "--ratios", "0.3"]
    words += ["--estimation.estimators", "magnitude", "--evaluation.windows", "8", "--evaluation.length", "16"]
    assert main.main(["compare", *words]) == 0
    (row,), _ = read_candidates(tmp_path / "compare")
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


class FakeHub:
    """A hub of one user, in memory."""

    endpoint = "https://hub.test"

    def __init__(self, fails=None):
        self.repositories: dict[str, set[str]] = {}
        self.commits: list[dict] = []
        self.private: list[bool] = []
        self.fails = fails

    def whoami(self):
        return {"name": "me"}

    def repo_exists(self, repository):
        return repository in self.repositories

    def list_repo_files(self, repository):
        return sorted(self.repositories[repository])

    def create_repo(self, repository, *, private):
        self.private.append(private)
        self.repositories[repository] = {".gitattributes"}

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.fails is not None:
            raise self.fails
        self.commits.append({"folder": folder_path, "text": (folder_path / "README.md").read_text(), **options})
        kept = set() if options["delete_patterns"] else self.repositories[repo_id]
        self.repositories[repo_id] = kept | {path.name for path in folder_path.iterdir()}


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(push, "HfApi", lambda: fake)
    monkeypatch.setattr(push, "get_token", lambda: "a token")
    return fake


@pytest.fixture
def directory(pruned, tmp_path):
    return shutil.copytree(pruned, tmp_path / "pruned")


def test_push(hub, directory, capsys):
    (directory / ".hidden").write_text("x")
    assert main.main(["push", str(directory), "org/small", "--private"]) == 0
    assert "https://hub.test/org/small" in capsys.readouterr().out
    (commit,) = hub.commits
    assert "# small\n" in commit["text"], "the card carries the name of the repository"
    assert commit["ignore_patterns"] == [".*"]
    assert hub.private == [True]
    assert "pass --replace" in refused(capsys, ["push", str(directory), "org/small"])
    assert main.main(["push", str(directory), "org/small", "--replace"]) == 0
    assert hub.commits[-1]["delete_patterns"] == ["*"]
    assert main.main(["push", str(directory), "mine"]) == 0
    assert set(hub.repositories) == {"org/small", "me/mine"}


def test_a_card_of_your_own_is_sent_as_it_is(hub, directory, capsys):
    mine = "---\nlicense: mit\n---\nmine\n"
    (directory / "README.md").write_text(mine)
    assert main.main(["push", str(directory), "org/small"]) == 0
    assert hub.commits[0]["text"] == mine
    (directory / "README.md").write_text("---\nlicense: {: bad\n---\nmine\n")
    assert "expected metadata in YAML" in refused(capsys, ["push", str(directory), "org/other"])
    assert len(hub.commits) == 1


def test_a_directory_without_a_record_gets_what_is_known(directory, capsys):
    (directory / "README.md").unlink()
    (directory / "saap.json").unlink()
    assert main.main(["push", str(directory), "--no-upload"]) == 0
    assert "not sent" in capsys.readouterr().out
    text = (directory / "README.md").read_text()
    assert "license: other" in text
    assert "pruned" not in metadata_load(directory / "README.md")["tags"]
    assert str(directory.parent) not in text


@pytest.mark.parametrize(
    ("item", "library"), [("7/model_params", "saap_jax"), ("7/items", "saap_jax"), ("x", "transformers")]
)
def test_steps_that_another_program_trained_are_not_for_transformers(item, library, tiny_model_directory, tmp_path):
    place = shutil.copytree(tiny_model_directory, tmp_path / "trained")
    (place / item).mkdir(parents=True)
    assert main.main(["push", str(place), "--no-upload"]) == 0
    assert metadata_load(place / "README.md")["library_name"] == library


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "directory: expected a name, got nothing"),
        (["DIR"], "repository: expected a name, got nothing"),
        (["EMPTY", "org/x"], "expected a model directory, with config.json or pruned.json"),
        (["DIR", "a/b/c"], "expected ORGANISATION/NAME, got 'a/b/c'"),
        (["DIR", "a", "b"], "expected DIRECTORY and REPOSITORY, got 3 words"),
    ],
)
def test_bad_words_are_refused_before_anything_is_written(words, said, hub, directory, tmp_path, capsys):
    (directory / "README.md").unlink()
    places = {"DIR": str(directory), "EMPTY": str(tmp_path)}
    assert said in refused(capsys, ["push", *(places.get(word, word) for word in words)])
    assert not (directory / "README.md").exists()
    assert not hub.repositories


def test_without_a_token(hub, directory, capsys, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert "expected a token of the hub with write access, found none; run hf auth login" in refused(
        capsys, ["push", str(directory), "org/small"]
    )


def unauthorised():
    response = SimpleNamespace(headers={}, status_code=403, request=None, text="")
    return HfHubHTTPError("403 Forbidden: no write access\nmore", response=response)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (unauthorised(), "refused it (403 Forbidden: no write access)"),
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (TimeoutError("timed out"), "cannot be reached (timed out)"),
        (type("ConnectError", (Exception,), {"__module__": "httpx2._exceptions"})("no route"), "(no route)"),
    ],
)
def test_what_the_hub_says_is_one_line_and_the_same_command_goes_on(error, said, hub, directory, capsys):
    hub.fails = error
    line = refused(capsys, ["push", str(directory), "org/small"])
    assert said in line
    assert "nothing was put there" in line
    hub.fails = None
    assert main.main(["push", str(directory), "org/small"]) == 0
    assert json.loads((directory / "saap.json").read_text())["schema"] == 1


def test_a_defect_is_no_refusal_of_the_hub(hub, directory, capsys):
    hub.fails = KeyError("mine")
    assert "nobody foresaw this error" in refused(capsys, ["push", str(directory), "org/small"])
