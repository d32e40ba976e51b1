"""`saap bench`: what is measured is what generation runs; of the size of times no test can say anything."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from saap_jax.cli import main
from saap_jax.evaluation.cost import step_bytes
from saap_jax.evaluation.timing import Times, Workload, compile_programs, speed_up, time_in_turns, time_once
from saap_jax.llama.decoder import single_layers
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.llama.generate import Sampling, generate, padded, settings_of, stops_of
from saap_jax.llama.segments import existing_units
from saap_jax.structures.discovery import weight_bytes
from saap_jax.surgery.cut import cut
from tests.helpers import dense_model, random_keep

WORKLOAD = Workload(batch=2, prompt=5, new=7)


@pytest.fixture(scope="module")
def models():
    model = dense_model()
    return single_layers(model), single_layers(cut(model, random_keep(existing_units(model.segments), 0.5)))


@pytest.fixture(scope="module")
def programs(models):
    return [compile_programs(model, WORKLOAD) for model in models]


def test_the_timed_programs_generate(programs):
    """They make the tokens that `generate` returns."""
    mine = programs[0]
    settings, stops, inputs = settings_of(Sampling()), stops_of(()), padded(mine.prompts, WORKLOAD.batch)
    token, state = mine.prefill(mine.model, inputs, mine.keys, settings, stops)
    tokens, _ = mine.decode(mine.model, state, settings, stops, jnp.int32(6))
    made = np.concatenate([np.asarray(token)[:, None], np.asarray(tokens)[:, :6]], axis=1).tolist()
    assert made == generate(mine.model, mine.prompts, max_new_tokens=7, sampling=Sampling(stop_tokens=()))


def test_times_are_numbers(programs):
    times = time_in_turns(programs, 2)
    assert [len(each) for each in times] == [2, 2]
    for each in (*times[0], *times[1]):
        assert all(np.isfinite(seconds) and seconds > 0 for seconds in each)
        assert each.first_token >= each.prefill
    assert np.isnan(time_once(compile_programs(programs[0].model, WORKLOAD._replace(new=1))).step)


def test_memory_is_weights_cache_and_temporaries(programs):
    dense, pruned = programs
    assert dense.memory_bytes > weight_bytes(dense.model) + 2 * 2 * 2 * 2 * 32 * 4 * 4
    assert pruned.memory_bytes < dense.memory_bytes


def test_speed_ups_are_ratios_of_the_same_round(programs):
    dense, pruned = programs
    slow = [Times(4.0, 4.0, 2.0), Times(8.0, 8.0, 4.0), Times(4.0, 4.0, 2.0)]
    fast = [Times(2.0, 2.0, 0.5), Times(4.0, 4.0, 1.0), Times(1.0, 1.0, 1.0)]
    found = speed_up(pruned, fast, dense, slow)
    assert found.measured_prefill == (2.0, 2.0, 4.0)
    assert found.measured_step == (4.0, 2.0, 4.0)
    assert found.step == step_bytes(dense.model, 2, 8.5) / step_bytes(pruned.model, 2, 8.5) > 1
    assert found.prefill > 1
    same = speed_up(dense, slow, dense, slow)
    assert (same.prefill, same.step, same.measured_step.median) == (1, 1, 1)


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned_directory(tiny_model_directory, tmp_path_factory):
    model = load_model(tiny_model_directory)
    keep = existing_units(model.segments)
    keep["mlp"][0, :12] = False
    keep["attention"][1] = False
    return save_model(cut(model, keep), tmp_path_factory.mktemp("pruned") / "cut", keep=keep)


FEW = ["--prompt-lengths", "6", "20", "--new-tokens", "4", "--repeats", "2"]


@pytest.mark.slow
def test_command(capsys, tmp_path, tiny_model_directory, pruned_directory):
    names, out = [str(tiny_model_directory), str(pruned_directory)], tmp_path / "bench.json"
    assert main.main(["bench", names[1], "--baseline", names[0], *FEW, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "batch 1, 6 prompt tokens, 4 new ones" in text
    assert "batch 1, 20 prompt tokens, 4 new ones" in text
    result = json.loads(out.read_text())
    assert [row["model"] for row in result["models"]] == names
    assert [(row["model"], row["prompt"], row["padded"]) for row in result["workloads"]] == [
        (names[0], 6, 16),
        (names[1], 6, 16),
        (names[0], 20, 32),
        (names[1], 20, 32),
    ]
    dense, pruned = result["models"]
    assert dense["parameters"] - pruned["parameters"] == (dense["weight_bytes"] - pruned["weight_bytes"]) / 4
    removed = 12 * 3 * 16 + 2 * (2 + 2 + 1 + 1) * 4 * 16
    assert dense["macs_per_token"] - pruned["macs_per_token"] == removed
    for row in result["workloads"]:
        assert row["tokens_per_second"]["low"] <= row["tokens_per_second"]["median"] <= row["tokens_per_second"]["high"]
        assert row["prefill_speed_up"]["predicted"] == (1 if row["model"] == names[0] else pytest.approx(1.4, abs=0.39))
    assert result["devices"]["platform"] == "cpu"
