"""MaxText itself: it loads what we export and computes our logits, and we read back what it saves."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.config.jobs import ExportConfig
from saap_jax.jobs.export import export_model
from saap_jax.llama import Constants, Llama, LlamaSpec, RopeScaling, load_model, save_model
from tests.export.models import RELATIVES, UNIFORM, spec_of
from tests.helpers import random_model

pytestmark = [pytest.mark.maxtext, pytest.mark.filterwarnings("ignore")]

LENGTH = 24
SCALING = RopeScaling(kind="llama3", factor=8.0)
SPECS: dict[str, LlamaSpec] = {
    "llama": UNIFORM,
    "pruned": spec_of((1, 3, 16), (1, 3, 16), constants=Constants(rope_theta=1e6, norm_eps=1e-6)),
    "tied": dataclasses.replace(UNIFORM, tied=True),
    "scaled": dataclasses.replace(UNIFORM, constants=Constants(rope_scaling=SCALING, max_positions=131072)),
    "qwen3": RELATIVES["qwen3-uniform"],
}


@pytest.fixture(autouse=True)
def usual_promotion():
    """MaxText is written for the promotion that jax has by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def exported(model: Llama, place: Path, name: str = "out") -> Path:
    source = save_model(model, place / f"{name}-model")
    export_model(ExportConfig(model=str(source), out=str(place / name), format="maxtext"))
    return place / name


def loaded(directory: Path, place: Path):
    """Build MaxText's model of an exported directory, by what `maxtext.yml` says; return its mesh too."""
    import maxtext
    import yaml
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    said = yaml.safe_load((directory / "maxtext.yml").read_text())["student_overrides"]
    config = pyconfig.initialize(
        ["", os.path.join(os.path.dirname(maxtext.__file__), "configs", "base.yml")],
        run_name="test",
        hardware="cpu",
        skip_jax_distributed_system=True,
        base_output_directory=str(place / "maxtext"),
        dtype="float32",
        weight_dtype="float32",
        max_target_length=LENGTH,
        max_prefill_predict_length=LENGTH // 2,
        per_device_batch_size=2,
        attention="dot_product",
        **said,
    )
    return model_creation_utils.from_pretrained(config)


def tokens_of(spec: LlamaSpec) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(1, spec.vocab, (2, LENGTH)), jnp.int32)


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(ours)).max())


@pytest.mark.parametrize("name", SPECS)
def test_it_computes_our_logits_and_what_it_saves_is_read_back(name, tmp_path):
    from flax import nnx
    from maxtext.common import checkpointing

    model, tokens = random_model(SPECS[name], 1), tokens_of(SPECS[name])
    if name == "tied":  # MaxText takes words that are embedded and predicted by one matrix in bfloat16, to predict
        model.embedding[...] = model.embedding[...].astype(jnp.bfloat16).astype(jnp.float32)
    directory = exported(model, tmp_path)
    theirs, mesh = loaded(directory, tmp_path)
    positions, segments = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape), jnp.ones_like(tokens)
    with mesh:
        logits = theirs(tokens, positions, decoder_segment_ids=segments, enable_dropout=False)
    assert off(model(tokens), logits) < 1e-4
    assert off(random_model(SPECS[name], 2)(tokens), logits) > 0.1

    weights = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
    checkpointing.save_params_to_path(str(tmp_path / "trained" / "3"), {"params": weights})
    (tmp_path / "trained" / "config.json").write_bytes((directory / "config.json").read_bytes())
    read = load_model(tmp_path / "trained")
    assert read.spec == model.spec
    assert off(read(tokens), logits) < 1e-4
