"""What a unit costs and a keep-set leaves, against models that are cut."""

import numpy as np
import pytest

from saap_jax.llama.segments import existing_units
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.surgery.cut import cut
from tests.helpers import dense_model, ragged_model, random_model, spec_of

MODELS = {
    "grouped": lambda: random_model(spec_of((2, 10), (3, 7), (0, 5), q_per_kv=3)),
    "mqa": lambda: dense_model("mqa", tied=True),
    "ragged": ragged_model,
    "biases": lambda: dense_model(output_biases=True),
}


def drawn(model, seed) -> dict[str, np.ndarray]:
    """Draw a keep-set with at least one head of each layer that has any."""
    rng = np.random.default_rng(seed)
    keep = {name: units & (rng.random(units.shape) < 0.7) for name, units in existing_units(model.segments).items()}
    for layer, widths in enumerate(model.spec.layers):
        keep["attention"][layer, : min(1, widths.kv_heads)] = True
    return keep


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_cut_model(name):
    model = MODELS[name]()
    subject = LlamaSubject(model)
    for seed in range(3):
        keep = drawn(model, seed)
        small = cut(model, keep)
        left = prunable_parameters(discover(small))
        removed = subject.removed(keep)
        assert removed > 0
        assert (subject.parameters - removed, subject.prunable - removed) == (count_parameters(small), left)
    assert subject.removed(subject.existing) == 0
