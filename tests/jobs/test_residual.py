"""Channels of the residual stream: gates against finite differences, cut against masked, budgets, `saap prune`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.cli import main
from saap_jax.config.jobs import ExportConfig, PruneConfig
from saap_jax.config.method import (
    CalibrationConfig,
    CompensationConfig,
    ModelConfig,
    ResidualConfig,
    SearchConfig,
    TargetsConfig,
)
from saap_jax.data import Windows, pairs
from saap_jax.discovery import count_parameters, discover, prunable_parameters
from saap_jax.discovery.tracing.trace import trace
from saap_jax.jobs import prune
from saap_jax.jobs.export import export_model
from saap_jax.jobs.residual import highest, kept_channels, narrow_model, observe_channels, remove_channels
from saap_jax.llama import load_keep, load_model
from saap_jax.llama.segments import existing_units, masks, ones_gates
from saap_jax.surgery.cut import cut, keep_from_json, keep_to_json, pruned_spec
from saap_jax.types import RESIDUAL
from tests.helpers import changed, dense_model, forward, length_mask, losses_of, ragged_model, random_tokens

WINDOWS = Windows(random_tokens(4, 7), length_mask(7, 5, 7, 6, seq=7))
KEEP = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
MODELS = {
    "tied": lambda: dense_model(tied=True),
    "ragged": ragged_model,
    "biases": lambda: dense_model(output_biases=True),
}


def with_channels(model, keep=KEEP):
    return existing_units(model.runs) | {RESIDUAL: keep[None]}


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_stream_is_the_masked_one(name):
    model = MODELS[name]()
    keep, tokens = with_channels(model), random_tokens(2, 7)
    masked, narrow = forward(model, tokens, masks(keep)), cut(model, keep)
    np.testing.assert_allclose(forward(narrow, tokens), masked, rtol=2e-5, atol=2e-5)
    assert narrow.spec == pruned_spec(model.spec, keep)
    assert narrow.spec.embed == KEEP.sum()
    assert not np.allclose(masked, forward(model, tokens), atol=1e-2)  # control: the channels matter
    assert keep_from_json(keep_to_json(keep))[RESIDUAL].tolist() == [KEEP.tolist()]


def test_epsilon_counts():
    """A stream of hardly any size, where the norms' ε decides: still the masked one, but not with ε as it was."""
    model = changed(dense_model(tied=True), "embedding", lambda value: value * 1e-3)
    keep, tokens = with_channels(model), random_tokens(2, 7)
    masked, narrow = forward(model, tokens, masks(keep)), cut(model, keep)
    np.testing.assert_allclose(forward(narrow, tokens), masked, rtol=1e-4, atol=1e-7)
    narrow.constants = model.constants
    assert not np.allclose(forward(narrow, tokens), masked, rtol=1e-4, atol=1e-7)


def test_gates_tell_finite_differences_of_each_example():
    model = ragged_model()
    scores = observe_channels(model, pairs(WINDOWS, 2)).scores
    ones, counts = ones_gates(model.runs), WINDOWS.mask[:, 1:].sum(1)
    slopes = np.zeros((4, 8))
    for channel in range(8):
        gates = [jnp.ones((1, 8)).at[0, channel].add(step) for step in (1e-2, -1e-2)]
        up, down = (losses_of(model, WINDOWS.tokens, WINDOWS.mask, ones | {RESIDUAL: gate}) for gate in gates)
        slopes[:, channel] = np.asarray(up - down) / 2e-2 / counts
    np.testing.assert_allclose(scores["gate_taylor"], np.abs(slopes).mean(0), rtol=1e-2)
    np.testing.assert_allclose(scores["gate_fisher"], np.square(slopes).mean(0), rtol=2e-2)
    assert not np.allclose(scores["gate_taylor"], np.abs(slopes.mean(0)), rtol=0.1)  # control: of each example


def test_activations_are_those_that_norms_hand_on():
    model = dense_model(layers=1)
    seen = observe_channels(model, pairs(WINDOWS, 2))
    mask = WINDOWS.mask.astype(np.float64)
    x = np.asarray(model.embedding[...], np.float64)[WINDOWS.tokens]
    share = np.square(x) / np.square(x).sum(-1, keepdims=True)
    expected = (share * mask[..., None]).sum((0, 1)) / mask.sum()
    np.testing.assert_allclose(seen.energy[0]["attention_norm"][0], expected, rtol=1e-5)
    for shares in (*seen.energy[0].values(), seen.last):
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)


def test_norm_scales_keep_what_they_say():
    """`mean` leaves the scales alone; `dense` hands on as much of the kept channels as the whole model does."""
    model = dense_model(tied=True)
    seen = observe_channels(model, pairs(WINDOWS, 4))
    mean = narrow_model(model, KEEP, seen, "mean")
    np.testing.assert_allclose(mean.norm[...], np.asarray(model.norm[...])[KEEP], rtol=1e-6)
    dense = narrow_model(model, KEEP, seen, "dense")
    mask = WINDOWS.mask[..., None]

    def first_normed(model):
        x = np.asarray(model.embedding[...], np.float64)[WINDOWS.tokens]
        normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True)) * np.asarray(model.runs[0].attention_norm[0])
        return np.square(normed * mask)

    whole = first_normed(model)[..., KEEP].sum()
    assert abs(first_normed(dense).sum() / whole - 1) < 0.15
    assert abs(first_normed(cut(model, with_channels(model))).sum() / whole - 1) > 0.2  # control: `masked`


def test_the_lowest_go_and_the_budget_is_met():
    assert highest(np.array([3.0, 1.0, 1.0, 2.0]), 2).tolist() == [True, False, False, True]
    model = dense_model()
    stage = remove_channels(model, {"text": WINDOWS}, 0.5, ResidualConfig(share=0.5, multiple_of=2), batch_size=4)
    assert stage.model.spec.embed == 6
    whole, left = (prunable_parameters(discover(each)) for each in (model, stage.model))
    assert whole - left + stage.rest * left == pytest.approx(0.5 * whole)
    assert kept_channels(576, 0.2, ResidualConfig(share=0.5)) == 512
    for share, of in ((0.01, 0.1), (1.0, 0.99)):
        with pytest.raises(ValueError, match=r"residual.share: .* of 576 channels of the residual stream, (576|0) as"):
            kept_channels(576, of, ResidualConfig(share=share))


@pytest.mark.parametrize(
    "other", [{"from_run": "runs/x"}, {"targets": TargetsConfig(latency="70%")}], ids=["from_run", "targets"]
)
def test_what_does_not_go_together_is_refused(other):
    with pytest.raises(ValueError, match=f"residual.share: expected no {next(iter(other))} beside it"):
        PruneConfig(residual=ResidualConfig(share=0.5), **other)
    PruneConfig(**other)


def test_the_traced_program_has_the_same_structure():
    """What is gated is what tracing finds: one structure of the whole model, of as many units."""
    model = dense_model(tied=True)
    traced = trace(lambda model, tokens: model(tokens), model, random_tokens(1, 4))
    streams = [each for each in traced.prunable if any(m.path.endswith("embedding") for m in each.members)]
    assert [each.units for each in streams] == [8]
    assert len(streams[0].members) == len(jax.tree.leaves(model))


@pytest.mark.slow
def test_prune_saves_a_narrower_model_that_loads(tiny_model_directory, tmp_path, capsys):
    out, name = str(tmp_path / "pruned"), str(tiny_model_directory)
    options = {
        "model": ModelConfig(name=name),
        "calibration": CalibrationConfig(examples=8, length=16, batch_size=2),
        "compensation": CompensationConfig(method="bias"),
        "search": SearchConfig(rescore_every=0.2),
        "ratio": 0.4,
    }
    residual = ResidualConfig(share=0.6, multiple_of=2)
    pruned = prune.prune(PruneConfig(out=out, residual=residual, **options))
    whole, loaded, keep = load_model(name), load_model(out), load_keep(out)
    assert pruned.channels == (whole.spec.embed, loaded.spec.embed) == (keep[RESIDUAL].size, keep[RESIDUAL].sum())
    assert loaded.spec.embed < whole.spec.embed
    prunable = [prunable_parameters(discover(each)) for each in (whole, loaded)]
    assert pruned.selection.actual >= 0.4
    biases = sum(leaf.size for run in loaded.runs for leaf in (run.attention.output_bias[...], run.mlp.down_bias[...]))
    assert pruned.selection.removed == prunable[0] - prunable[1]
    assert count_parameters(loaded) == pruned.parameters[1] < pruned.parameters[0] - pruned.selection.removed + biases
    assert dict(prune.summary_rows(pruned))["width of the residual stream"].endswith(f"-> {loaded.spec.embed}")
    exported = export_model(ExportConfig(model=out, out=str(tmp_path / "padded"), format="padded"))
    assert exported


@pytest.mark.slow
def test_on_the_command_line(tiny_model_directory, tmp_path, capsys):
    words = ["--model.name", str(tiny_model_directory), "--calibration.examples", "3", "--calibration.length", "16"]
    words += ["--search.skip-layers", "--residual.share", "0.5", "--residual.multiple-of", "2", "--ratio", "0.4"]
    assert main.main(["prune", "--out", str(tmp_path / "pruned"), *words, "--estimator", "gate_fisher"]) == 0
    assert "width of the residual stream" in capsys.readouterr().out
    for option, value, message in (
        ("--from-run", str(tmp_path / "run"), "residual.share: expected no from_run beside it"),
        ("--mesh.data", "2", "residual.share: expected no mesh beside it"),
    ):
        assert main.main(["prune", "--out", str(tmp_path / "other"), *words, option, value]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
