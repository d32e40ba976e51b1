"""What a reference to a model stands for, and what is said about one that stands for nothing."""

import json

import numpy as np
import pytest

from saap_jax.runs.ab import find, loadable, recorded_losses
from saap_jax.runs.directory import RunDirectory
from tests.fake_runs import METRICS, fake_run


@pytest.fixture
def run(tmp_path):
    return fake_run(tmp_path / "run", seeds=(1, 0))


def test_a_candidate_all_seeds_and_the_unpruned_model(run):
    one = find(f"{run}:wanda, seed 1@0.2")
    assert one.seeds == (1,)
    assert recorded_losses(one)[METRICS[0]].shape == (1, 24)
    both = find(f"{run}:wanda@0.2")
    assert both.seeds == (0, 1), "by seed, whatever the order in the file"
    np.testing.assert_array_equal(recorded_losses(both)[METRICS[1]][1:], recorded_losses(one)[METRICS[1]])
    dense = find(f"{run}:dense")
    assert dense.seeds is None


def test_steps_with_commas_between_them_are_the_same_candidate(tmp_path):
    path = fake_run(tmp_path / "chains")
    run = RunDirectory(path, json.loads((path / "run.json").read_text()))
    (row,) = run.candidates()
    run.append({**row, "candidate": "wanda > uniform@0.2", "variant": "wanda > uniform"})
    assert find(f"{path}:wanda,uniform@0.2").candidate == "wanda > uniform@0.2"
    with pytest.raises(ValueError, match="did you mean 'wanda > uniform@0.2'"):
        find(f"{path}:wanda,global@0.2")


def test_a_place_alone_has_no_command(tmp_path):
    """As a candidate of `saap sensitivity`, which no `saap prune` makes."""
    path = fake_run(tmp_path / "places")
    run = RunDirectory(path, json.loads((path / "run.json").read_text()))
    (row,) = run.candidates()
    run.append({name: value for name, value in row.items() if name not in ("chain", "ratio_asked", "variant")})
    with pytest.raises(ValueError, match=r"why, but .* masks .*; name a model that was cut, as saap prune writes it"):
        loadable(find(f"{path}:wanda@0.2"), "why")


def test_a_candidate_that_left_a_race(tmp_path):
    path = fake_run(tmp_path / "raced")
    run = RunDirectory(path, json.loads((path / "run.json").read_text()))
    (row,) = run.candidates()
    del row["losses"]
    run.append({**row, "windows": 5})
    with pytest.raises(ValueError, match=r"left the race after 5 windows, .* of ppl@128 .*; run .* with --no-race"):
        recorded_losses(find(f"{path}:wanda@0.2"))


@pytest.mark.parametrize("text", ["smollm2-135m", "org/name", "models/pruned"])
def test_a_model_to_load(text):
    assert find(text).run is None
    assert loadable(find(text), "") == text


def test_a_run_below_a_directory_with_a_colon(tmp_path):
    run = fake_run(tmp_path / "a:b" / "run")
    assert find(f"{run}:dense").run == run


def test_what_stands_for_nothing(run, tmp_path):
    with pytest.raises(ValueError, match="is a run: expected RUN:CANDIDATE or RUN:dense, such as .*:wanda, seed 1@0.2"):
        find(str(run))
    with pytest.raises(ValueError, match="did you mean 'wanda@0.2'"):
        find(f"{run}:wnda@0.2")
    for name in ("wanda", "wanda@0.5"):
        with pytest.raises(ValueError, match="did you mean 'wanda@0.2'"):
            find(f"{run}:{name}")
    with pytest.raises(ValueError, match="expected one of the 4 models of .*run, such as"):
        find(f"{run}:x")
    with pytest.raises(ValueError, match="expected one of the 4 models of .*run, such as"):
        find(f"{run}:{' > '.join(99 * ['longer'])} than names of files@0.2")
    with pytest.raises(ValueError, match="found no run.json in .*none'; check the path"):
        find(f"{tmp_path}/none:wanda@0.2")


def test_what_of_a_run_can_be_loaded(run):
    assert loadable(find(f"{run}:dense"), "") == "tiny"
    (run / "best").mkdir()
    (run / "best" / "config.json").write_text("{}")
    assert loadable(find(f"{run}:wanda, seed 1@0.2"), "") == str(run / "best")
    said = r"why, but .* masks .*; cut it \(saap prune .*--method 'wanda > uniform' .* --out DIRECTORY\)"
    for name in ("wanda, seed 0@0.2", "wanda@0.2"):
        with pytest.raises(ValueError, match=said):
            loadable(find(f"{run}:{name}"), "why")
