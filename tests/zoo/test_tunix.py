"""Tunix itself: it loads what we export and computes our logits, distils ours, and we read what it trained back."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saap_jax.config.use import ExportConfig
from saap_jax.contrib.trainers.write import departures
from saap_jax.export.command import export_model
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import Constants, LlamaSpec
from tests.export.models import RELATIVES, UNIFORM, spec_of
from tests.helpers import random_model

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

GEMMA = RELATIVES["gemma3_text-apart"]
SPECS: dict[str, LlamaSpec] = {
    "llama": dataclasses.replace(UNIFORM, constants=Constants(rope_theta=1e6)),
    "tied": dataclasses.replace(UNIFORM, tied=True, constants=Constants(rope_theta=1e6, norm_eps=1e-6)),
    "qwen2": dataclasses.replace(UNIFORM, constants=Constants(family="qwen2", rope_theta=1e4)),
    "qwen3": dataclasses.replace(UNIFORM, constants=Constants(family="qwen3", rope_theta=1e6)),
    "gemma3": dataclasses.replace(GEMMA, constants=dataclasses.replace(GEMMA.constants, norm_eps=1e-6)),
}


def tokens_of(spec: LlamaSpec, rows: int = 2, length: int = 24) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(1, spec.vocab, (rows, length)), jnp.int32)


def loaded(directory):
    """Build Tunix's model of an exported directory, by what `tunix.json` says."""
    said = json.loads((directory / "tunix.json").read_text())
    model = importlib.import_module(f"{said['module']}.model")
    loader = importlib.import_module(f"{said['module']}.{said['loader']}")
    return loader.create_model_from_safe_tensors(str(directory), model.ModelConfig(**said["config"]), dtype=jnp.float32)


def logits_of(model, tokens) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    seen = jnp.broadcast_to(jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)), (len(tokens), *(tokens.shape[1],) * 2))
    return model(tokens, positions, None, seen)[0]


def exported(model: Llama, place, name: str, anyway: bool = False):
    source = save_model(model, place / f"{name}-model")
    export_model(ExportConfig(model=str(source), out=str(place / name), format="tunix", anyway=anyway))
    return place / name


def off(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(ours)).max())


@pytest.mark.parametrize("name", SPECS)
def test_it_computes_our_logits(name, tmp_path):
    model, tokens = random_model(SPECS[name], 1), tokens_of(SPECS[name])
    assert departures(model.spec) == ()
    theirs = logits_of(loaded(exported(model, tmp_path, "out")), tokens)
    assert off(model(tokens), theirs) < 1e-4
    assert off(random_model(SPECS[name], 2)(tokens), theirs) > 0.1


def test_a_base_that_it_does_not_read_makes_it_compute_something_else(tmp_path):
    """Of what `departures` says; where this fails, Tunix reads its configuration by now."""
    spec = dataclasses.replace(UNIFORM, constants=Constants(rope_theta=1e4))
    model, tokens = random_model(spec), tokens_of(spec)
    assert departures(spec)
    assert off(model(tokens), logits_of(loaded(exported(model, tmp_path, "out", anyway=True)), tokens)) > 1e-3


def test_it_distils_and_what_it_trained_is_read_back(tmp_path):
    from tunix.distillation import distillation_trainer, strategies

    constants = Constants(rope_theta=1e6)
    dense = random_model(dataclasses.replace(UNIFORM, constants=constants), 1)
    small = random_model(spec_of((1, 2, 16), (1, 2, 16), constants=constants), 2)
    teacher, student = (loaded(exported(each, tmp_path, name)) for each, name in ((dense, "dense"), (small, "small")))
    tokens = tokens_of(small.spec, rows=4)
    before = np.asarray(logits_of(student, tokens))

    def forward(model, input_tokens, input_mask):
        return logits_of(model, input_tokens)

    def labels(input_tokens, input_mask):
        return jax.nn.one_hot(input_tokens, small.spec.vocab)

    trainer = distillation_trainer.DistillationTrainer(
        student,
        teacher,
        strategies.LogitStrategy(forward, forward, labels, temperature=1.0, alpha=1.0),
        optax.adam(1e-2),
        distillation_trainer.TrainingConfig(
            eval_every_n_steps=100, max_steps=5, checkpoint_root_directory=str(tmp_path / "trained")
        ),
    )
    batch = distillation_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones_like(tokens))
    with jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp")):
        trainer.train([batch] * 5)
    trainer.close()

    def distance(logits) -> float:
        known = jax.nn.log_softmax(dense(tokens))
        return float((jnp.exp(known) * (known - jax.nn.log_softmax(logits))).sum(-1).mean())

    after = np.asarray(logits_of(student, tokens))
    assert distance(after) < 0.98 * distance(before)
    (tmp_path / "trained" / "config.json").write_bytes((tmp_path / "small" / "config.json").read_bytes())
    read = load_model(tmp_path / "trained")
    assert read.spec == small.spec
    assert off(read(tokens), after) < 1e-4
    assert off(before, after) > 1e-2
