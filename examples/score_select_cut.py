"""Score, select, cut: structured pruning with jax and pure functions, and no configuration.

    python examples/score_select_cut.py [MODEL]

A unit is a channel of an MLP, or a key-value head with its query heads. Each has a gate, an input of the model that is
1. A gate of 0 gives the logits of the model without the unit, so derivatives by gates say what units are worth.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import saap_jax


def mean_loss(gates, model, tokens):
    """Mean next-token loss of one example, in nats."""
    log_p = jax.nn.log_softmax(model(tokens[None, :-1], gates)[0])
    return -jnp.take_along_axis(log_p, tokens[1:, None], axis=-1).mean()


@jax.jit
def squared_gradients(gates, model, tokens):
    """(∂ℒ/∂gate)², summed over the examples of a batch [batch, seq]: {structure: [layers, units]}."""
    each = jax.vmap(jax.grad(mean_loss), in_axes=(None, None, 0))(gates, model, tokens)
    return {name: jnp.square(gradient).sum(axis=0) for name, gradient in each.items()}


def score(model, tokens, batch=4):
    """The empirical Fisher information of the gates: the mean over examples of (∂ℒ/∂gate)²."""
    structures, layers = saap_jax.discover(model), len(model.spec.layers)
    gates = {name: jnp.ones((layers, max(structure.units))) for name, structure in structures.items()}
    total = {name: 0 * gate for name, gate in gates.items()}
    for start in range(0, len(tokens), batch):
        found = squared_gradients(gates, model, tokens[start : start + batch])
        total = {name: total[name] + found[name] for name in total}
    return {name: np.asarray(each) / len(tokens) for name, each in total.items()}


def main(name="smollm2-135m", examples=8, length=128, ratio=0.2):
    """Prune a model; return the perplexities of the unpruned, the masked and the cut model."""
    model, tokenizer = saap_jax.load_model(name), saap_jax.load_tokenizer(name)
    text = saap_jax.calibration_windows("builtin:reference", tokenizer, examples, length, seed=0)
    held_out = saap_jax.evaluation_windows("builtin:descriptions", tokenizer, length, limit=examples)

    scores = score(model, text.tokens)
    chosen = saap_jax.select_units(model, scores, ratio, "uniform")  # the same share of each layer and structure
    pruned = saap_jax.cut(model, chosen.keep)

    figures = {
        "unpruned": saap_jax.perplexity(model, held_out),
        "masked": saap_jax.perplexity(model, held_out, chosen.keep),
        "cut": saap_jax.perplexity(pruned, held_out),
    }
    before, after = map(saap_jax.count_parameters, (model, pruned))
    print(f"{chosen.actual:.1%} of the prunable parameters gone: {before:,} -> {after:,}")
    print(", ".join(f"{name} {figure:.2f}" for name, figure in figures.items()))
    return figures


if __name__ == "__main__":
    main(*sys.argv[1:])
