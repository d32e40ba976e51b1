"""Prune a model of your own, whose code knows nothing of saap_jax, by one call.

    python examples/own_model.py

The model is traced: every axis of every array is followed through the program, and axes that go together are a
structure. What is left is smaller arrays, and a function that runs on them.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import saap_jax


class Block(nnx.Module):
    """A residual layer."""

    def __init__(self, width, hidden, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Net(nnx.Module):
    """Three layers between two projections."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
        self.blocks = nnx.List([Block(16, 64, rngs) for _ in range(3)])

    def __call__(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = block(h)
        return self.last(h)


def mean_square(outputs, targets):
    """The loss, of outputs and targets."""
    return jnp.square(outputs - targets).mean()


def train(net, x, y, steps=300):
    """Fit the net by Adam."""
    optimizer = nnx.Optimizer(net, optax.adam(3e-3), wrt=nnx.Param)

    @nnx.jit
    def update(net, optimizer):
        optimizer.update(net, nnx.grad(lambda net: mean_square(net(x), y))(net))

    for _ in range(steps):
        update(net, optimizer)


def main():
    """Train a net, prune it by two methods; return what came of them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 8)), jnp.float32)
    y = jnp.stack([jnp.sin(2 * x[:, 0]) * x[:, 1], jnp.tanh(x[:, 2] + x[:, 3])], axis=1)
    net = Net(nnx.Rngs(0))
    train(net, x[:384], y[:384])
    given = {"loss": mean_square, "calibration": (x[:384], y[:384]), "held_out": (x[384:], y[384:])}
    found = {
        method: saap_jax.prune(net, ratio=0.3, method=method, **given)
        for method in ("random > uniform", "gate_taylor > uniform", "gate_taylor > uniform > least_squares")
    }
    for method, pruned in found.items():
        print(f"{method}: {pruned}")
    smaller = found["gate_taylor > uniform > least_squares"].model  # a Net whose arrays are smaller
    print("outputs of the smaller net:", smaller(x[:2]).tolist())
    return found


if __name__ == "__main__":
    main()
