"""Channels of the residual stream: gates against finite differences, cut against masked, budgets, `saap prune`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import calibrate
from saap_jax.cli import main
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.jobs import ExportConfig
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, ModelConfig, TargetsConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.config.search import ResidualConfig, SearchConfig
from saap_jax.data import Windows, pairs
from saap_jax.estimation.channels import observe_channels
from saap_jax.jobs import prune
from saap_jax.jobs.export import export_model
from saap_jax.llama import load_keep, load_model
from saap_jax.llama.narrow import narrowed
from saap_jax.llama.segments import existing_units, masks, ones_gates
from saap_jax.selection.choose import check_ratios, choose_calibrated
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.cut import cut, keep_from_json, keep_to_json, pruned_spec
from saap_jax.trace.trace import trace
from saap_jax.types import QUERY_HEADS, RESIDUAL
from tests.helpers import (
    changed,
    dense_model,
    forward,
    length_mask,
    losses_of,
    ragged_model,
    random_model,
    random_tokens,
    spec_of,
)

WINDOWS = Windows(random_tokens(4, 7), length_mask(7, 5, 7, 6, seq=7))
KEEP = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
MODELS = {
    "tied": lambda: dense_model(tied=True),
    "ragged": ragged_model,
    "biases": lambda: dense_model(output_biases=True),
}


def with_channels(model, keep=KEEP):
    return existing_units(model.segments) | {RESIDUAL: keep[None]}


@pytest.mark.slow
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


def test_padding_whose_word_has_a_row_of_zeros_counts_for_nothing():
    """As that of token 0 has where nothing trained it; rows of padding alone are filled with it."""
    model = changed(dense_model(tied=True), "embedding", lambda value: value.at[0].set(0.0))
    tokens = np.where(WINDOWS.mask, np.maximum(WINDOWS.tokens, 1), 0)
    few = observe_channels(model, [(tokens[:2], WINDOWS.mask[:2])]).scores
    filled = np.concatenate([tokens[:2], np.zeros_like(tokens[:2])])
    more = observe_channels(model, [(filled, np.concatenate([WINDOWS.mask[:2], np.zeros((2, 7), bool)]))]).scores
    for name, scores in few.items():
        np.testing.assert_allclose(more[name], scores, rtol=1e-4, atol=1e-6)
        assert scores.max() > 0


def test_epsilon_counts():
    """A stream of hardly any size, where the norms' ε decides: still the masked one, but not with ε as it was."""
    model = changed(dense_model(tied=True), "embedding", lambda value: value * 1e-3)
    keep, tokens = with_channels(model), random_tokens(2, 7)
    masked, narrow = forward(model, tokens, masks(keep)), cut(model, keep)
    np.testing.assert_allclose(forward(narrow, tokens), masked, rtol=1e-4, atol=1e-7)
    narrow.constants = model.constants
    assert not np.allclose(forward(narrow, tokens), masked, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_gates_tell_finite_differences_of_each_example():
    model = ragged_model()
    scores = observe_channels(model, pairs(WINDOWS, 2)).scores
    ones, counts = ones_gates(model.segments), WINDOWS.mask[:, 1:].sum(1)
    slopes = np.zeros((4, 8))
    for channel in range(8):
        gates = [jnp.ones((1, 8)).at[0, channel].add(step) for step in (1e-2, -1e-2)]
        up, down = (losses_of(model, WINDOWS.tokens, WINDOWS.mask, ones | {RESIDUAL: gate}) for gate in gates)
        slopes[:, channel] = np.asarray(up - down) / 2e-2 / counts
    np.testing.assert_allclose(scores["gate_taylor"], np.abs(slopes).mean(0), rtol=1e-2)
    np.testing.assert_allclose(scores["gate_fisher"], np.square(slopes).mean(0), rtol=2e-2)
    assert not np.allclose(scores["gate_taylor"], np.abs(slopes.mean(0)), rtol=0.1)  # control: of each example


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bias", "least_squares"])
def test_compensation_is_that_of_the_narrower_model(method, x64):
    """Masked with the corrected weights, cut, and the narrower model compensated by itself are one."""
    model = random_model(spec_of((2, 6), (2, 6)), dtype=np.float64)
    subject = LlamaSubject(model, further=(RESIDUAL,))
    keep = with_channels(model)
    keep["mlp"] = keep["mlp"].copy()
    keep["mlp"][0, :3] = False
    config = CompensationConfig(method=method, damping=0.1)
    made, corrections = subject.compensated(keep, WINDOWS, config, batch_size=2)
    others = {name: kept for name, kept in keep.items() if name != RESIDUAL}
    alone = compensate(narrowed(model, KEEP), others, pairs(WINDOWS, 2), config)
    np.testing.assert_allclose([each.corrected for each in corrections], [each.corrected for each in alone.corrections])
    tokens = random_tokens(2, 7)
    expected = forward(cut(alone.model, others), tokens)
    np.testing.assert_allclose(forward(cut(made.model, keep), tokens), expected, rtol=1e-9)
    np.testing.assert_allclose(forward(made.model, tokens, masks(keep)), expected, rtol=1e-9)
    assert not np.allclose(forward(cut(model, keep), tokens), expected, rtol=1e-3)  # control


@pytest.mark.slow
def test_masked_scores_are_those_of_the_narrower_model(x64):
    model = random_model(spec_of((2, 6), (2, 6)), dtype=np.float64)
    subject, keep = LlamaSubject(model, further=(RESIDUAL,), channels="gate_fisher"), with_channels(model)
    masked = calibrate(subject, WINDOWS, ["gate_fisher"], keep=keep, batch_size=2).scores("gate_fisher")
    small = LlamaSubject(cut(model, keep), further=(RESIDUAL,), channels="gate_fisher")
    smaller = calibrate(small, WINDOWS, ["gate_fisher"], batch_size=2).scores("gate_fisher")
    for name in ("attention", "mlp"):
        np.testing.assert_allclose(masked[name], smaller[name], rtol=1e-6)
    np.testing.assert_allclose(masked[RESIDUAL][0, KEEP], smaller[RESIDUAL][0], rtol=1e-6)
    assert np.isnan(masked[RESIDUAL][0, ~KEEP]).all()


@pytest.mark.slow
def test_the_budget_counts_what_is_cut():
    model = random_model(spec_of(*[(2, 20)] * 3, q_per_kv=2))
    subject = LlamaSubject(model, further=(RESIDUAL, QUERY_HEADS))
    search = SearchConfig(residual=ResidualConfig(share=0.5, multiple_of=2))
    calibrated = calibrate(subject, WINDOWS, ["gate_fisher"], batch_size=2)
    selection = choose_calibrated(subject, calibrated, "gate_fisher", 0.5, search)
    assert selection.keep[RESIDUAL].sum() == 6
    small = cut(model, selection.keep)
    prunable = [prunable_parameters(discover(each)) for each in (model, small)]
    assert prunable[0] - prunable[1] == selection.removed == subject.removed(selection.keep)
    assert count_parameters(small) == subject.remaining(selection.keep)
    assert 0.5 <= selection.actual < 0.52
    with pytest.raises(ValueError, match=r"search.residual.share: 0.01 of ratio 0.1 .* none would go"):
        check_ratios(subject, [0.1], SearchConfig(residual=ResidualConfig(share=0.01, multiple_of=2)))
    with pytest.raises(ValueError, match=r"search.residual.share: expected a model that tells embed apart"):
        check_ratios(LlamaSubject(model), [0.1], search)


@pytest.mark.parametrize(
    "other", [{"mesh": MeshConfig(data=2)}, {"targets": TargetsConfig(latency="70%")}], ids=["mesh", "targets"]
)
def test_what_does_not_go_together_is_refused(other):
    with pytest.raises(ValueError, match=f"search.residual.share: expected no {next(iter(other))} beside it"):
        PruneConfig(search=SearchConfig(residual=ResidualConfig(share=0.5)), **other)
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
        "search": SearchConfig(rescore_every=0.2, residual=ResidualConfig(share=0.6, multiple_of=2)),
        "ratio": 0.4,
    }
    pruned = prune.prune(PruneConfig(out=out, **options))
    whole, loaded, keep = load_model(name), load_model(out), load_keep(out)
    assert pruned.channels == (whole.spec.embed, loaded.spec.embed) == (keep[RESIDUAL].size, keep[RESIDUAL].sum())
    assert loaded.spec.embed < whole.spec.embed
    prunable = [prunable_parameters(discover(each)) for each in (whole, loaded)]
    assert pruned.selection.actual >= 0.4
    biases = sum(
        leaf.size for run in loaded.segments for leaf in (run.attention.output_bias[...], run.mlp.down_bias[...])
    )
    assert pruned.selection.removed == prunable[0] - prunable[1]
    assert count_parameters(loaded) == pruned.parameters[1] < pruned.parameters[0] - pruned.selection.removed + biases
    assert dict(prune.summary_rows(pruned))["width of the residual stream"].endswith(f"-> {loaded.spec.embed}")
    exported = export_model(ExportConfig(model=out, out=str(tmp_path / "padded"), format="padded"))
    assert exported


@pytest.mark.slow
def test_on_the_command_line(tiny_model_directory, tmp_path, capsys):
    words = ["--model.name", str(tiny_model_directory), "--calibration.examples", "3", "--calibration.length", "16"]
    words += ["--search.skip-layers", "--search.residual.share", "0.5", "--search.residual.multiple-of", "2"]
    words += ["--ratio", "0.4", "--compensation.method", "none"]
    assert main.main(["prune", "--out", str(tmp_path / "pruned"), *words, "--estimator", "gate_fisher"]) == 0
    assert "width of the residual stream" in capsys.readouterr().out
    for option, value, message in (
        ("--search.residual.multiple-of", "64", "search.residual.share: "),
        ("--mesh.data", "2", "search.residual.share: expected no mesh beside it"),
    ):
        assert main.main(["prune", "--out", str(tmp_path / "other"), *words, option, value]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
