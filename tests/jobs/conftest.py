"""Configurations of jobs on the tiny model and little text; a model that was cut and a comparison of two seeds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.jobs import compare
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.llama.segments import existing_units
from saap_jax.surgery.cut import cut


def tiny(kind: type, model: Path, runs: Path, *, examples: int = 3, windows: int = 4, **options: Any) -> Any:
    """Make the configuration of a job."""
    texts = {"evaluation": EvaluationConfig(windows=windows, length=16, batch_size=2)}
    fields = {field.name for field in dataclasses.fields(kind)}
    calibration = CalibrationConfig(examples=examples, length=16, batch_size=2)
    about = {"model": ModelConfig(name=str(model)), "calibration": calibration, "runs": str(runs)} | texts | options
    return kind(**{name: value for name, value in about.items() if name in fields or name in options})


@pytest.fixture(scope="session")
def pruned(tiny_model_directory, tmp_path_factory):
    """A pruned model: layers of different widths, one without attention."""
    model = load_model(tiny_model_directory)
    keep = existing_units(model.segments)
    keep["mlp"][:, ::2] = False
    keep["attention"][1] = False
    tokenizer = load_tokenizer(tiny_model_directory)
    return save_model(cut(model, keep), tmp_path_factory.mktemp("pruned") / "half", tokenizer=tokenizer, keep=keep)


@pytest.fixture(scope="session")
def compared(tiny_model_directory, tmp_path_factory):
    """The run directory of a real comparison, two seeds."""
    config = tiny(
        CompareConfig, tiny_model_directory, tmp_path_factory.mktemp("runs"), windows=5,
        methods=("magnitude", "random"), seeds=(0, 1), ratios=(0.5,), cut=True,
    )  # fmt: skip
    return compare.compare(config).path
