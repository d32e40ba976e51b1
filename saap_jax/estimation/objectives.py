"""What is differentiated by weights and gates: the next-token loss, or what an estimator asks for in its place.

- `loss`: -log p(next token), as everywhere else.
- `sampled`: -log p(w) of a word w that is drawn from the model's own prediction. Its squared derivatives are, on
  average, the diagonal of the Fisher information, the curvature of the divergence KL(model ‖ changed model); those of
  `loss` are the empirical Fisher information, which is another matrix (Kunstner et al., arXiv:1905.12558). First
  derivatives are 0 on average.
- `margin`: log p(v) - log p(next token), v the likeliest other word, by which GISP (arXiv:2510.18030) compares wrong
  and right answers, here token by token.

What is drawn depends on the text alone: not on the batch that a window lies in, nor on its padding.
"""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.loss import next_token_losses, over_positions
from saap_jax.llama.model import Llama, Observe
from saap_jax.types import Gates, Objective, Remat

ExampleSums = Float[Array, "batch"]


def summed_objective(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates,
    objective: Objective,
    *,
    observe: Observe | None = None,
    remat: Remat = "none",
) -> tuple[ExampleSums, ExampleSums, list[Any]]:
    """Compute each example's summed objective and next-token loss in nats, and what `observe` made of segments."""
    if objective == "loss":
        sums, observed = next_token_losses(model, tokens, mask, gates, observe=observe, remat=remat, once=True)
        return sums, sums, observed
    hidden, observed = model.hidden(tokens, gates, observe=observe, remat=remat)
    function = functools.partial(_at_positions, model, _OBJECTIVES[objective])
    each: tuple[Array, Array] = over_positions(
        function, hidden[:, :-1], tokens[:, 1:], draws(tokens, mask), logits=[model]
    )
    values, losses = (jnp.sum(jnp.where(mask[:, 1:], found, 0), axis=-1) for found in each)
    return values, losses, observed


def draws(tokens: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"]) -> Float[Array, "batch seq-1"]:
    """Draw a random number in [0, 1) for each position that predicts, told by the text of its row and its place."""
    length = tokens.shape[1]
    factors = np.multiply.accumulate(np.full(length, 0x9E3779B1, np.uint32), dtype=np.uint32)
    real = jnp.where(mask, tokens + 1, 0).astype(jnp.uint32)
    texts = jnp.sum(real * factors[None], axis=1, dtype=jnp.uint32)

    def one(text: Array, place: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), text), place))

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(texts, jnp.arange(length - 1, dtype=jnp.uint32))


def drawn(logits: Float[Array, "*rows vocab"], draw: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    """Find the word at a place in [0, 1) of the cumulative distribution that logits make."""
    cumulative = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    at = draw[..., None].astype(cumulative.dtype) * cumulative[..., -1:]
    return jnp.argmax(cumulative > at, axis=-1)


def _at_positions(
    model: Llama, objective: Callable[..., Array], hidden: Array, target: Array, draw: Array
) -> tuple[Array, Array]:
    logits = model.logits(hidden)
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    right = jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    return objective(log_p, right, target, draw), -right


def _sampled(log_p: Array, right: Array, target: Array, draw: Array) -> Array:
    words = drawn(jax.lax.stop_gradient(log_p), draw)
    return -jnp.take_along_axis(log_p, words[..., None], axis=-1)[..., 0]


def _margin(log_p: Array, right: Array, target: Array, draw: Array) -> Array:
    others = jnp.where(jax.nn.one_hot(target, log_p.shape[-1], dtype=bool), -jnp.inf, log_p)
    return jnp.max(others, axis=-1) - right


OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
"""The loss first."""

_OBJECTIVES: dict[str, Callable[..., Array]] = {"sampled": _sampled, "margin": _margin}
