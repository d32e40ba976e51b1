"""Scores do not depend on the number of devices: one, or four that share the examples of each microbatch.

The number of devices is fixed once jax has started, so this file also runs as a program of its own.
"""

import contextlib
import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from saap_jax.estimation import (
    ESTIMATORS,
    GATE_GRADIENT,
    GATE_HESSIAN,
    curvature_of,
    make_estimator,
    make_estimators,
    observe,
    score,
    union_of_needs,
)
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, length_mask, random_tokens
from tests.xla_flags import forced

DEVICES, ROWS = 4, 8
LENGTHS = (8, 5, 7, 8, 3, 6, 8, 8, 2, 4, 8, 7, 8, 0, 0, 0)
"""Of two microbatches; the last device has only padding rows in the second."""
NAMES = tuple(
    {"gate_hessian": "gate_hessian(probes=2, attention='probes')"}.get(name, name)
    for name in ESTIMATORS
    if name != "random"
)
ONLY_GATES = frozenset({GATE_GRADIENT})
STEPS = ("observe_step", "hessian_step")


def main(path: str) -> None:
    """Score on one device and on four; write the scores, and how the work was shared, to an npz file."""
    warnings.simplefilter("error")
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    spread, copied = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    model, estimators, mask = dense_model(), make_estimators(NAMES), length_mask(*LENGTHS, seq=8)
    needs, curvature = union_of_needs(estimators.values()), curvature_of(estimators.values())
    found: dict[str, Any] = {}
    for case, rows, seed in (("one", None, 0), ("four", spread, 0), ("other text", spread, 9)):
        everywhere = model if rows is None else jax.device_put(model, copied)
        batches = placed(random_tokens(len(LENGTHS), 8, seed), mask, rows)
        shares: list[tuple[int, int]] = []
        with watched(lambda step, inputs, shares=shares: shares.extend(map(share, inputs))):
            statistics = observe(everywhere, batches, needs, curvature=curvature)
        found[f"{case}/shares"] = shares
        for name, scores in score(estimators, statistics, everywhere).items():
            found |= {f"{case}/{name}/{structure}": scores[structure] for structure in STRUCTURES}
    for case, rows in (("one", None), ("copied", copied), ("spread", spread)):
        everywhere = model if rows is None else jax.device_put(model, copied)
        with watched(lambda step, _, case=case: found.update({f"operations/{case}": operations(step)}), STEPS[:1]):
            observe(everywhere, placed(random_tokens(ROWS, 8), mask[:ROWS], rows), ONLY_GATES)
    np.savez(path, **found)


def placed(tokens: np.ndarray, mask: np.ndarray, rows: NamedSharding | None) -> list[tuple[Any, Any]]:
    """Cut into microbatches and put each on the devices of `rows`, or leave it in host memory."""
    batches = [(tokens[i : i + ROWS], mask[i : i + ROWS]) for i in range(0, len(tokens), ROWS)]
    return batches if rows is None else jax.device_put(batches, rows)


@contextlib.contextmanager
def watched(look: Callable[[Callable[[], Any], tuple[jax.Array, jax.Array]], None], names: tuple[str, ...] = STEPS):
    """Let `look(compile, (tokens, mask))` see each call of the pass's jitted steps, with the inputs as they arrive."""
    module = sys.modules[observe.__module__]

    def wrapped(step: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(step).bind(*args, **kwargs).arguments
            look(lambda: step.lower(*args, **kwargs).compile(), (given["tokens"], given["mask"]))
            return step(*args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(module, STEPS[0], wrapped(module.observe_step)))
        if STEPS[1] in names:
            patches.enter_context(mock.patch.dict(vars(GATE_HESSIAN), step=wrapped(GATE_HESSIAN.step)))
        yield


def share(array: jax.Array) -> tuple[int, int]:
    """Return on how many devices an array is, and how many of its rows are on each."""
    return len(array.sharding.device_set), array.sharding.shard_shape(array.shape)[0]


def operations(compiled: Callable[[], Any]) -> float:
    """Return the floating-point operations that one device does in a step."""
    return compiled().cost_analysis()["flops"]


pytestmark = pytest.mark.slow  # a process of its own with four devices compiles everything anew


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("devices") / "found.npz"
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.estimation.test_devices", path],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **strict, **forced(DEVICES), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(path))


def test_scores_are_the_same_on_four_devices(found):
    for name in NAMES:
        for structure in STRUCTURES:
            one, four, other = (found[f"{case}/{name}/{structure}"] for case in ("one", "four", "other text"))
            np.testing.assert_allclose(four, one, rtol=1e-5, atol=0, err_msg=f"{name} of {structure}")
            same = np.allclose(other, one, rtol=1e-3, atol=0)
            assert same == (not make_estimator(name).needs), f"{name} of {structure}"


def test_the_examples_stay_spread_over_the_devices(found):
    calls = 2 * 2 * len(STEPS)  # tokens and mask of two microbatches
    assert found["one/shares"].tolist() == [[1, ROWS]] * calls
    for case in ("four", "other text"):
        assert found[f"{case}/shares"].tolist() == [[DEVICES, ROWS // DEVICES]] * calls


def test_a_device_works_on_its_own_examples_only(found):
    """Also where every device holds all of them: the model says which are its own."""
    one = found["operations/one"]
    assert 0.24 < found["operations/spread"] / one < 0.3
    assert 0.24 < found["operations/copied"] / one < 0.3


if __name__ == "__main__":
    main(sys.argv[1])
