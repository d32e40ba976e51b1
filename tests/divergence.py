"""The divergence of a masked model by plain numpy, with some of the next-token loss, and microbatches to take it of."""

import numpy as np
from scipy.special import log_softmax

from tests.helpers import forward, random_tokens


def batches_of(count: int = 4, seed: int = 1):
    tokens = random_tokens(count * 2, 8, seed)
    mask = np.ones(tokens.shape, bool)
    mask[-1, 5:] = False
    return [(tokens[i : i + 2], mask[i : i + 2]) for i in range(0, len(tokens), 2)]


def plain_divergence(model, teacher, gates, batches, language_loss: float = 0.0) -> float:
    """The mean over real tokens of Σ p log(p / q) - c log q(next real token), by numpy from logits."""
    total, count = 0.0, 0
    for tokens, mask in batches:
        known, own = (log_softmax(np.asarray(forward(m, tokens, g), np.float64), axis=-1)
                      for m, g in ((teacher, None), (model, gates)))  # fmt: skip
        total += (np.exp(known) * (known - own)).sum(-1)[mask].sum()
        following = np.take_along_axis(own[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        total -= language_loss * following[mask[:, 1:]].sum()
        count += mask.sum()
    return total / count
