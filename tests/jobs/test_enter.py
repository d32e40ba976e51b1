"""Entries for the leaderboard: what a file's method is judged by, what is refused, and who stands where."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import saap_jax
from saap_jax.config.use import EnterConfig
from saap_jax.contrib.leaderboard import enter
from saap_jax.contrib.leaderboard import page as leaderboard
from saap_jax.data.windows import calibration_windows, evaluation_windows, pairs
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.report.render import markdown_text
from saap_jax.steps import run as steps_run
from tests.cli.test_main import refused

PROJECT = Path(__file__).parents[2]
SMALL = {"EXAMPLES": 8, "LENGTH": 16, "WINDOWS": 8}
MINE = '''"""Energy that
a unit writes.

More of it."""

import jax.numpy as jnp

from saap_jax.estimation.activations import ACTIVATION_MOMENTS
from saap_jax.estimation.base import Estimator
from saap_jax.estimation.base import score_writers


def energy():
    def score(statistics, params):
        square = statistics.of(ACTIVATION_MOMENTS).square
        return score_writers(lambda w, s: jnp.einsum("lucd,luc->lu", jnp.square(w), s), params, square)

    return Estimator(needs=frozenset({ACTIVATION_MOMENTS}), score=score)


AUTHOR = "Somebody"
METHOD = "FILE:energy > uniform > least_squares"
'''


@pytest.fixture
def small(tiny_model_directory, monkeypatch):
    """The rules, for a tiny model and little text."""
    for name, value in {**SMALL, "MODEL": str(tiny_model_directory)}.items():
        monkeypatch.setattr(enter, name, value)
    return tiny_model_directory


def test_an_entry_has_the_losses_of_the_cut_model_and_judges_see_other_windows(small, tmp_path, run):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    (tmp_path / "package.json").write_text('{"name": "of something else"}')
    run("enter", str(path), "--ratios", "0.2")
    told = run("enter", str(path), "--ratios", "0.5")
    run("enter", str(path), "--ratios", "0.5", "--judge", "7", "--seeds", "2")
    assert "mine" in told
    assert "unpruned" in told
    entry, judged = (json.loads((tmp_path / place / "mine.json").read_text()) for place in ("", "judged"))
    assert (entry["idea"], entry["author"], entry["seeds"]) == ("Energy that a unit writes.", "Somebody", [0])
    assert (judged["judged"], entry["judged"], len(set(judged["seeds"]))) == (True, False, 2)
    model, words = saap_jax.load_model(str(small)), saap_jax.load_tokenizer(str(small))
    whole = evaluation_windows("builtin:descriptions", words, 16, 16)
    for each, first in ((entry, 0), (judged, 1)):
        windows = whole._replace(tokens=whole.tokens[first::2], mask=whole.mask[first::2])
        np.testing.assert_allclose(each["dense"], window_losses(model, pairs(windows, 8)).means, rtol=1e-5)
        for (ratio, all_of), number in itertools.product(each["ratios"].items(), range(len(each["seeds"]))):
            made, text = all_of[number], calibration_windows("builtin:reference", words, 8, 16, each["seeds"][number])
            state = saap_jax.run_chain(model, entry["chain"].replace("mine.py", str(path)), text, float(ratio))
            cut = saap_jax.cut(state.subject.model, state.keep)
            np.testing.assert_allclose(made["losses"], window_losses(cut, pairs(windows, 8)).means, rtol=1e-4)
            assert made["parameters"] == saap_jax.count_parameters(cut)
            assert made["minutes"] > 0
    assert (list(entry["ratios"]), list(judged["ratios"])) == (["0.2", "0.5"], ["0.5"])
    assert abs(np.subtract(entry["dense"], judged["dense"])).max() > 1e-3, "control: the windows are other ones"
    path.write_text(MINE + "\n")
    run("enter", str(path), "--ratios", "0.5")
    assert [*json.loads((tmp_path / "mine.json").read_text())["ratios"]] == ["0.5"], "of other code"


def test_a_ratio_gets_nothing_that_another_one_made_but_the_scores(small, tmp_path, run, monkeypatch):
    """So that minutes are those of each pruned model; rounds of 0.1 lie on the way to both."""
    (path := tmp_path / "mine.py").write_text("METHOD = 'wanda > uniform > rounds(0.1)'")
    passes, calibrate = [], steps_run.calibrate
    monkeypatch.setattr(steps_run, "calibrate", lambda *a, **kw: (passes.append(a), calibrate(*a, **kw))[1])
    run("enter", str(path), "--ratios", "0.3", "0.2")
    assert len(passes) == 1 + 2 + 1


WRONG = {
    "no method": ("CHAIN = 'wanda'", 'expected METHOD = "CHAIN", got none'),
    "a method of another kind": ("METHOD = 3", "got int"),
    "an unknown step": ("METHOD = 'wnda'", "did you mean 'wanda'"),
    "biases": (
        "METHOD = 'wanda > uniform > bias'",
        "expected no parameters beside the model's, got 64 more, as of biases",
    ),
    "code that fails": ("METHOD = 1 / 0", "division by zero"),
    "units that stay": (
        "import dataclasses\nimport saap_jax\n\n@saap_jax.step('all_stay')\n@dataclasses.dataclass(frozen=True)\n"
        "class AllStay(saap_jax.Step):\n    '''Keep all.'''\n    kind = 'refinement'\n\n"
        "    def __call__(self, state, on):\n        return state._replace(keep=state.subject.existing)\n\n"
        "METHOD = 'wanda > uniform > all_stay'\n",
        "expected 50% of the prunable parameters gone, got 0.0%",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_entry_is_refused_in_one_line(name, small, tmp_path, capsys):
    content, said = WRONG[name]
    (path := tmp_path / "wrong.py").write_text(content)
    assert said in refused(capsys, ["enter", str(path), "--ratios", "0.5"])
    assert [*tmp_path.glob("*.json")] == []


def test_only_python_files_enter(capsys, tmp_path):
    assert "expected a Python file" in refused(capsys, ["enter", str(tmp_path / "none.py")])
    same = ["enter", __file__, "--calibration", "builtin:reference", "--evaluation", f"text:{__file__}"]
    assert "builtin" not in refused(capsys, [*same[:2], "--calibration", f"text:{__file__}", *same[4:]])


def entry(name: str, losses, *, minutes=1.0, seeds=(0,), text="a") -> dict:
    """An entry as it is read."""
    runs = [{"losses": [*each], "minutes": minutes, "parameters": 1} for each in losses]
    about = {"text": ["builtin:reference", "ppl@128 builtin:descriptions", text], "seeds": [*seeds]}
    return {"name": name, "author": "A", "chain": "wanda > uniform", "date": "2026-11-30", "commit": "0" * 40,
            **about, "judged": True, "dense": [3.0] * len(losses[0]), "ratios": {"0.5": runs}}  # fmt: skip


def test_the_race_says_who_is_told_apart_and_who_is_late_or_on_other_text_is_not_ranked(tmp_path):
    random = np.random.default_rng(0)
    base = 5 + random.normal(size=(2, 64))
    close, noise = base + 0.05 * random.normal(size=(2, 64)), 0.1 * random.normal(size=(2, 64))
    both = {"seeds": (0, 1)}
    entries = [
        entry("worse", base + 0.3 + noise, **both), entry("best", base - 1e-3, **both), entry("close", close, **both),
        entry("late", base - 1, minutes=10.1, **both), entry("elsewhere", base[:1] - 1),
        entry("text", base - 1, text="b", **both),
    ]  # fmt: skip
    for number, each in enumerate(entries):
        (tmp_path / f"{number}.json").write_text(json.dumps(each))
    table = leaderboard.leaderboard(leaderboard.read_entries(tmp_path), 0.5)
    rows = {row["name"]: row for row in table.rows}
    best = min(("best", "close"), key=lambda name: rows[name]["value"])
    assert [row["name"] for row in table.rows][-3:] == ["worse", "late", "unpruned"]
    assert len(table.rows) == 5
    assert rows[best]["best"]
    assert [name for name, row in rows.items() if row.get("tied")] == [*{"best", "close"} - {best}]
    assert rows["best"]["value"] == pytest.approx(np.exp(base.mean() - 1e-3))
    assert rows["best"]["low"] < rows["best"]["value"] < rows["best"]["high"]
    assert "late" in table.notes[2]
    assert "elsewhere, text" in table.notes[3]
    assert rows["unpruned"]["value"] == pytest.approx(np.exp(3))
    (tmp_path / "0.json").write_text(json.dumps({**entries[0], "dense": [3.0]}))
    with pytest.raises(ValueError, match="0.json: .* entry of the leaderboard"):
        leaderboard.read_entries(tmp_path)


def test_the_page_has_the_table_of_the_files():
    entries = leaderboard.read_entries(PROJECT / "leaderboard" / "judged")
    text = markdown_text(leaderboard.leaderboard(entries, ratio) for ratio in EnterConfig().ratios)
    page = (PROJECT / "docs" / "leaderboard.md").read_text()
    made = page.partition("<!-- table -->\n")[2].partition("<!-- end -->")[0]
    assert made.strip() == text.strip(), "python -m saap_jax.contrib.leaderboard.page leaderboard/judged"


def test_entries_of_the_project_are_files_with_a_method():
    for path in (PROJECT / "leaderboard").glob("*.py"):
        assert enter.method_of(path)[1].steps
