"""Recipes against the rules of their papers, written out plainly: which units stay, not only how they are scored."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from scipy.optimize import brentq

from saap_jax.data.windows import Windows
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.segments import masks
from saap_jax.recipes.registry import RECIPES
from saap_jax.runtime.progress import Passes
from saap_jax.steps.allocation.allocations import Softmax
from saap_jax.steps.chain import Chain, parse
from saap_jax.steps.refinement.evolve import Evolve
from saap_jax.steps.refinement.learn import Learn
from saap_jax.steps.repair.output import LeastSquares, OutputRepair
from saap_jax.steps.run import Runner
from saap_jax.steps.score.score import Normalize, Stable
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery import sequence
from saap_jax.surgery.compensation import compensate
from tests.divergence import plain_divergence
from tests.helpers import layers_of, losses_of, random_model, random_tokens, reference, spec_of
from tests.in_sequence import entering, matrices, refitted_by_hand, surgeon_order, swapped_by_hand

LAYERS, KV_HEADS, GROUP, HEAD_DIM, CHANNELS, EMBED = 10, 3, 2, 4, 12, 8
TOKENS = random_tokens(6, 9)
MASK = np.ones(TOKENS.shape, bool)
ROWS = [(TOKENS[at : at + 1], MASK[at : at + 1]) for at in range(len(TOKENS))]
HEAD = EMBED * HEAD_DIM * (2 * GROUP + 2)  # parameters of a KV head with its query heads
CHANNEL = 3 * EMBED
LAYER = KV_HEADS * HEAD + CHANNELS * CHANNEL


@pytest.fixture(scope="module")
def model():
    return random_model(spec_of(*[(KV_HEADS, CHANNELS)] * LAYERS, q_per_kv=GROUP))


@pytest.fixture(scope="module")
def gradients(model):
    """The gradient of each example's mean loss, by layer: a list of examples of lists of layers."""
    one = jax.jit(jax.grad(lambda m, tokens, mask: losses_of(m, tokens, mask).sum() / (TOKENS.shape[1] - 1)))
    return [layers_of(one(model, TOKENS[n : n + 1], MASK[n : n + 1])) for n in range(len(TOKENS))]


@pytest.fixture(scope="module")
def activations(model):
    """Activations of all tokens by layer: heads `[tokens, kv, group, head_dim]`, channels `[tokens, channels]`."""
    seen = [reference(model, row)[1] for row in TOKENS]
    return [{name: np.concatenate([each[layer][name] for each in seen]) for name in seen[0][layer]}
            for layer in range(LAYERS)]  # fmt: skip


def kept(model, method: str | Chain, ratio: float):
    """Return what a recipe keeps, or a chain."""
    chain = parse(method) if isinstance(method, str) else method
    runner = Runner(LlamaSubject(model), {"text": Windows(TOKENS, MASK)}, [chain], Passes(1))
    return runner.choose(chain, ratio).keep


def lowest(items, target: float, gone: frozenset = frozenset()) -> set:
    """Return what is gone when (value, structure, layer, unit) of the lowest values have joined it, until `target`
    parameters are gone; what is too much goes back, the last first."""
    cost = {"attention": HEAD, "mlp": CHANNEL}
    removed, new = sum(cost[name] for name, *_ in gone), []
    for _, name, *at in sorted(items):
        if removed >= target:
            break
        new.append((name, *at))
        removed += cost[name]
    for each in reversed([*new]):
        if removed - cost[each[0]] >= target:
            new.remove(each)
            removed -= cost[each[0]]
    return gone | set(new)


def gone_of(keep) -> set:
    """Return what is gone: (structure, layer, unit)."""
    return {(name, *map(int, at)) for name, units in keep.items() for at in np.argwhere(~units)}


def assert_gone(keep, layers: set) -> None:
    """Assert that just some layers are gone, as a whole."""
    for layer in range(LAYERS):
        assert {bool(units[layer].any()) for units in keep.values()} == {layer not in layers}


def repair_of(name: str) -> OutputRepair | None:
    """Return how a recipe repairs layers."""
    return next((step for step in parse(name).steps if isinstance(step, OutputRepair)), None)


# --- LLM-Pruner ------------------------------------------------------------------------------------


def rows(matrix: np.ndarray, name: str) -> np.ndarray:
    """Return a matrix as torch holds it, `[outputs, inputs]`, heads as contiguous rows (columns of the output)."""
    if name in ("attention/output", "mlp/down"):
        return matrix.reshape(-1, EMBED).T
    return matrix.reshape(EMBED, -1).T


def group_importance(model, gradients, layer: int, taylor: str) -> dict[str, np.ndarray]:
    """LLM-Pruner's importance of the groups of a layer, summed over the matrices of a group and then to heads."""
    mean = {name: np.mean([each[layer][name] for each in gradients], axis=0) for name in gradients[0][layer]}
    square = {name: np.mean([each[layer][name] ** 2 for each in gradients], axis=0) for name in gradients[0][layer]}
    weights, found = layers_of(model)[layer], {}
    for structure, names in {
        "attention": ("attention/query", "attention/key", "attention/value", "attention/output"),
        "mlp": ("mlp/gate", "mlp/up", "mlp/down"),
    }.items():
        total = 0.0
        for name in names:
            w, g, f = (rows(tree[name], name) for tree in (weights, mean, square))
            salience = {"vectorize": w * g, "param-first": w * g, "param-second": w * f * w,
                        "param-mix": w * g - 0.5 * w * f * w}[taylor]  # fmt: skip
            inputs = 0 if name in ("attention/output", "mlp/down") else 1  # the axis that is not of the group
            channels = np.abs(salience.sum(inputs)) if taylor == "vectorize" else np.abs(salience).sum(inputs)
            total = total + (channels if structure == "mlp" else channels.reshape(KV_HEADS, -1).sum(1))
        found[structure] = total
    return found


@pytest.mark.slow
@pytest.mark.parametrize("taylor", ["vectorize", "param-first", "param-second", "param-mix"])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.56])
def test_llm_pruner(model, gradients, taylor, ratio):
    """All but the first and last of 10 layers (as 4 and 2 are of 32) lose the same share: heads rounded down,
    the lowest of each layer; channels the rest.
    """
    keep = kept(model, f"llm-pruner-{taylor}", ratio)
    share = ratio * LAYERS / 8
    heads = int(KV_HEADS * share)
    for layer in range(LAYERS):
        gone = {name: int((~units[layer]).sum()) for name, units in keep.items()}
        if layer in (0, 9):
            assert gone == {"attention": 0, "mlp": 0}
            continue
        assert gone["attention"] == heads
        assert abs(gone["mlp"] * CHANNEL - (share * LAYER - gone["attention"] * HEAD)) <= CHANNEL
        importance = group_importance(model, gradients, layer, taylor)
        for name, values in importance.items():
            lowest = np.sort(np.argsort(values)[: gone[name]])
            np.testing.assert_array_equal(np.flatnonzero(~keep[name][layer]), lowest, err_msg=f"{name} {layer}")


@pytest.mark.slow
def test_the_variants_of_llm_pruner_differ(model):
    """Negative control: the tests above would tell them apart."""
    sets = [kept(model, f"llm-pruner-{taylor}", 0.2) for taylor in ("vectorize", "param-first", "param-second")]
    assert all(any((a[name] != b[name]).any() for name in a) for a, b in itertools.pairwise(sets))


# --- FLAP, Wanda-sp, Minitron ----------------------------------------------------------------------


def flap_metric(model, activations, squared: bool) -> dict[str, np.ndarray]:
    """FLAP's standardised metric: variance times squared norm of the output's column; that of attention squared."""
    attention, mlp = [], []
    for weights, seen in zip(layers_of(model), activations, strict=True):
        flat = seen["attention"].reshape(len(seen["attention"]), -1)
        fluctuation = flat.var(0) * (weights["attention/output"].reshape(-1, EMBED) ** 2).sum(1)
        attention.append(fluctuation**2 if squared else fluctuation)
        mlp.append(seen["mlp"].var(0) * (weights["mlp/down"] ** 2).sum(1))
    standard = [
        (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True) for x in map(np.array, (attention, mlp))
    ]
    return {"attention": standard[0].reshape(LAYERS, KV_HEADS, -1).mean(2), "mlp": standard[1]}


def test_flap(model, activations):
    """One ranking of both, by the metric alone: nothing that stays is lower than what goes, but for the last steps."""
    keep, metric = kept(model, "flap", 0.3), flap_metric(model, activations, squared=True)
    items = [(metric[n][at], n, *at) for n in metric for at in np.ndindex(metric[n].shape)]
    assert gone_of(keep) == lowest(items, 0.3 * LAYERS * LAYER)
    plain = flap_metric(model, activations, squared=False)
    assert np.argsort(plain["attention"].ravel()).tolist() != np.argsort(metric["attention"].ravel()).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wanda-sp", "minitron", "fasp-mlp"])
@pytest.mark.parametrize("ratio", [0.3])
def test_rules_of_activations(model, activations, name, ratio):
    """The lowest of each layer go: Wanda's |W| · ‖a‖₂ behind what was pruned, or Minitron's means and norms."""
    keep, repair = kept(model, name, ratio), repair_of(name)
    length = TOKENS.shape[1]
    for layer, (weights, seen) in enumerate(zip(layers_of(model), activations, strict=True)):
        if name != "minitron":
            seen = {structure: entering(model, keep, layer, structure, TOKENS, ROWS, repair) for structure in keep}
            seen["mlp"] = seen["mlp"][:, :, 0]
        heads = seen["attention"].reshape(len(seen["attention"]), KV_HEADS, -1)
        if name == "minitron":
            norms = {"attention": np.sqrt((heads**2).sum(2)), "mlp": np.abs(seen["mlp"])}
            scores = {n: np.sqrt((x.reshape(len(TOKENS), length, -1).mean(1) ** 2).sum(0)) for n, x in norms.items()}
        else:
            output = np.abs(weights["attention/output"].reshape(KV_HEADS, -1, EMBED)).sum(2)
            scores = {
                "attention": (output * np.sqrt((heads**2).sum(0))).sum(1),
                "mlp": np.abs(weights["mlp/down"]).sum(1) * np.sqrt((seen["mlp"] ** 2).sum(0)),
            }
        for structure, values in scores.items():
            gone = np.flatnonzero(~keep[structure][layer])
            np.testing.assert_array_equal(gone, np.sort(np.argsort(values)[: len(gone)]))
        if name.startswith("fasp"):
            assert keep["attention"][layer].all()
        if name == "wanda-sp":
            assert (~keep["attention"][layer]).sum() == int(ratio * KV_HEADS)


# --- ShortGPT --------------------------------------------------------------------------------------


def test_shortgpt(model):
    """Layers that turn the stream least go as a whole."""
    keep = kept(model, "shortgpt", 0.3)
    assert_gone(keep, set(np.argsort(block_influence(model))[:3].tolist()))


def block_influence(model) -> np.ndarray:
    """ShortGPT's equation 1: 1 - mean cosine of the stream in front of a layer and behind it."""
    streams, influence = [streams_of(model, row) for row in TOKENS], []
    for layer in range(LAYERS):
        before, after = (np.concatenate([each[layer + step] for each in streams]) for step in (0, 1))
        cosine = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        influence.append(1 - cosine.mean())
    return np.array(influence)


def streams_of(model, tokens) -> list[np.ndarray]:
    """Return the residual stream in front of each layer and behind the last, from the other implementation."""
    found = [np.asarray(model.embedding[...], np.float64)[tokens]]
    for weights, seen in zip(layers_of(model), reference(model, tokens)[1], strict=True):
        flat = seen["attention"].reshape(len(tokens), -1) @ weights["attention/output"].reshape(-1, EMBED)
        found.append(found[-1] + flat + seen["mlp"] @ weights["mlp/down"])
    return found


# --- Shortened LLaMA -------------------------------------------------------------------------------


@pytest.mark.slow
def test_shortened_llama_by_perplexity(model):
    """Each layer but the first and last of ten is tried alone; the least needed go at once, not one after another."""
    keep, subject = kept(model, "shortened-llama-ppl", 0.4), LlamaSubject(model)
    losses = []
    for layer in range(LAYERS):
        without = {name: units & (np.arange(LAYERS) != layer)[:, None] for name, units in subject.existing.items()}
        losses.append(window_losses(model, [(TOKENS, MASK)], masks(without)).mean)
    gone = set((1 + np.argsort(losses[1:9])[:4]).tolist())
    assert_gone(keep, gone)
    assert gone != set(np.argsort(losses)[:4].tolist()), "control: what is protected would go"
    assert parse("shortened-llama-ppl").steps[1] == parse("shortened-llama-taylor").steps[1]


def test_shortened_llama_by_taylor(model, gradients):
    """Σ |w ∂w| over all matrices of a layer; the first and the last layer of ten stay, as four and two do of 32."""
    keep, weights = kept(model, "shortened-llama-taylor", 0.2), layers_of(model)
    total = []
    for layer in range(LAYERS):
        names = [name for name in weights[layer] if "norm" not in name]
        assert len(names) == 7
        slopes = {name: np.mean([each[layer][name] for each in gradients], axis=0) for name in names}
        total.append(sum(np.abs(weights[layer][name] * slopes[name]).sum() for name in names))
    gone = set((1 + np.argsort(total[1:9])[:2]).tolist())
    assert_gone(keep, gone)
    assert gone != set(np.argsort(total)[:2].tolist()), "control: what is protected would go first"


# --- SlimGPT ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3])
def test_slimgpt(model, ratio, monkeypatch):
    """Shares grow with log(layer + 1); heads rounded down, channels fill; in each layer the surgeon's first go."""
    monkeypatch.setattr(sequence, "BLOCK", 4)  # of 12 channels, not at once
    sequence._scores.clear_cache()
    keep = kept(model, "slimgpt", ratio)
    repair = repair_of("slimgpt")
    sequence._scores.clear_cache()
    share = ratio * LAYERS * np.log1p(np.arange(LAYERS)) / np.log1p(np.arange(LAYERS)).sum()
    for layer, weights in enumerate(layers_of(model)):
        gone = {name: np.flatnonzero(~units[layer]).tolist() for name, units in keep.items()}
        heads_gone = int(KV_HEADS * share[layer])
        if share[layer] * LAYER - heads_gone * HEAD > (CHANNELS - 1) * CHANNEL:
            heads_gone += 1  # the channels of this small model do not suffice
        assert len(gone["attention"]) == heads_gone
        missing = share[layer] * LAYER - len(gone["attention"]) * HEAD
        assert abs(len(gone["mlp"]) * CHANNEL - missing) <= 1.5 * CHANNEL
        heads = weights["attention/output"].reshape(KV_HEADS, -1, EMBED)
        seen = {name: entering(model, keep, layer, name, TOKENS, ROWS, repair) for name in keep}
        orders = {
            "attention": surgeon_order(heads, seen["attention"], 4),
            "mlp": surgeon_order(weights["mlp/down"][:, None], seen["mlp"], 4),
        }
        for name, order in orders.items():
            assert gone[name] == sorted(order[: len(gone[name])]), f"{name} {layer}"


# --- OSSCAR, MoDeGPT -------------------------------------------------------------------------------


@pytest.mark.slow
def test_osscar(model, monkeypatch):
    """The same share of each layer, heads rounded down; by greedy removal, then by swaps while the error falls."""
    monkeypatch.setattr(sequence, "BLOCK", 4)
    sequence._scores.clear_cache()
    keep = kept(model, "osscar", 0.4)
    repair = repair_of("osscar")
    sequence._scores.clear_cache()
    swaps = 0
    for layer, weights in enumerate(layers_of(model)):
        assert keep["attention"][layer].sum() == KV_HEADS - int(KV_HEADS * 0.4)
        for name, matrix in (
            ("attention", weights["attention/output"].reshape(KV_HEADS, -1, EMBED)),
            ("mlp", weights["mlp/down"][:, None]),
        ):
            active, units = entering(model, keep, layer, name, TOKENS, ROWS, repair), keep[name][layer]
            rows = active.reshape(len(active), -1)
            moment = rows.T @ rows / len(rows)
            greedy = set(surgeon_order(matrix, active, 4)[int((~units).sum()) :])
            expected = swapped_by_hand(matrix, moment, 0.01 * float(np.mean(np.diag(moment))), greedy)
            assert set(np.flatnonzero(units).tolist()) == expected, f"{name} {layer}"
            swaps += expected != greedy
    assert swaps > 0, "control: without swaps it would be another set"


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.15, 0.28])
def test_modegpt_of_the_mlp(model, ratio):
    """Layers lose in proportion to e^(-block influence / ε), at most what they have; the lowest leverage goes."""
    (temperature,) = (step.temperature for step in parse("modegpt-mlp").steps if isinstance(step, Softmax))
    keep = kept(model, "modegpt-mlp", ratio)
    assert keep["attention"].all()
    weights = np.exp(-block_influence(model) / temperature)
    most, goal = (CHANNELS - 1) * CHANNEL, ratio * LAYERS * LAYER
    lost = [brentq(lambda c: np.minimum(c * weights, most).sum() - goal, 0, 1e9)]
    expected = np.minimum(lost[0] * weights, most) / CHANNEL
    gone = (~keep["mlp"]).sum(axis=1)
    assert np.abs(gone - expected).max() <= 1.5
    assert np.ptp(gone) > 1
    for layer in range(LAYERS):
        active = entering(model, keep, layer, "mlp", TOKENS, ROWS, repair_of("modegpt-mlp"))[:, :, 0]
        moment = active.T @ active / len(active)
        system = moment + 0.01 * np.mean(np.diag(moment)) * np.eye(CHANNELS)
        scores = np.diag(moment @ np.linalg.inv(system))
        lowest = np.sort(np.argsort(scores)[: gone[layer]])
        np.testing.assert_array_equal(np.flatnonzero(~keep["mlp"][layer]), lowest, err_msg=str(layer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ridge"), [("fasp-mlp", 0.01), ("slimgpt", 0.01), ("osscar", 0.01), ("modegpt-mlp", 0.0001)]
)
def test_as_published_they_refit_what_they_prune(model, name, ridge):
    """W'[K] = W[K] + (G_KK + λ I)⁻¹ G_KR W[R] on the pruned stream, λ over the mean of the diagonal; the rest stays."""
    chain, old = parse(name), matrices(model)
    runner = Runner(LlamaSubject(model), {"text": Windows(TOKENS, MASK)}, [chain], Passes(1))
    state = runner.run(chain, 0.3)
    made, ours = (
        matrices(each.model)
        for each in (state.subject, compensate(model, state.keep, ROWS, LeastSquares(tokens="equal")))
    )
    whole = 0
    for structure, expected in refitted_by_hand(model, state.keep, TOKENS, ridge, "mean").items():
        np.testing.assert_allclose(made[structure], expected, rtol=0.01, atol=0.01 * np.abs(old[structure]).max())
        stay = state.keep[structure].all(axis=1)
        whole += stay.sum()
        np.testing.assert_array_equal(made[structure][stay], old[structure][stay])
        assert stay.all() or np.abs(made[structure] - ours[structure]).max() > 0.1, "control: our repair"
    assert whole or name == "osscar"


# --- EvoPress ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evopress(model):
    """As many attentions go as MLPs, as the code asks for; sub-blocks of a kind change places while KL falls."""
    steps, influence, better, uneven = parse("evopress").steps, blocks_influence(model), 0, 0
    before_it = Chain(tuple(step for step in steps if not isinstance(step, Evolve)), "start")
    together = Chain(tuple(step for step in before_it.steps if not isinstance(step, Normalize)), "one ranking")
    assert len(together.steps) + 1 == len(before_it.steps) == len(steps) - 1
    for ratio in (0.1, 0.4, 0.5):
        keep, start, other = (kept(model, each, ratio) for each in ("evopress", before_it, together))
        number = round(ratio * LAYERS)
        for name, values in influence.items():
            assert set(np.flatnonzero(~start[name].any(axis=1)).tolist()) == set(np.argsort(values)[:number].tolist())
        gates = [{name: units.astype(np.float32) for name, units in each.items()} for each in (start, keep)]
        before, after = (plain_divergence(model, model, each, ROWS[3:4]) for each in gates)  # every fourth is held out
        same = all((keep[name] == start[name]).all() for name in keep)
        assert same or after < before
        better += not same
        uneven += any((~units.any(axis=1)).sum() != number for units in other.values())
        for units in keep.values():
            assert set(units.sum(axis=1).tolist()) <= {0, units.shape[1]}
            assert (~units.any(axis=1)).sum() == number
    assert better > 0
    assert uneven > 0, "control: by block influence alone one kind would go"


def blocks_influence(model) -> dict[str, np.ndarray]:
    """1 - mean cosine of the stream in front of each attention and MLP and behind it, by structure."""
    influence: dict[str, list[float]] = {"attention": [], "mlp": []}
    streams = [streams_of(model, row) for row in TOKENS]
    seen = [reference(model, row)[1] for row in TOKENS]
    for layer, weights in enumerate(layers_of(model)):
        written = [row[layer]["attention"].reshape(TOKENS.shape[1], -1) @ weights["attention/output"].reshape(-1, EMBED)
                   for row in seen]  # fmt: skip
        front, behind = (np.concatenate([each[layer + step] for each in streams]) for step in (0, 1))
        middle = front + np.concatenate(written)
        for name, (one, other) in {"attention": (front, middle), "mlp": (middle, behind)}.items():
            cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
            influence[name].append(1 - cosine.mean())
    return {name: np.array(values) for name, values in influence.items()}


# --- GRASPrune -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grasprune(model):
    """The budget holds at every step, by probabilities alone; by how it learns, see tests/steps/test_learn.py."""
    steps, moved = parse("grasprune").steps, 0
    ((at, learn),) = ((at, step) for at, step in enumerate(steps) if isinstance(step, Learn))
    assert (learn.rule, learn.language_loss, steps[at - 1].name) == ("sigmoid", 1.0, "global")
    subject = LlamaSubject(model)
    for ratio, rate in ((0.2, 0.5), (0.3, 0.5), (0.4, 1.0)):
        short = dataclasses.replace(learn, steps=12, rate=rate)
        keep, start = (kept(model, Chain((*steps[:at], *then), "short"), ratio) for then in ((short,), ()))
        assert 0 <= subject.removed(keep) - ratio * subject.prunable <= HEAD
        moved += any((keep[name] != start[name]).any() for name in keep)
    assert moved > 0


# --- GISP ------------------------------------------------------------------------------------------


def lowest_of_blocks(model, gone: set, target: float, sizes: str = "code") -> set:
    """Return what is gone when the units of the lowest |w ∂w| over sizes have joined it, until `target` is reached.

    Args:
        sizes: `code`: three times the channels of a layer, four times those of a head times the stream's width. Query
            heads share key and value, which the code leaves out, so that a head has the mean of its query heads.
            `weights`: the weights of the unit.
    """
    keep = {name: np.ones((LAYERS, count), bool) for name, count in (("attention", KV_HEADS), ("mlp", CHANNELS))}
    for name, layer, unit in gone:
        keep[name][layer, unit] = False
    gates = masks(keep)
    gradient = layers_of(jax.grad(lambda m: losses_of(m, TOKENS, MASK, gates).sum())(model))
    weights, items = layers_of(model), []
    for layer in range(3, LAYERS - 1):
        product = {path: np.abs(weights[layer][path] * gradient[layer][path])
                   for path in weights[layer] if "norm" not in path}  # fmt: skip
        for unit in np.flatnonzero(keep["attention"][layer]):
            query, output = product["attention/query"][:, unit], product["attention/output"][unit]
            heads = [(query[:, head].sum() + output[head].sum()) / (4 * HEAD_DIM * EMBED) for head in range(GROUP)]
            shared = sum(product[f"attention/{name}"][:, unit].sum() for name in ("key", "value"))
            score = np.mean(heads) if sizes == "code" else (query.sum() + output.sum() + shared) / HEAD
            items.append((score, "attention", layer, int(unit)))
        for unit in np.flatnonzero(keep["mlp"][layer]):
            total = product["mlp/gate"][:, unit].sum() + product["mlp/up"][:, unit].sum()
            total += product["mlp/down"][unit].sum()
            items.append((total / (3 * CHANNELS if sizes == "code" else CHANNEL), "mlp", layer, int(unit)))
    return lowest(items, target, frozenset(gone))


@pytest.mark.slow
def test_gisp(model):
    """A pass over the text after each 160th part of what can go, by the sizes of its code; else it is other units."""
    ratio, prunable = 0.095, LAYERS * LAYER
    found = {}
    for sizes in ("code", "weights"):
        gone = set()
        for step in [*np.arange(1, 16) * 0.7 / 112, ratio]:
            gone = lowest_of_blocks(model, gone, step * prunable, sizes)
        found[sizes] = gone
    gone = gone_of(kept(model, "gisp", ratio))
    assert gone == found["code"]
    assert gone != lowest_of_blocks(model, set(), ratio * prunable), "control: at once"
    assert gone != found["weights"], "control: over the weights of each unit"


# --- SAAP ------------------------------------------------------------------------------------------


def saap_priority(model, gradients, weight: float, of_examples=None) -> dict[str, np.ndarray]:
    """Both Taylor scores over twice their means, times e^(λ ASI), ASI of the same sum over examples: by structure,
    `[layers, units]`; or ASI of something else, `of_examples(n)` by structure."""

    def taylor(some, kind: str) -> dict[str, np.ndarray]:
        layers = [group_importance(model, some, layer, kind) for layer in range(LAYERS)]
        return {name: np.array([each[name] for each in layers]) for name in layers[0]}

    kinds, priority = ("vectorize", "param-first"), {}
    all_of = [taylor(gradients, kind) for kind in kinds]

    def fused(some) -> dict[str, np.ndarray]:
        own = [taylor(some, kind) for kind in kinds]
        return {n: sum(one[n] / (2 * whole[n].mean()) for one, whole in zip(own, all_of, strict=True)) for n in own[0]}

    each = [fused([gradient]) if of_examples is None else of_examples(gradient) for gradient in gradients]
    for name, importance in fused(gradients).items():
        values = np.array([one[name] for one in each])
        relative = values.std(0) / values.mean(0)
        asi = (relative - relative.mean(1, keepdims=True)) / relative.std(1, keepdims=True)
        priority[name] = importance * np.exp(weight * asi)
    return priority


def saap_gone(priority) -> set:
    """The lowest of all layers but the first and the last go; each layer keeps one."""
    items = [(values[layer, unit], structure, layer, int(unit)) for structure, values in priority.items()
             for layer in range(1, 9) for unit in np.argsort(values[layer])[:-1]]  # fmt: skip
    return lowest(items, 0.25 * LAYERS * LAYER)


def gate_slopes(model, gradient) -> dict[str, np.ndarray]:
    """|∂ℒ_n/∂g| of an example: |Σ w ∂w| over the matrix behind the gate."""
    found = {}
    for name, path, count in (("attention", "attention/output", KV_HEADS), ("mlp", "mlp/down", CHANNELS)):
        products = [weights[path] * own[path] for weights, own in zip(layers_of(model), gradient, strict=True)]
        found[name] = np.array([np.abs(each.reshape(count, -1).sum(1)) for each in products])
    return found


@pytest.mark.slow
def test_saap_as_its_paper_reads(model, gradients):
    """Fused importance, heads a channel at a time, ranked with its stability over examples; both signs of λ, and 0."""
    gone = {}
    for name, sign in (("saap", -1), ("saap-stable-goes", 1)):
        ((weight, over),) = ((step.weight, step.over) for step in parse(name).steps if isinstance(step, Stable))
        assert (np.sign(weight), over) == (sign, "examples")
        gone[name] = gone_of(kept(model, name, 0.25))
        assert gone[name] == saap_gone(saap_priority(model, gradients, weight)), name
    assert not any(isinstance(step, Stable) for step in parse("saap-no-stability").steps)
    gone["saap-no-stability"] = gone_of(kept(model, "saap-no-stability", 0.25))
    assert gone["saap-no-stability"] == saap_gone(saap_priority(model, gradients, 0))
    assert len({frozenset(each) for each in gone.values()}) == 3, "control: signs"
    gates = saap_priority(model, gradients, -0.25, lambda gradient: gate_slopes(model, gradient))
    assert gone["saap"] != saap_gone(gates), "control: the stability of gate gradients"
    matrix = kept(model, RECIPES["saap"].chain.replace("(within=channel)", ""), 0.25)
    assert gone["saap"] != gone_of(matrix), "control: |Σ w ∂w| of whole matrices"


# --- blocks by the loss without them ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sleb", "blockpruner"])
def test_blocks_go_greedily(model, name):
    """Brute force: try all that are left, take out the one without which the loss is lowest, try again."""
    keep, subject = kept(model, name, 0.3), LlamaSubject(model)
    now = {n: units.copy() for n, units in subject.existing.items()}
    while subject.removed(now) < 0.3 * subject.prunable:
        tries = {}
        for layer in range(1, LAYERS - 1) if name == "sleb" else range(LAYERS):
            for blocks in [("attention", "mlp")] if name == "sleb" else [("attention",), ("mlp",)]:
                if all(now[block][layer].any() for block in blocks):
                    tried = {n: units.copy() for n, units in now.items()}
                    for block in blocks:
                        tried[block][layer] = False
                    tries[layer, blocks] = tried
        means = {at: window_losses(model, [(TOKENS, MASK)], masks(tried)).mean for at, tried in tries.items()}
        now = tries[min(means, key=means.get)]
    for structure, units in keep.items():
        np.testing.assert_array_equal(units, now[structure], err_msg=structure)
