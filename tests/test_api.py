"""The calls of a Python session: estimators as names, objects, files and plugins; what results show."""

import importlib.metadata
import re

import jax
import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.estimation.registry import ESTIMATORS, PLUGINS, make_estimator
from saap_jax.llama.model import random_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.runtime.progress import step
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.repair.output import LeastSquares
from saap_jax.steps.score.stability import stabilised
from saap_jax.subjects.llama import CutLlama
from tests.fake_runs import fake_run

MINE = """
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.base import Estimator


def twice(*, times: int = 2) -> Estimator:
    def score(statistics, params):
        return {name: times * abs(value).mean(0) for name, value in statistics.of(GATE_GRADIENT).items()}

    return Estimator(needs=frozenset({GATE_GRADIENT}), score=score)


def nothing():
    return 3
"""


@pytest.fixture(scope="module")
def model():
    widths = LayerWidths(kv_heads=2, q_per_kv=2, mlp=8)
    return random_llama(LlamaSpec(vocab=32, embed=8, head_dim=4, layers=(widths,) * 2, tied=True), jax.random.key(0))


@pytest.fixture(scope="module")
def windows():
    tokens = np.random.default_rng(0).integers(0, 32, (8, 8)).astype(np.int32)
    return Windows(tokens, np.ones(tokens.shape, bool))


def changed(windows, place, token=None, real=True):
    """Return windows with another token, or mask, at a place."""
    tokens, mask = (each.copy() for each in windows)
    tokens[place] = tokens[place] if token is None else token
    mask[place] = real
    return Windows(tokens, mask)


STRANGE = {
    "negative": (lambda w: changed(w, (2, 5), -3), r"expected tokens in 0 … 31, .* got -3 at 5 of window 2"),
    "beyond the vocabulary": (
        lambda w: changed(w, (7, 0), 32),
        r"expected tokens in 0 … 31, .* got 32 at 0 of window 7",
    ),
    "under padding": (lambda w: changed(w, (1, 7), -1, real=False), r"under padding too, got -1 at 7 of window 1"),
    "left padding": (lambda w: changed(w, (3, 0), real=False), "got padding at 0 before a real token at 1 of window 3"),
    "a hole": (lambda w: changed(w, (0, 4), real=False), "got padding at 4 before a real token at 5 of window 0"),
    "no real token": (lambda w: w._replace(mask=np.zeros_like(w.mask)), "at least one window of two .* got none of 8"),
    "one real token": (lambda w: w._replace(mask=w.mask & (np.arange(8) < 1)), "at least one window .* got none of 8"),
    "no window": (lambda w: Windows(w.tokens[:0], w.mask[:0]), "at least one window of two real .* got none of 0"),
    "fractions": (
        lambda w: w._replace(tokens=w.tokens + 0.5),
        r"expected tokens, integers, .* got float64 of \[8, 8\]",
    ),
    "a mask of numbers": (lambda w: w._replace(mask=w.mask.astype(np.int32)), r"bool, .* and int32 of \[8, 8\]"),
    "another shape": (lambda w: w._replace(mask=w.mask[:, :7]), r"got int32 of \[8, 8\] and bool of \[8, 7\]"),
}
READERS = {
    "score": lambda model, text: saap_jax.score_units(model, text, ["magnitude"]),
    "chain": lambda model, text: saap_jax.run_chain(model, "random > uniform", {"web": text}, 0.3),
    "perplexity": saap_jax.perplexity,
    "cut": lambda model, text: CutLlama(model).losses(text, 4),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("strange", STRANGE)
def test_windows_are_checked_where_models_read(model, windows, strange, reader):
    make, said = STRANGE[strange]
    with pytest.raises(ValueError, match=f"windows: .*{said}"):
        reader(model, make(windows))


def test_windows_that_are_padded_are_read(model, windows):
    padded = changed(windows, (2, 7), 0, real=False)
    blanked = padded._replace(mask=padded.mask & (np.arange(8) != 1)[:, None])
    kept = Windows(*(np.delete(each, 1, axis=0) for each in padded))
    assert saap_jax.perplexity(model, blanked) == pytest.approx(saap_jax.perplexity(model, kept), rel=1e-6)
    assert saap_jax.perplexity(model, blanked) != pytest.approx(saap_jax.perplexity(model, padded), rel=1e-6), "control"
    last = changed(windows, (0, 0), 31)
    for kind in (np.int64, np.uint8, np.int32):
        text = last._replace(tokens=last.tokens.astype(kind))
        assert saap_jax.perplexity(model, text) == saap_jax.perplexity(model, last)
        assert saap_jax.score_units(model, text, ["magnitude"]).estimators == ["magnitude"]


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


@pytest.mark.slow
def test_names_objects_and_files_score_alike(model, windows, mine):
    made = make_estimator(f"{mine}:twice")
    scored = saap_jax.score_units(model, windows, ["gate_taylor", f"{mine}:twice(times=3)", made])
    assert scored.estimators == ["gate_taylor", f"{mine}:twice(times=3)", "score"]
    again = saap_jax.score_units(model, windows, {"mine": made})
    for name, taylor in scored.scores("gate_taylor").items():
        np.testing.assert_allclose(scored.scores("score")[name], 2 * taylor, rtol=1e-6)
        np.testing.assert_allclose(scored.scores(f"{mine}:twice(times=3)")[name], 3 * taylor, rtol=1e-6)
        np.testing.assert_allclose(again.scores("mine")[name], 2 * taylor, rtol=1e-6)
    assert not scored.stability, "a pass of its own, which is not asked for"
    with pytest.raises(ValueError, match="expected each name once, got 'score' twice"):
        saap_jax.score_units(model, windows, [made, made])


@pytest.mark.slow
def test_what_was_scored_is_searched_with_its_stability(model, windows):
    scored = saap_jax.score_units(model, windows, ["gate_taylor", "wanda"], stability=True)
    stable, plain = (
        saap_jax.select_units(model, scored, 0.4, f"{early} > global", estimator="gate_taylor").keep
        for early in ("stable(5.0)", "none")
    )
    scores = stabilised(scored.scores("gate_taylor"), scored.stability["gate_taylor"], 5.0)
    by_hand = saap_jax.select_units(model, scores, 0.4, "global").keep
    assert all(np.array_equal(stable[name], by_hand[name]) for name in stable)
    assert any((stable[name] != plain[name]).any() for name in plain), "control"
    ran = saap_jax.run_chain(model, "gate_taylor > stable(5.0) > global", windows, 0.4)
    assert all(np.array_equal(stable[name], ran.keep[name]) for name in stable)
    for estimator, said in ((None, "got none; name one"), ("fisher", "got 'fisher'")):
        with pytest.raises(ValueError, match=f"expected one of gate_taylor, wanda, {said}"):
            saap_jax.select_units(model, scored, 0.4, estimator=estimator)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("within(protect=(0,))", "method: expected an allocation, such as uniform, got 'within(protect=(0,))'"),
        ("uniform > learn(3)", "method: expected steps that read no text, got learn(steps=3); call run_chain"),
        ("uniform > rounds(0.1)", "expected steps that read no text, got rounds"),
        ("uniform > bias", "expected steps that read no text, got bias"),
        ("wanda > uniform", "expected steps that read no text, got wanda"),
        ("stable > uniform", "stable: expected a stability indicator over two examples or more, got none"),
        ("stable(over=scenarios) > uniform", "expects two or more calibration scenarios, got 1"),
    ],
)
def test_steps_that_read_text_are_no_selection(model, windows, method, said):
    scores = {"attention": np.ones((2, 2)), "mlp": np.ones((2, 8))}
    with pytest.raises(ValueError, match=re.escape(said)):
        saap_jax.select_units(model, scores, 0.3, method)
    for names in (["wanda > magnitude"], ["uniform"]):
        with pytest.raises(ValueError, match="estimators: expected a score, got"):
            saap_jax.score_units(model, windows, names)


def test_a_chain_prunes_and_repairs(model, windows):
    """Masked is cut; the chain may be a text, or made of steps."""
    made = saap_jax.run_chain(model, "wanda > uniform > least_squares", windows, 0.3, batch_size=2)
    assert made.metrics["corrections"]
    assert made.subject.removed(made.keep) >= 0.3 * made.subject.prunable
    small = made.subject.cut(made.keep).model
    masked, cut = saap_jax.perplexity(made.subject.model, windows, made.keep), saap_jax.perplexity(small, windows)
    assert masked == pytest.approx(cut, rel=1e-5)
    assert masked != pytest.approx(saap_jax.perplexity(model, windows, made.keep), rel=1e-5), "control"
    chain = saap_jax.chain("wanda", Uniform(), LeastSquares())
    again = saap_jax.run_chain(model, chain, windows, 0.3, batch_size=2)
    assert saap_jax.perplexity(again.subject.model, windows, again.keep) == masked


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{}:missing", "expected a function missing in the file, found none"),
        ("{}:nothing", "expected a factory of an Estimator, got int from it"),
        ("{}:twice(times='x')", "times: expected int, got 'x'"),
        ("nowhere.py:twice", "expected a Python file, found none at nowhere.py"),
        ("{}/../bad.py:twice", "the file fails: ZeroDivisionError"),
    ],
)
def test_what_a_file_does_not_hold_is_one_line(name, said, mine, tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    name = name.replace("{}/..", str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        make_estimator(name.format(mine))
    assert "\n" not in str(caught.value)


def test_registered_names_and_plugins(model, windows, mine, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **asked: [])
    before = dict(ESTIMATORS)
    try:
        factory = saap_jax.register("doubled", lambda: make_estimator(f"{mine}:twice"))
        assert saap_jax.register("doubled", factory) is factory
        fused = saap_jax.score_units(model, windows, ["doubled+gate_fisher"])
        assert fused.fusions["calibration"]["doubled+gate_fisher"]
        for name, said in (("doubled", "exists already"), ("a b", "expected an identifier"), ("saap", "other than")):
            with pytest.raises(ValueError, match=said):
                saap_jax.register(name, lambda: make_estimator("wanda"))
        with pytest.raises(ValueError, match="unknown estimator 'plugged'"):
            make_estimator("plugged")
        points = {"plugged": lambda: factory, "broken": lambda: 1 / 0}

        def entry_points(group, name):
            dist = type("Dist", (), {"name": "lab"})
            point = type("Point", (), {"load": staticmethod(points.get(name)), "dist": dist})
            return [point] if group == PLUGINS and name in points else []

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        assert make_estimator("plugged").needs == make_estimator("doubled").needs
        with pytest.raises(ValueError, match="the plugin lab cannot be loaded: ZeroDivisionError"):
            make_estimator("broken")
    finally:
        ESTIMATORS.clear()
        ESTIMATORS.update(before)


def test_results_show_their_rows(model, windows, tmp_path):
    scored = saap_jax.score_units(model, windows, ["wanda"])
    rows = list(scored.rows())
    assert len(rows) == 2 * (2 + 8)
    assert rows[-1]["score"] == pytest.approx(float(scored.scores("wanda")["mlp"][1, 7]))
    assert repr(scored) == "Calibrated(calibration: wanda; {'attention': [2, 2], 'mlp': [2, 8]}; no stability)"
    selection = saap_jax.select_units(model, scored, 0.3)
    assert sum(row["kept"] for row in selection.rows()) == sum(int(units.sum()) for units in selection.keep.values())
    assert repr(selection).startswith("Selection(")
    run = saap_jax.load_run(fake_run(tmp_path / "run"))
    dense, *others = run.rows()
    assert dense["candidate"] == "dense"
    assert [row["candidate"] for row in others] == [row["candidate"] for row in run.candidates]
    assert all(row.keys() == dense.keys() for row in others)
    assert len(repr(run)) < 200


def test_bars_pass_on_what_they_show(capsys):
    assert list(saap_jax.bars("score", (each for each in "abc"), 3)) == ["a", "b", "c"]
    with step(saap_jax.bars, "load the model"):
        pass
    said = capsys.readouterr().err
    assert "score: 100%" in said
    assert "3/3" in said
    assert "load the model: 100%" in said


def test_every_public_name_is_there():
    assert set(saap_jax.__all__) == {"__version__"} | saap_jax._HOMES.keys()
    for name in saap_jax.__all__:
        assert getattr(saap_jax, name) is not None
    assert dir(saap_jax) == sorted(saap_jax.__all__)
