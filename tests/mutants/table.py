"""Mutants: the package with one line changed, each of which computes something else, and the tests that say so."""

from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of one line, and which tests fail by it."""

    name: str
    file: str
    """Below `saap_jax`."""
    old: str
    """What the file has exactly once, within a line."""
    new: str
    tests: str
    """What pytest is given: files, and perhaps `-k`."""
    covers: frozenset[str]
    """Names of the estimators and steps whose result changes."""


def _of(file: str, covers: str, tests: str, *changes: tuple[str, ...]) -> Iterator[Mutant]:
    """Yield the mutants of a file: (name, old, new), perhaps with tests of its own behind."""
    for name, old, new, *own in changes:
        yield Mutant(name, file, old, new, *own or [tests], frozenset(covers.split()))  # type: ignore[call-arg]


_FORMULAS = "tests/estimation/test_formulas.py"
_ACTIVATIONS = "tests/estimation/test_activations.py"
_RECONSTRUCTION = "tests/estimation/test_reconstruction.py"
_HESSIAN = "tests/estimation/test_hessian.py"
_COMPENSATION = "tests/surgery/test_compensation.py"
_LEAST_SQUARES = "tests/steps/test_least_squares.py -k match_numpy"
_ALLOCATION = "tests/steps/test_allocation.py"

_ESTIMATORS = (
    *_of(
        "estimation/taylor.py",
        "magnitude",
        f"{_FORMULAS} -k magnitude",
        ("magnitude: no root", "jnp.sqrt(square) for name", "square for name"),
        ("magnitude: of |w|", "jnp.sum(jnp.square(w), axis=-1), params", "jnp.sum(jnp.abs(w), axis=-1), params"),
    ),
    *_of(
        "estimation/taylor.py",
        "random",
        f"{_FORMULAS} -k random",
        ("random: without its seed", "root = jax.random.key(seed)", "root = jax.random.key(0)"),
        ("random: normal", "jax.random.uniform(", "jax.random.normal("),
    ),
    *_of(
        "estimation/taylor.py",
        "taylor_vector",
        f"{_FORMULAS} -k taylor_vector",
        (
            "taylor_vector: absolute before the sum",
            "jnp.abs(jnp.sum(w * d, axis=-1))",
            "jnp.sum(jnp.abs(w * d), axis=-1)",
        ),
        ("taylor_vector: of w + d", "jnp.abs(jnp.sum(w * d", "jnp.abs(jnp.sum(w + d"),
        (
            "taylor_vector: channels are averaged",
            "return jnp.sum(sums, axis=-1)",
            "return jnp.mean(sums, axis=-1)",
            "tests/recipes/test_papers.py -k llm_pruner",
        ),
    ),
    *_of(
        "estimation/taylor.py",
        "taylor_element",
        f"{_FORMULAS} -k taylor_element",
        (
            "taylor_element: absolute behind the sum",
            "lambda w, d: jnp.sum(jnp.abs(w * d), axis=-1)",
            "lambda w, d: jnp.abs(jnp.sum(w * d, axis=-1))",
        ),
        (
            "taylor_element: layers without attention",
            "for one in scores.values()]), axis=0)",
            "for one in [*scores.values()][1:]]), axis=0)",
        ),
    ),
    *_of(
        "estimation/taylor.py",
        "taylor_element_second",
        f"{_FORMULAS} -k taylor_element_second",
        ("taylor_element_second: plus", "w * d - 0.5", "w * d + 0.5"),
        ("taylor_element_second: no half", "w * d - 0.5 *", "w * d - 1.0 *"),
    ),
    *_of(
        "estimation/taylor.py",
        "fisher fused",
        f"{_FORMULAS} -k fisher",
        ("fisher: |w|", "lambda w, fisher: jnp.sum(jnp.square(w)", "lambda w, fisher: jnp.sum(jnp.abs(w)"),
        ("fisher: largest weight", "lambda w, fisher: jnp.sum(", "lambda w, fisher: jnp.max("),
    ),
    *_of(
        "estimation/gates.py",
        "gate_taylor",
        f"{_FORMULAS} -k gates",
        (
            "gate_taylor: absolute behind the mean",
            "jnp.mean(jnp.abs(gradient), axis=0)",
            "jnp.abs(jnp.mean(gradient, axis=0))",
        ),
    ),
    *_of(
        "estimation/gates.py",
        "gate_fisher fused",
        f"{_FORMULAS} -k gates",
        ("gate_fisher: sum", "jnp.mean(jnp.square(gradient), axis=0)", "jnp.sum(jnp.square(gradient), axis=0)"),
        (
            "gate_fisher: square of the mean",
            "jnp.mean(jnp.square(gradient), axis=0)",
            "jnp.square(jnp.mean(gradient, axis=0))",
        ),
    ),
    *_of(
        "estimation/gates.py",
        "gate_taylor_signed",
        f"{_HESSIAN} -k gate_taylor_signed",
        ("gate_taylor_signed: sign", "-jnp.mean(gradient, axis=0)", "jnp.mean(gradient, axis=0)"),
    ),
    *_of(
        "estimation/hessian.py",
        "gate_hessian",
        _HESSIAN,
        ("gate_hessian: plus", "hessian.gradient[name] - 0.5 * each", "hessian.gradient[name] + 0.5 * each"),
        ("gate_hessian: all probes", "[: curvature.probes], axis=0)", "[:], axis=0)"),
        (
            "gate_hessian: probes are not signed back",
            "return {name: sign * products[name]",
            "return {name: products[name]",
        ),
    ),
    *_of(
        "estimation/activations.py",
        "wanda fused",
        f"{_FORMULAS} -k wanda",
        ("wanda: no root", "jnp.abs(weight), jnp.sqrt(square))", "jnp.abs(weight), square)"),
        ("wanda: squared weights", "jnp.abs(weight), jnp.sqrt(square))", "jnp.square(weight), jnp.sqrt(square))"),
    ),
    *_of(
        "estimation/activations.py",
        "fluctuation",
        f"{_FORMULAS} -k fluctuation",
        ("fluctuation: no mean", "jnp.maximum(square - jnp.square(mean), 0)", "jnp.maximum(square, 0)"),
        ("fluctuation: |W|", "* jnp.sum(jnp.square(weight), axis=-1)", "* jnp.sum(jnp.abs(weight), axis=-1)"),
        ("fluctuation: divisor n", "keepdims=True, ddof=1)", "keepdims=True, ddof=0)"),
    ),
    *_of(
        "estimation/activations.py",
        "activation_norm",
        f"{_ACTIVATIONS} -k norms",
        (
            "activation_norm: no root over examples",
            "return jnp.sqrt(norm[..., 1])",
            "return norm[..., 1]",
        ),
        (
            "activation_norm: no root over tokens",
            'roots = jnp.sqrt(jnp.einsum("bt,btu->bu", mask, squares))',
            'roots = jnp.einsum("bt,btu->bu", mask, squares)',
        ),
    ),
    *_of(
        "estimation/activations.py",
        "activation_frequency",
        f"{_ACTIVATIONS} -k used_by_hand",
        ("activation_frequency: multiple is no square", "square > multiple**2 *", "square > multiple *"),
        (
            "activation_frequency: column",
            "column = MULTIPLES.index(multiple)",
            "column = MULTIPLES.index(multiple) - 1",
            f"{_ACTIVATIONS} -k one_multiple",
        ),
    ),
    *_of(
        "estimation/activations.py",
        "reap",
        "tests/test_experts.py -k reap",
        (
            "reap: over all tokens",
            "written.norm[name] / jnp.where(share > 0, share, 1)",
            "written.norm[name] / jnp.where(share > 0, 1, 1)",
        ),
    ),
    *_of(
        "estimation/activations.py",
        "block_influence",
        f"{_ACTIVATIONS} -k turn",
        (
            "block_influence: sum of directions",
            "jnp.square(direction(before) - direction(after))",
            "jnp.square(direction(before) + direction(after))",
        ),
        (
            "block_influence: no half",
            "return 0.5 * jnp.sum(jnp.square(direction",
            "return jnp.sum(jnp.square(direction",
        ),
        (
            "block_influence: a layer is its MLP",
            'turn(point.layer["attention_in"], point.values)',
            'turn(point.layer["mlp_in"], point.values)',
        ),
    ),
    *_of(
        "estimation/reconstruction.py",
        "obs",
        _RECONSTRUCTION,
        (
            "obs: no half alone",
            "return 0.5 * jnp.sum(weight * jnp.linalg.solve(inner, weight)",
            "return jnp.sum(weight * jnp.linalg.solve(inner, weight)",
        ),
        (
            "obs: weights are not fitted again",
            "flat = flat - outer @ both[:, :embed]",
            "flat = flat",
        ),
        ("obs: the dearest first", "chosen = jnp.argsort(costs)[:at_once]", "chosen = jnp.argsort(-costs)[:at_once]"),
        ("obs: swaps that lose", "better = gains[into] > costs[out]", "better = gains[into] < costs[out]"),
    ),
    *_of(
        "estimation/reconstruction.py",
        "leverage",
        f"{_RECONSTRUCTION} -k leverage",
        ("leverage: one plus lambda", "jnp.maximum(1 - ridge * jnp.diag", "jnp.maximum(1 + ridge * jnp.diag"),
        (
            "leverage: no ridge in the projection",
            "1 - ridge * jnp.diag(_inverse(moment, ridge))",
            "1 - ridge * jnp.diag(_inverse(moment, ridge * 0))",
        ),
        (
            "leverage: mean over coordinates",
            "return jnp.sum(each.reshape(weight.shape[:2]), axis=1)",
            "return jnp.mean(each.reshape(weight.shape[:2]), axis=1)",
        ),
        (
            "leverage: ridge by the sum of the diagonal",
            "ridge = damping * jnp.mean(jnp.diag(product))",
            "ridge = damping * jnp.sum(jnp.diag(product))",
        ),
    ),
    *_of(
        "estimation/ablation.py",
        "ablation",
        "tests/estimation/test_ablation.py -k pairs",
        ("ablation: sign", "sum(axis=1) - dense", "sum(axis=1) + dense"),
        (
            "ablation: the unit is doubled",
            'return seen["mlp_out"][None] - each',
            'return seen["mlp_out"][None] + each',
            "tests/estimation/test_ablation.py -k one_gate_closed",
        ),
    ),
    *_of(
        "steps/score/oracles.py",
        "block_ablation",
        "tests/steps/test_oracles.py -k blocks",
        ("block_ablation: sign", "np.where(units, mean - base,", "np.where(units, base - mean,"),
        (
            "block_ablation: not what is gone before",
            "present | {name: present[name] & ~units",
            "subject.existing | {name: subject.existing[name] & ~units",
        ),
    ),
    *_of(
        "steps/score/oracles.py",
        "perturbation",
        "tests/steps/test_oracles.py -k 'regression or ridge'",
        ("perturbation: of what stays", "gone = ~np.stack(", "gone = np.stack("),
        ("perturbation: ridge", "np.linalg.solve(product + ridge * scale", "np.linalg.solve(product - ridge * scale"),
        (
            "perturbation: masks are not centred",
            "x = x - x.mean(axis=0)",
            "x = x + 0.0",
        ),
    ),
)

_OBSERVED = (
    *_of(
        "estimation/observe.py",
        "gate_taylor gate_fisher fused",
        "tests/estimation/test_observe.py",
        (
            "observe: gate gradients of summed losses",
            "gradients[-1][name] / counts[:, None, None]",
            "gradients[-1][name]",
        ),
        (
            "observe: squares of summed losses",
            "watched(model, 1 / counts,",
            "watched(model, jnp.ones_like(counts),",
            "tests/estimation/test_squares.py -k mean_loss",
        ),
    ),
    *_of(
        "estimation/base.py",
        "wanda leverage activation_frequency",
        f"{_ACTIVATIONS} -k moments",
        ("observe: tokens less one", "return self.tokens + self.examples", "return self.tokens"),
    ),
    *_of(
        "estimation/squares.py",
        "fisher taylor_element_second fused",
        "tests/estimation/test_squares.py",
        (
            "squares: square of the sum",
            "sums[1] + jnp.square(each * weight[:, None, None])",
            "sums[1] + each * weight[:, None, None]",
        ),
    ),
    *_of(
        "llama/loss.py",
        "fisher gate_fisher taylor_element best_of learn",
        "tests/evaluation/test_perplexity.py -k numpy",
        (
            "loss: of the same token",
            "target = tokens[:, 1:]",
            "target = tokens[:, :-1]",
        ),
        (
            "loss: padding counts",
            "jnp.where(mask[:, 1:], losses, 0), axis=-1), observed",
            "jnp.where(mask[:, :-1], losses, 0), axis=-1), observed",
            "tests/evaluation/test_perplexity.py",
        ),
        ("loss: first token counts", "return jnp.sum(mask[:, 1:], axis=-1)", "return jnp.sum(mask, axis=-1)"),
        (
            "loss: chunks without their highest",
            "total * jnp.exp(highest - higher) +",
            "total +",
            "tests/estimation/test_ablation.py -k chunks",
        ),
    ),
    *_of(
        "estimation/objectives.py",
        "fisher gate_fisher gate_taylor",
        "tests/estimation/test_objectives.py",
        (
            "objectives: margin's sign",
            "return jnp.max(others, axis=-1) - right",
            "return right - jnp.max(others, axis=-1)",
        ),
    ),
)

_CHOSEN = (
    *_of(
        "steps/score/fusion.py",
        "fused",
        "tests/steps/test_fusion.py",
        ("fusion: no half", "weights = 1 / (2 * variances)", "weights = 1 / variances"),
        ("fusion: one scope's sigma for all", "rows * weights[:, units.scope]", "rows * weights[:, units.scope * 0]"),
        ("fusion: learned up the slope", "optax.sgd(learning_rate=1.0)", "optax.sgd(learning_rate=-1.0)"),
        ("fusion: learned in a few steps", "STEPS = 100", "STEPS = 5"),
        (
            "fusion: deviation for variance",
            "values.var(axis=0), values.mean(axis=0)",
            "values.std(axis=0), values.mean(axis=0)",
        ),
        (
            "fusion: variance for the constant",
            "np.log(variances).sum(axis=0)[units.scope] / 2",
            "np.log(variances).sum(axis=0)[units.scope]",
        ),
    ),
    *_of(
        "steps/score/stability.py",
        "stable",
        "tests/steps/test_stability.py",
        ("stability: mean over deviation", "np.divide(std, mean, out", "np.divide(mean, std, out"),
        (
            "stability: divisor of the deviation",
            "np.square(deviation).sum(axis=1, keepdims=True) / np.maximum(count, 1)",
            "np.square(deviation).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)",
        ),
        (
            "stability: over all layers",
            "mean = np.where(exists, values, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)",
            "mean = np.where(exists, values, 0).sum(keepdims=True) / np.maximum(count.sum(), 1)",
        ),
        (
            "stability: sign of the weight",
            "np.exp(shift[name] - largest)",
            "np.exp(-shift[name] - largest)",
            f"{_ALLOCATION} -k stable",
        ),
    ),
    *_of(
        "steps/limits.py",
        "within",
        f"{_ALLOCATION}",
        (
            "within: rounded up to whole layers",
            "count = round(abs(layer) * layers)",
            "count = math.ceil(abs(layer) * layers)",
            f"{_ALLOCATION} -k share_of_the_layers",
        ),
        (
            "within: the first ones for the last",
            "slice(count) if layer >= 0",
            "slice(count) if layer <= 0",
            f"{_ALLOCATION} -k share_of_the_layers",
        ),
        (
            "within: attention of all that goes",
            "beyond = max(ratio - self.attention_from, 0.0) / (ratio or 1.0)",
            "beyond = 1.0",
            f"{_ALLOCATION} -k gives_its_share",
        ),
        (
            "within: attention of the rest",
            "/ (ratio or 1.0)",
            "/ (1 - ratio or 1.0)",
            f"{_ALLOCATION} -k gives_its_share",
        ),
        ("within: a unit less", "most = min(units - limits.min_keep,", "most = min(units - limits.min_keep - 1,"),
        (
            "within: multiples of what goes",
            "np.arange(units % limits.multiple_of or limits.multiple_of,",
            "np.arange(limits.multiple_of,",
        ),
    ),
    *_of(
        "steps/allocation/allocation.py",
        "uniform",
        f"{_ALLOCATION} -k plain_rules",
        ("uniform: the same of each", "return size / size.sum()", "return (size > 0) / (size > 0).sum()"),
    ),
    *_of(
        "steps/allocation/allocations.py",
        "log softmax",
        f"{_ALLOCATION} -k plain_rules",
        ("log: layers from 2", "np.log1p(np.arange(len(size)))", "np.log1p(np.arange(len(size)) + 1)"),
        ("softmax: sign", "lowest) - lowest) / self.temperature)", "lowest) - lowest) * self.temperature)"),
    ),
    *_of(
        "steps/allocation/allocation.py",
        "uniform global",
        f"{_ALLOCATION} -k plain_rules",
        (
            "global: whatever a unit costs",
            "values / costs[name][:, None] for name, values in priority",
            "values * costs[name][:, None] for name, values in priority",
        ),
        (
            "uniform: by scores",
            "return blocks.share",
            "return blocks.score",
        ),
        (
            "within: attention's share for the MLP",
            "[(numbers[:1], attention), (numbers[1:], 1 - attention)]",
            "[(numbers[:1], 1 - attention), (numbers[1:], attention)]",
        ),
    ),
    *_of(
        "steps/allocation/blocks.py",
        "uniform global",
        f"{_ALLOCATION} -k plain_rules",
        ("solver: gives nothing back", "surplus = int(found.cost.sum()) - target", "surplus = 0"),
        ("solver: gives back too much", "if group not in held and cost <= surplus:", "if group not in held:"),
        (
            "solver: blocks of the highest score",
            "np.lexsort((blocks.stop, blocks.layer, blocks.structure, blocks.cost, key))",
            "np.lexsort((blocks.stop, blocks.layer, blocks.structure, blocks.cost, -key))",
        ),
    ),
    *_of(
        "steps/allocation/rounds.py",
        "rounds",
        "tests/steps/test_run.py -k rounds saap_jax/steps/allocation/rounds.py",
        ("rounds: one too few", "range(1, math.ceil(ratio / every))", "range(2, math.ceil(ratio / every))"),
    ),
    *_of(
        "steps/best_of.py",
        "best_of",
        "tests/steps/test_best_of.py",
        (
            "best_of: the worst",
            'best = chains[int(least_first("divergences of chains", judged)[0])]',
            'best = chains[int(least_first("divergences of chains", judged)[-1])]',
        ),
        (
            "best_of: fitted on what judges",
            'fit[name] = language_model("best_of", on.dense).blanked(examples, held)',
            "fit[name] = examples",
        ),
        (
            "best_of: windows alike",
            "np.average(found, weights=tokens)",
            "np.average(found)",
            "tests/steps/test_best_of.py -k tokens",
        ),
        (
            "best_of: the first of five",
            "([every - 1, 0] if on.batch_size == 1 else [0, every - 1])",
            "([every - 1, 0] if on.batch_size == 1 else [1, every - 1])",
        ),
    ),
    *_of(
        "steps/refinement/learn.py",
        "learn",
        "tests/steps/test_learn.py -k learn_",
        (
            "learn: no bias correction",
            "scale = math.sqrt(square / (1 - MOMENTUM**now.step)) or 1.0",
            "scale = math.sqrt(square) or 1.0",
        ),
        (
            "learn: up the slope",
            "values[name] - now.rate * moments[name] / scale",
            "values[name] + now.rate * moments[name] / scale",
        ),
        (
            "learn: values stay",
            "values[name] - now.rate * moments[name] / scale",
            "values[name] - 0 * moments[name] / scale",
        ),
        (
            "learn: whatever a unit costs",
            "gradient[name] / costs[name][:, None] for name in values",
            "gradient[name] * 1.0 for name in values",
        ),
        (
            "learn: the last mean square alone",
            "square = MOMENTUM * square + (1 - MOMENTUM) * mean",
            "square = (1 - MOMENTUM) * mean",
        ),
        (
            "learn: rate from step 1",
            "cosine(self.rate, at, self.steps), share",
            "cosine(self.rate, at + 1, self.steps), share",
        ),
        (
            "learn: the worst round",
            'int(least_first("divergences of rounds", judged)[0])',
            'int(least_first("divergences of rounds", judged)[-1])',
        ),
        ("learn: all that was kept begins lower", "np.where(kept, KEPT, GONE)", "np.where(kept, GONE, KEPT)"),
    ),
)

_DEFAULT = "tests/recipes/test_default.py"

_RECIPES = (
    *_of(
        "recipes/default.py",
        "within best_of fused",
        f"{_DEFAULT} -k fast",
        (
            "default: another protection",
            "protect=(0.13, -0.07), attention=0.25",
            "protect=(0.07, -0.13), attention=0.25",
        ),
        ("default: more of attention", "attention=0.25, attention_from", "attention=0.5, attention_from"),
        ("default: attention sooner", "attention_from=0.3", "attention_from=0.2"),
        (
            "default: another estimator",
            "fused(fisher, leverage, wanda) > within(protect",
            "fused(fisher, wanda) > within(protect",
        ),
        ("default: one ranking", "attention_from=0.3) > uniform", "attention_from=0.3) > global"),
    ),
    *_of(
        "recipes/default.py",
        "self_calibration scales least_squares",
        f"{_DEFAULT} -k default_repairs",
        ("default: less text", "self_calibration(96, beside=True)", "self_calibration(64, beside=True)"),
        ("default: no calibration text", "self_calibration(96, beside=True)", "self_calibration(96)"),
        ("default: the same text again", "self_calibration(64, seed=1)", "self_calibration(64, seed=0)"),
        ("default: another noise", "least_squares(noise=8, blend=0.3)", "least_squares(noise=4, blend=0.3)"),
        ("default: another blend", "least_squares(noise=8, blend=0.3)", "least_squares(noise=8, blend=0.7)"),
        ("default: fewer steps", "scales(12, rate=0.03)", "scales(6, rate=0.03)"),
        ("default: a smaller rate", "scales(12, rate=0.03)", "scales(12, rate=0.01)"),
    ),
    *_of(
        "recipes/saap.py",
        "stable global fused",
        "tests/recipes/test_papers.py -k saap_as",
        ("saap: the stable goes", 'f"stable({weight}) > "', 'f"stable({-weight}) > "'),
        ("saap: whole matrices", "taylor_vector(within=channel), taylor_element", "taylor_vector, taylor_element"),
        ("saap: other limits", "within(protect=(0.13, -0.07)) > {stable}", "within(protect=(0.13, -0.2)) > {stable}"),
    ),
    *_of(
        "steps/self_calibration.py",
        "self_calibration",
        f"{_DEFAULT} -k default_repairs",
        ("self_calibration: another prompt", "prompt: Positive = 12", "prompt: Positive = 6"),
        (
            "self_calibration: colder",
            "temperature: Annotated[float, check_positive] = 1.0",
            "temperature: Annotated[float, check_positive] = 0.5",
        ),
    ),
    *_of(
        "steps/score/score.py",
        "fused",
        f"{_DEFAULT} -k fast",
        ("fused: attention by first derivatives", 'attention: str = "gate_fisher"', 'attention: str = "gate_taylor"'),
    ),
    *_of(
        "estimation/reconstruction.py",
        "leverage",
        f"{_RECONSTRUCTION} -k hundredth",
        (
            "leverage: another ridge",
            "def leverage(*, damping: Damping = 0.01)",
            "def leverage(*, damping: Damping = 0.02)",
        ),
    ),
)

_REPAIRED = (
    *_of(
        "steps/repair/output.py",
        "least_squares",
        _LEAST_SQUARES,
        (
            "least_squares: blend and one less it are exchanged",
            "return (1 - self.blend) * own + self.blend * lacking",
            "return self.blend * own + (1 - self.blend) * lacking",
        ),
        ("least_squares: another blend", "blend: Share = 0.3", "blend: Share = 0.4"),
        ("least_squares: noise of 4", "check_positive] = 8.0", "check_positive] = 4.0"),
        (
            "least_squares: damping by all rows",
            "self.noise * float(jnp.sum(kept)) /",
            "self.noise * len(kept) /",
            f"{_COMPENSATION} -k pads",
        ),
        (
            "least_squares: damping by the tokens that fit",
            "max(float(sums.everything.tokens), 1.0)",
            "max(float(sums.fit.tokens), 1.0)",
        ),
        ("least_squares: the ridge's mean", 'ridge: Ridge = "coordinate"', 'ridge: Ridge = "mean"'),
        ("least_squares: made of the text that fits", "in (sums.fit, sums.everything)", "in (sums.fit, sums.fit)"),
        (
            "least_squares: judged as it ends",
            "output_error(sums.judge, fitted, nothing)",
            "output_error(sums.judge, new, nothing)",
            f"{_COMPENSATION} -k kept_rows",
        ),
    ),
    *_of(
        "surgery/corrections.py",
        "least_squares",
        f"{_COMPENSATION} -k ridge_regression",
        (
            "corrections: from nothing",
            "return start + jnp.where(kept[:, None], cho_solve",
            "return jnp.where(kept[:, None], cho_solve",
        ),
        ("corrections: plus what it writes", "normal.cross - gram @ start, 0)", "normal.cross + gram @ start, 0)"),
        (
            "corrections: no damping",
            "jnp.where(energy > 0, damping.astype(gram.dtype) * energy, 1)",
            "jnp.where(energy > 0, energy * 0, 1)",
        ),
        (
            "corrections: what goes counts",
            "both = kept[:, None] & kept[None, :]",
            "both = kept[:, None] | kept[None, :]",
        ),
        (
            "corrections: bias of all rows",
            "left = jnp.where(kept[:, None], weight, 0)",
            "left = weight",
            f"{_COMPENSATION} -k weighted_mean",
        ),
        (
            "corrections: error without its square",
            "total = normal.square - 2 * missed + written",
            "total = normal.square - missed + written",
            f"{_COMPENSATION} -k error",
        ),
    ),
    *_of(
        "surgery/compensation.py",
        "least_squares",
        _LEAST_SQUARES,
        ("compensation: toward the stream itself", "written = after - stream.pruned", "written = after - stream.dense"),
        (
            "compensation: activations of the unpruned",
            "active = activations(model, at, stream.pruned, rows=rows)",
            "active = activations(model, at, stream.dense, rows=rows)",
        ),
        (
            "compensation: streams are not advanced by what was made",
            "some = new._replace(weight=new.weight[rows], rows=rows)",
            "some = at.old._replace(weight=at.old.weight[rows], rows=rows)",
        ),
        (
            "compensation: padding counts",
            "token_weights(behind, mask,",
            "token_weights(behind, mask | True,",
        ),
        (
            "compensation: the first of four is held out",
            "slot = int(number % HELD_OUT == HELD_OUT - 1)",
            "slot = int(number % HELD_OUT == 0)",
            "tests/steps/test_least_squares.py -k every_fourth",
        ),
    ),
    *_of(
        "estimation/reconstruction.py",
        "least_squares leverage obs",
        _LEAST_SQUARES,
        (
            "compensation: tokens by their norm",
            "/ (jnp.mean(jnp.square(behind), axis=-1) + norm_eps)",
            "/ (jnp.sqrt(jnp.mean(jnp.square(behind), axis=-1)) + norm_eps)",
        ),
    ),
    *_of(
        "surgery/sequence.py",
        "layerwise",
        "tests/surgery/test_sequence.py -k behind_those",
        ("layerwise: no root", "size = jnp.sqrt(jnp.diag(moment))", "size = jnp.diag(moment)"),
        (
            "layerwise: the lowest stay",
            "np.argsort(-np.where(writes, scores, -np.inf)",
            "np.argsort(np.where(writes, scores, np.inf)",
        ),
        ("layerwise: another ridge", "DAMPING = 0.01", "DAMPING = 0.5"),
    ),
    *_of(
        "surgery/divergence.py",
        "best_of learn scales",
        "tests/steps/test_learn.py -k derivative",
        (
            "divergence: the other way round",
            "jnp.sum(jnp.exp(known) * (known - student), axis=-1)",
            "jnp.sum(jnp.exp(student) * (student - known), axis=-1)",
        ),
        (
            "divergence: cross-entropy",
            "jnp.sum(jnp.exp(known) * (known - student), axis=-1)",
            "-jnp.sum(jnp.exp(known) * student, axis=-1)",
        ),
        (
            "divergence: held out from the first on",
            "self._held = texts[HELD_OUT - 1 :: HELD_OUT]",
            "self._held = texts[::HELD_OUT]",
        ),
        (
            "divergence: padding counts",
            "return jnp.sum(jnp.where(text.mask, each, 0)), jnp.sum(text.mask)",
            "return jnp.sum(each), jnp.sum(text.mask)",
        ),
        (
            "divergence: rows by their length",
            "axis=1) / jnp.sum(mask, axis=1).astype(each.dtype)",
            "axis=1) / mask.shape[1]",
            "tests/steps/test_best_of.py -k tokens",
        ),
        (
            "divergence: factors of another layer",
            "scales[name][at.start : at.stop, : at.units[name]]",
            "scales[name][at.start : at.stop, : at.units[name]][::-1]",
            "tests/surgery/test_scales.py -k gates",
        ),
    ),
    *_of(
        "steps/repair/scales.py",
        "scales",
        "tests/surgery/test_scales.py",
        (
            "scales: the worst round",
            'best = found[int(least_first("divergences of rounds", judged)[0])][1]',
            'best = found[int(least_first("divergences of rounds", judged)[-1])][1]',
        ),
        (
            "scales: the last round",
            'best = found[int(least_first("divergences of rounds", judged)[0])][1]',
            "best = found[-1][1]",
        ),
        ("scales: ten times the rate", "cosine(self.rate, at, self.steps)", "cosine(10 * self.rate, at, self.steps)"),
        (
            "scales: units that went move",
            "np.where(kept, gradient[name], 0.0) for name, kept",
            "np.where(True, gradient[name], 0.0) for name, kept",
        ),
    ),
    *_of(
        "steps/training.py",
        "learn scales",
        "tests/surgery/test_scales.py -k adam",
        ("training: a cosine that rises", "return rate * (1 + math.cos(", "return rate * (1 - math.cos("),
        (
            "training: Adam up the slope",
            "values[name] - rate * np.asarray(updates[name]",
            "values[name] + rate * np.asarray(updates[name]",
        ),
    ),
    *_of(
        "steps/self_calibration.py",
        "self_calibration",
        "tests/steps/test_self_calibration.py",
        (
            "self_calibration: one seed",
            "temperature=self.temperature, seed=self.seed",
            "temperature=self.temperature, seed=0",
        ),
        (
            "self_calibration: one temperature",
            "temperature=self.temperature, seed=self.seed",
            "temperature=1.0, seed=self.seed",
        ),
        (
            "self_calibration: always beside",
            "dict(on.scenarios) if self.beside else {}",
            "dict(on.scenarios) if not self.beside else {}",
        ),
        (
            "self_calibration: by the pruned model",
            "language_model(self.name, on.dense).continued(",
            "language_model(self.name, state.subject).continued(",
        ),
        (
            "self_calibration: prompt of one less",
            "given, self.windows, self.prompt, temp",
            "given, self.windows, self.prompt - 1, temp",
        ),
    ),
    *_of(
        "subjects/llama.py",
        "self_calibration",
        "tests/steps/test_self_calibration.py",
        ("self_calibration: half of the windows begin", "begun[row % len(begun)]", "begun[row // 2 % len(begun)]"),
    ),
    *_of(
        "surgery/cut.py",
        "uniform global",
        "tests/surgery/test_cut.py -k 'masked_equals_cut'",
        (
            "cut: a layer too far",
            "read_in_place(parameter[...])[offset : offset + 1]",
            "read_in_place(parameter[...])[:1]",
        ),
        (
            "cut: what goes stays",
            "np.flatnonzero(keep[name][layer]) for axis, name",
            "np.flatnonzero(~keep[name][layer]) for axis, name",
        ),
    ),
)

_JUDGED = (
    *_of(
        "evaluation/differences.py",
        "compare",
        "tests/evaluation/test_differences.py",
        ("differences: sign", "difference = variants - base", "difference = base - variants"),
        (
            "differences: deviation without n - 1",
            "means.mean(axis=1).std(axis=1, ddof=1) / math.sqrt(count)",
            "means.mean(axis=1).std(axis=1, ddof=1) / count",
        ),
        ("differences: not corrected", "1 - LEVEL / (2 * max(others, 1))", "1 - LEVEL / 2"),
        ("differences: Student by seeds", "stdtrit(seeds - 1,", "stdtrit(seeds,"),
    ),
    *_of(
        "evaluation/race.py",
        "compare",
        "tests/evaluation/test_race.py",
        ("race: the best leaves", "stay = np.asarray(~worse.any(axis=1))", "stay = np.asarray(~worse.any(axis=0))"),
        (
            "race: windows count once for all seeds",
            "differences.var(axis=-1, ddof=1) / losses.shape[1]",
            "differences.var(axis=-1, ddof=1) / losses.shape[0]",
        ),
    ),
    *_of(
        "evaluation/evidence.py",
        "compare",
        "tests/evaluation/test_race.py -k e_value",
        ("evidence: no n", "0.5 * count * (np.log1p(square / free)", "0.5 * (np.log1p(square / free)"),
        ("evidence: both sides", "2 * stdtr(count, posterior)", "stdtr(count, posterior)"),
    ),
    *_of(
        "evaluation/crossing.py",
        "compare",
        "tests/evaluation/test_crossing.py",
        (
            "crossing: from the other end",
            "return ratios[before] + share * (ratios[after]",
            "return ratios[after] + share * (ratios[after]",
        ),
        ("crossing: seeds that differ prove", "if half := float(student(of, 1)):", "if half := 0.0:"),
    ),
    *_of(
        "types.py",
        "compare",
        "tests/evaluation/test_perplexity.py",
        (
            "perplexity: windows alike",
            "np.exp(self.sums.sum() / self.counts.sum())",
            "np.exp((self.sums / self.counts).mean())",
        ),
    ),
    *_of(
        "structures/discovery.py",
        "uniform global",
        "tests/structures/test_structures.py",
        ("costs: of one member", "each += math.prod(", "each = math.prod("),
    ),
)

MUTANTS: tuple[Mutant, ...] = (*_ESTIMATORS, *_OBSERVED, *_CHOSEN, *_RECIPES, *_REPAIRED, *_JUDGED)
