"""Every command that takes a length of rows refuses one that the model has no positions for, by the option's name."""

import pytest

from saap_jax.cli import main

COMMANDS = {
    "compare": ("--model.name", "MODEL", "--calibration.length"),
    "compare, evaluation": ("--model.name", "MODEL", "--evaluation.length"),
    "score": ("--model.name", "MODEL", "--calibration.length"),
    "prune": ("--model.name", "MODEL", "--out", "cut", "--ratio", "0.2", "--calibration.length"),
    "fidelity": ("--model.name", "MODEL", "--calibration.length"),
    "frontier": ("--model.name", "MODEL", "--evaluation.length"),
    "sensitivity": ("--model.name", "MODEL", "--evaluation.length"),
    "recover": ("MODEL", "--data.length"),
    "recover, evaluation": ("MODEL", "--evaluation.length"),
    "evaluate": ("MODEL", "--length"),
    "ab": ("MODEL", "MODEL/", "--length"),
    "bench": ("MODEL", "--baseline", "MODEL", "--prompt-lengths"),
    "generate": ("MODEL", "text", "--new-tokens"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_rows_longer_than_the_positions(name, tiny_model_directory, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("MODEL", str(tiny_model_directory)) for word in COMMANDS[name]]
    assert main.main([name.partition(",")[0], *words, "2049"]) == 2
    error = capfd.readouterr().err
    assert "2,048 tokens, the positions of the model" in error or "more than the model's 2048 positions" in error
    assert name in ("bench", "generate") or words[-1].removeprefix("--") in error
    assert not any((tmp_path / "runs").rglob("run.json"))
