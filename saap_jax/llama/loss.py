"""The next-token loss: what estimation differentiates and what evaluation exponentiates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from saap_jax.llama.model import Llama, Observe
from saap_jax.types import Gates, Remat


def next_token_losses(
    model: Llama,
    tokens: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    gates: Gates | None = None,
    *,
    observe: Observe | None = None,
    remat: Remat = "none",
) -> tuple[Float[Array, "batch"], list]:
    """Return each example's summed next-token loss in nats, float32 (at least), and what `observe` made of segments.

    Position t predicts token t + 1; it counts where that token is real (`mask`). Divide by `predicted_tokens` for the
    mean. Padding on the right changes neither the loss nor any gradient.
    """
    hidden, observed = model.hidden(tokens, gates, observe=observe, remat=remat)
    logits = model.logits(hidden[:, :-1])
    target = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - target
    return jnp.sum(jnp.where(mask[:, 1:], losses, 0), axis=-1), observed


def predicted_tokens(mask: Bool[Array, "batch seq"]) -> Int[Array, "batch"]:
    """Count the tokens of each example that enter its loss: all real ones but the first."""
    return jnp.sum(mask[:, 1:], axis=-1)
