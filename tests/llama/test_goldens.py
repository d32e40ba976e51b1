"""SmolLM2's logits equal what transformers computed when `tests/goldens/make_llama_goldens.py` ran; needs no torch."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file


@pytest.mark.slow
def test_logits(smollm2):
    golden = load_file(Path(__file__).parent.parent / "goldens/llama_goldens.safetensors")
    logits = np.asarray(smollm2(jnp.asarray(golden["real/tokens"]))[0])
    np.testing.assert_array_equal(logits.argmax(-1), golden["real/argmax"])
    np.testing.assert_allclose(logits.max(-1), golden["real/max"], rtol=0, atol=5e-4)
    np.testing.assert_allclose(logits[:, ::512], golden["real/every_512th"], rtol=0, atol=5e-4)
    assert np.abs(logits[:, 1::512] - golden["real/every_512th"]).max() > 1  # negative control: other tokens
