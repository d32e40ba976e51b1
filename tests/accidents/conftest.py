"""The files that commands read: written once a session, mostly by the commands themselves."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from saap_jax.cli.main import main

WINDOWS = ["--calibration.examples", "4", "--calibration.length", "8", "--calibration.batch-size", "2"]
SCORED = ["--model.name", "tiny", *WINDOWS, "--calibration.scenarios", "text:other.txt"]
JUDGED = [
    *("--evaluation.windows", "3", "--evaluation.length", "8", "--evaluation.batch-size", "2"),
    *("--evaluation.in-domain", "text:text.txt", "--evaluation.out-of-domain", "jsonl:lines.jsonl#text"),
]
RUNS = (
    ["compare", "wanda", "magnitude", *SCORED, *JUDGED, "--ratios", "0.3", "--cut", "--name", "c"],
    ["score", *SCORED, "--estimators", "wanda", "gate_taylor", "--name", "s"],
    ["fidelity", *SCORED, "--estimators", "wanda", "--channels-per-layer", "1", "--resamples", "20", "--name", "f"],
)
CONFIG = """from saap_jax.config import ScoreConfig
from saap_jax.config.method import ModelConfig

CONFIG = ScoreConfig(name="mine", model=ModelConfig(name="tiny"), from_run="runs/s")
"""
TRACED = """import jax.numpy as jnp
import saap_jax


def problem():
    params = {"up": jnp.linspace(-1, 1, 48).reshape(6, 8), "down": jnp.linspace(1, 2, 16).reshape(8, 2)}
    example = jnp.linspace(0, 1, 24).reshape(4, 6), jnp.zeros((4, 2))
    return saap_jax.Problem(
        function=lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"], params=params,
        loss=lambda found, wanted: jnp.square(found - wanted).mean(), calibration=example, held_out=example,
    )


def cut():
    from saap_jax.trace.subject.saved import load_pruned

    function, params = load_pruned("small", problem())
    return function, params, problem().calibration[0]
"""


@pytest.fixture(scope="session")
def files(tiny_model_directory, tmp_path_factory) -> Path:
    """A directory of models, texts, tasks, limits and a CONFIG."""
    place = tmp_path_factory.mktemp("accidents")
    for name in ("tiny", "sharded"):
        shutil.copytree(tiny_model_directory, place / name)
    tensors = load_file(place / "sharded/model.safetensors")
    (place / "sharded/model.safetensors").unlink()
    names = {f"model-0000{part}-of-00002.safetensors": sorted(tensors)[part - 1 :: 2] for part in (1, 2)}
    for file, held in names.items():
        save_file({name: tensors[name] for name in held}, place / "sharded" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in names.items() for name in held}}
    (place / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    text = "the cat sat on the mat and the dog sat on the log. "
    (place / "text.txt").write_text(text * 20)
    (place / "other.txt").write_text("and then the red cat ran to one big dog with hats. " * 20)
    tasks = [{"context": text, "choices": ["the cat", "a dog", "one mat"], "gold": gold % 3} for gold in range(4)]
    for file, lines in (("lines", [{"text": text}] * 20), ("tasks", tasks)):
        (place / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "limits.toml").write_text('max_ppl_increase = "500%"\nmax_size = "100%"\n')
    (place / "mine.py").write_text(CONFIG)
    (place / "traced.py").write_text(TRACED)
    with contextlib.chdir(place):
        assert main(["export", "tiny", "tiny.gguf", "--format", "gguf"]) == 0
    return place


@pytest.fixture(scope="session")
def made(files, tmp_path_factory) -> Path:
    """The same with runs and a pruned traced model."""
    place = tmp_path_factory.mktemp("made") / "place"
    shutil.copytree(files, place)
    with contextlib.chdir(place):
        for words in RUNS:
            assert main(words) == 0
        assert main(["prune", "traced.py:problem", "--ratio", "0.3", "--method", "magnitude", "--out", "small"]) == 0
    return place
