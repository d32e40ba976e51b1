"""Sums of gradients and of their squares, in both forms, against one product an example in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.config.mesh import MeshConfig, by_axis
from saap_jax.estimation.squares import _on_devices, gradient_sums, one_by_one, tiled
from saap_jax.planning.count import work_of
from saap_jax.runtime.mesh import layout_of

SHAPES = [
    pytest.param((3, 7, 5, 9), (16, 8, 128), id="one tile, padded tokens"),
    pytest.param((2, 40, 40, 300), (16, 16, 128), id="uneven tiles"),
    pytest.param((4, 16, 130, 257), (16, 128, 128), id="a little more than a tile"),
    pytest.param((1, 33, 16, 128), (512, 512, 1024), id="one example"),
]


def drawn(batch: int, length: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return activations, output gradients that are zero behind a length of its own for each example, and weights."""
    random = np.random.default_rng(batch * length)
    x, dy = (random.standard_normal((batch, length, width)).astype(np.float32) for width in (inputs, outputs))
    lengths = np.maximum(length - 3 * np.arange(batch), 2)
    dy *= (np.arange(length) < lengths[:, None])[..., None]
    return x, dy, (1 / lengths).astype(np.float32)


def by_hand(x: np.ndarray, dy: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    each = [a.T.astype(np.float64) @ b for a, b in zip(x, dy, strict=True)]
    return sum(each), sum((s * g) ** 2 for s, g in zip(scale, each, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_both_forms_are_the_definition(shape, tile):
    x, dy, scale = drawn(*shape)
    total, square = by_hand(x, dy, scale)
    for form in (functools.partial(one_by_one, embed=0), functools.partial(tiled, tile=tile, interpret=True)):
        for found, expected in zip(form(*map(jnp.asarray, (x, dy, scale))), (total, square), strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    if len(x) > 1:
        wrong = by_hand(x, dy, np.full_like(scale, scale.mean()))[1]  # all examples alike
        assert np.abs(wrong - square).max() > 1e-3 * np.abs(square).max()


def test_sums_of_narrow_activations_are_wide():
    x, dy, scale = drawn(3, 32, 24, 40)
    narrow = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    expected = by_hand(*(np.asarray(each.astype(jnp.float32)) for each in narrow), scale)
    for form in (functools.partial(one_by_one, embed=0), functools.partial(tiled, interpret=True)):
        total, square = form(*narrow, jnp.asarray(scale))
        assert square.dtype == jnp.float32
        np.testing.assert_allclose(square, expected[1], rtol=1e-4, atol=1e-4 * expected[1].max())
        np.testing.assert_allclose(total.astype(jnp.float32), expected[0], rtol=0.02, atol=0.02 * expected[0].max())


def test_a_program_for_a_tpu_has_the_kernel_and_counts_its_operations():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 64, 256), (2, 64, 384), (2,))]
    traced = jax.jit(functools.partial(gradient_sums, embed=0)).trace(*shapes)
    assert work_of(traced.jaxpr, frozenset()).flops == 2 * 2 * 64 * 256 * 384
    lowered = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu")]
    assert ["tpu_custom_call" in text for text in lowered] == [True, False]
    assert ["stablehlo.while" in text for text in lowered] == [False, True]


@pytest.mark.sharded
@pytest.mark.parametrize("embed", [0, 1])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 2, 2, 2)])
def test_the_kernel_on_a_mesh_is_that_of_one_device(sizes, embed):
    x, dy, scale = drawn(8, 24, 16, 32)
    expected = by_hand(x, dy, scale)
    mesh = layout_of(MeshConfig(**by_axis(sizes))).mesh
    axes = ("embed", "experts") if sizes[3:] else ("embed", "mlp")
    form = functools.partial(_on_devices, embed=embed, axes=axes, kernel=functools.partial(tiled, interpret=True))
    with jax.set_mesh(mesh):
        found = jax.jit(form)(x, dy, scale)
    for sums, expect in zip(found, expected, strict=True):
        np.testing.assert_allclose(sums, expect, rtol=1e-4, atol=1e-4 * np.abs(expect).max())
