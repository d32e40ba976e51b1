"""Channels inside experts: gates, surgery, scores, budgets and files, against removing a channel's row by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.api import calibrate
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.search import ExpertChannelsConfig, PerStructure, SearchConfig
from saap_jax.data import Windows
from saap_jax.evaluation.candidates import candidate_losses
from saap_jax.export.hf import write_hf
from saap_jax.llama import LayerWidths, LlamaSpec, load_keep, load_model, save_model
from saap_jax.llama.segments import existing_tied, existing_units, masks, ones_gates
from saap_jax.llama.unmixed import unmixed
from saap_jax.selection.choose import choose
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.counting import kept_parameters
from saap_jax.surgery.cut import cut, keep_from_json, keep_to_json, pruned_spec
from saap_jax.types import EXPERT_CHANNELS
from tests.helpers import RELATIVES, changed, forward, length_mask, losses_of, random_model, random_tokens, relative

TOKENS = random_tokens(4, 9)
WINDOWS = Windows(TOKENS, length_mask(9, 7, 9, 8, seq=9))
EXPERTS, CHANNELS = 4, 5


def model_of(family: str = "mixtral", **options):
    """Return a mixture of two layers of four experts of five channels each."""
    widths = (LayerWidths(kv_heads=2, q_per_kv=2, mlp=EXPERTS, channels=CHANNELS),) * 2
    spec = LlamaSpec(vocab=24, embed=8, head_dim=4, layers=widths, tied=False, constants=RELATIVES[family])
    return random_model(spec, **options)


def keep_of(model) -> dict[str, np.ndarray]:
    """Return a keep-set: other channels of each expert of layer 0, of which one is gone; all of layer 1."""
    keep = existing_units(model.segments) | {EXPERT_CHANNELS: existing_tied(model.segments)[EXPERT_CHANNELS]}
    keep["mlp"][0, 2] = False
    keep[EXPERT_CHANNELS][0] = [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    return keep


def without_rows(model, rows: list[tuple[int, int, int]]):
    """Return the model with the rows of channels (layer, expert, channel) of the output matrix set to 0."""
    places = tuple(np.array(rows).T)
    return changed(model, "segments/0/mlp/down", lambda value: value.at[places].set(0))


def direct_ablation(model) -> np.ndarray:
    """Return the change of the loss a token without each channel, `[layers, experts * channels]`, by its row alone."""
    tokens, mask = jnp.asarray(TOKENS), jnp.asarray(WINDOWS.mask)
    dense = losses_of(model, tokens, mask).sum()
    changes = [
        losses_of(without_rows(model, [place]), tokens, mask).sum() - dense
        for place in np.ndindex(2, EXPERTS, CHANNELS)
    ]
    return np.array(changes).reshape(2, -1) / WINDOWS.mask[:, 1:].sum()


def searched(share: float, **options) -> SearchConfig:
    return SearchConfig(allocation="global", expert_channels=ExpertChannelsConfig(share=share, **options))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_gate_is_the_row_of_its_channel(family, x64):
    """In the model and in the one whose units are channels; a token stays with its expert."""
    model = model_of(family, dtype=np.float64)
    expected = np.asarray(forward(without_rows(model, [(0, 1, 3), (1, 0, 0)]), TOKENS))
    ones = ones_gates(model.segments)
    channels = jnp.ones((2, EXPERTS * CHANNELS)).at[0, CHANNELS + 3].set(0).at[1, 0].set(0)
    np.testing.assert_allclose(forward(model, TOKENS, ones | {EXPERT_CHANNELS: channels}), expected, rtol=0, atol=1e-12)
    plain = unmixed(model)
    np.testing.assert_allclose(forward(plain, TOKENS), forward(model, TOKENS), rtol=0, atol=1e-12)
    np.testing.assert_allclose(forward(plain, TOKENS, ones | {"mlp": channels}), expected, rtol=0, atol=1e-12)
    other = forward(model, TOKENS, ones | {EXPERT_CHANNELS: jnp.roll(channels, 1, axis=1)})
    assert np.abs(np.asarray(other) - expected).max() > 1e-4
    assert prunable_parameters(discover(plain)) == prunable_parameters(discover(model)) - 2 * 8 * EXPERTS, "routers"


@pytest.mark.slow
def test_masked_is_cut_and_counted(x64):
    model = model_of(dtype=np.float64)
    keep = keep_of(model)
    pruned, masked = cut(model, keep), np.asarray(forward(model, TOKENS, masks(keep)))
    np.testing.assert_allclose(forward(pruned, TOKENS), masked, rtol=0, atol=1e-10)
    assert [(w.mlp, w.channels) for w in pruned.spec.layers] == [(3, 3), (4, 5)]
    assert pruned.spec == pruned_spec(model.spec, keep)
    assert count_parameters(pruned) == kept_parameters(model, keep).all
    (group,) = candidate_losses(model, [tuple(WINDOWS)], [keep, existing_units(model.segments)])
    lost = [losses_of(each, TOKENS, jnp.asarray(WINDOWS.mask)) for each in (pruned, model)]
    for number, expected in enumerate(lost):
        np.testing.assert_allclose(group[number].sums, expected, rtol=1e-9)
    assert not np.allclose(lost[0], lost[1], rtol=1e-4)
    seen = masks({"attention": keep["attention"], "mlp": keep[EXPERT_CHANNELS]})
    np.testing.assert_allclose(forward(unmixed(model), TOKENS, seen), masked, rtol=0, atol=1e-10)
    other = keep | {EXPERT_CHANNELS: keep[EXPERT_CHANNELS].copy()}
    other[EXPERT_CHANNELS][0, :CHANNELS] = [1, 0, 1, 0, 1]
    assert np.abs(masked - np.asarray(forward(cut(model, other), TOKENS))).max() > 1e-4


@pytest.mark.slow
def test_the_oracle_is_direct_ablation(x64):
    model = model_of(dtype=np.float64)
    scores = calibrate(LlamaSubject(model, further=(EXPERT_CHANNELS,)), WINDOWS, ["ablation"]).scores("ablation")
    direct = direct_ablation(model)
    np.testing.assert_allclose(scores[EXPERT_CHANNELS], direct, rtol=0, atol=1e-8)
    assert np.abs(direct).max() > 1e-3


ESTIMATORS = ["gate_taylor", "gate_fisher", "taylor_element", "fisher", "magnitude", "wanda", "saap"]


@pytest.mark.slow
def test_what_every_estimator_takes_is_what_hardly_writes(x64):
    """One channel of each expert of layer 1 is a thousandth; at random, others go."""
    weak = np.array([1, 4, 0, 2])
    experts, model = np.arange(EXPERTS), model_of(dtype=np.float64)
    model = changed(model, "segments/0/mlp/down", lambda value: value.at[1, experts, weak].multiply(1e-3))
    for name in ("gate", "up"):  # so that weights alone show it too
        model = changed(model, f"segments/0/mlp/{name}", lambda value: value.at[1, :, experts, weak].multiply(0.1))
    subject = LlamaSubject(model, further=(EXPERT_CHANNELS,))
    calibrated = calibrate(subject, WINDOWS, [*ESTIMATORS, "random", "block_influence"])
    block = EXPERTS * 3 * 8
    ratio = block / subject.prunable

    def gone(name: str) -> list[list[int]]:
        selection = choose(subject, calibrated.scores(name), ratio, searched(1.0))
        assert selection.removed == block
        return np.argwhere(~selection.keep[EXPERT_CHANNELS]).tolist()

    expected = [[1, e * CHANNELS + int(c)] for e, c in enumerate(weak)]
    for name in ESTIMATORS:
        assert gone(name) == expected, name
    assert gone("random") != expected
    with pytest.raises(ValueError, match="scores that tell the channels of an expert apart, got equal ones"):
        gone("block_influence")


@pytest.mark.slow
@pytest.mark.parametrize(("share", "multiple"), [(0.4, 1), (1.0, 1), (0.6, 2)])
def test_budgets_are_exact_and_order_means_nothing(share, multiple, x64):
    """Channels of experts in another order: the same ones go, and the same model is left."""
    model, order = model_of(dtype=np.float64), np.array([2, 0, 4, 1, 3])
    permuted = model
    for name, take in (("gate", np.s_[..., order]), ("up", np.s_[..., order]), ("down", np.s_[:, :, order])):
        permuted = changed(permuted, f"segments/0/mlp/{name}", lambda value, take=take: value[take])
    found = []
    for each in (model, permuted):
        subject = LlamaSubject(each, further=(EXPERT_CHANNELS,))
        scores = calibrate(subject, WINDOWS, ["gate_fisher"]).scores("gate_fisher")
        search = searched(share, multiple_of=multiple)
        selection, small = choose(subject, scores, 0.25, search), multiple * EXPERTS * 3 * 8
        pruned = cut(each, selection.keep)
        assert count_parameters(each) - count_parameters(pruned) == selection.removed
        assert 0.25 * subject.prunable <= selection.removed
        assert selection.removed < 0.25 * subject.prunable + (small if share == 1 else 8 * 4 * 6)
        assert any(w.channels < CHANNELS for w in pruned.spec.layers)
        assert all(w.channels == CHANNELS or w.channels % multiple == 0 for w in pruned.spec.layers)
        masked = forward(each, TOKENS, masks(selection.keep))
        np.testing.assert_allclose(forward(pruned, TOKENS), masked, rtol=0, atol=1e-10)
        found.append((selection.keep, np.asarray(masked)))
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=0, atol=1e-10)
    kept = [keep[EXPERT_CHANNELS].reshape(2, EXPERTS, CHANNELS) for keep, _ in found]
    np.testing.assert_array_equal(kept[1], kept[0][..., order])
    assert (kept[1] != kept[0]).any()


@pytest.mark.slow
def test_compensation_sees_the_stream_without_them(x64):
    """Attention behind a layer without some channels is corrected on what their experts still write."""
    model = model_of(dtype=np.float64)
    keep = keep_of(model)
    keep["attention"][1, 0] = False
    batches = [(random_tokens(2, 16, seed), np.ones((2, 16), bool)) for seed in range(4)]
    config = CompensationConfig(method="least_squares", damping=0.1)
    made = compensate(model, keep, batches, config)
    assert [(each.structure, each.layer) for each in made.corrections] == [("attention", 1)]
    masked = np.asarray(forward(made.model, TOKENS, masks(keep)))
    np.testing.assert_allclose(forward(cut(made.model, keep), TOKENS), masked, rtol=0, atol=1e-10)
    experts = compensate(model, {name: keep[name] for name in ("attention", "mlp")}, batches, config)
    weights = [each.model.segments[0].attention.output[...] for each in (made, experts)]
    assert np.abs(weights[0] - weights[1]).max() > 1e-6


@pytest.mark.slow
def test_files(tmp_path):
    """Layers that differ, per layer; layers that are alike, plain."""
    model = model_of("qwen3_moe")
    keep = keep_of(model)
    pruned = cut(model, keep)
    loaded = load_model(save_model(pruned, tmp_path / "pruned", keep=keep))
    assert loaded.spec == pruned.spec
    jax.tree.map(np.testing.assert_array_equal, loaded, pruned)
    for back in (load_keep(tmp_path / "pruned"), keep_from_json(keep_to_json(keep))):
        jax.tree.map(np.testing.assert_array_equal, back, keep)
    whole = existing_units(model.segments)
    with pytest.raises(ValueError, match="expected expert_channels units a layer"):
        save_model(model, tmp_path / "wrong", keep=whole | {EXPERT_CHANNELS: keep[EXPERT_CHANNELS]})
    with pytest.raises(ValueError, match="format hf: expected layers alike, .* got 3 to 4 experts, 3 to 5 channels an"):
        write_hf(pruned, tmp_path, "hf", np.dtype(np.float32))
    alike = existing_units(model.segments) | {EXPERT_CHANNELS: np.tile([1, 1, 0, 1, 0], (2, EXPERTS)).astype(bool)}
    (tmp_path / "hf").mkdir()
    write_hf(cut(model, alike), tmp_path / "hf", "hf", np.dtype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "hf"), cut(model, alike))


def test_what_is_refused():
    model = model_of()
    keep = keep_of(model)
    for row, message in (
        ([1, 1, 1, 0, 0], r"as many channels in each kept expert of layer 1, .* got \[3, 5, 5, 5\] with experts"),
        ([0, 0, 0, 0, 0], r"at least one, .* got \[0, 5, 5, 5\]"),
    ):
        wrong = keep | {EXPERT_CHANNELS: keep[EXPERT_CHANNELS].copy()}
        wrong[EXPERT_CHANNELS][1, :CHANNELS] = row
        with pytest.raises(ValueError, match=message):
            cut(model, wrong)
    plain = relative("qwen3")
    with pytest.raises(ValueError, match="^expert_channels: expected a mixture of experts, got a qwen3"):
        LlamaSubject(plain, further=(EXPERT_CHANNELS,))
    units = existing_units(plain.segments)
    with pytest.raises(ValueError, match="keep: expected no expert_channels for a model without experts"):
        cut(plain, units | {EXPERT_CHANNELS: units["mlp"]})
    with pytest.raises(ValueError, match="gates: expected no expert_channels for a model without experts"):
        forward(plain, TOKENS, masks(units | {EXPERT_CHANNELS: units["mlp"]}))
    subject = LlamaSubject(model)
    with pytest.raises(ValueError, match="search.expert_channels.share: expected a model that tells expert_channels"):
        choose(subject, {}, 0.2, searched(0.5))
    assert subject.uncompensated("least_squares", keep | {"mlp": existing_units(model.segments)["mlp"]}) == {
        EXPERT_CHANNELS: "matrices of experts are left as they are"
    }
    with pytest.raises(ValueError, match="search.expert_channels.share: expected no search.depth beside it"):
        dataclasses.replace(searched(0.5), depth=True, min_keep=PerStructure(mlp=0))
