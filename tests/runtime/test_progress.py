"""Bars of a session: what is wrapped comes out as it went in, and what is being done is said."""

import saap_jax
from saap_jax.runtime.progress import step


def test_bars_pass_on_what_they_show(capsys):
    assert list(saap_jax.bars("score", (each for each in "abc"), 3)) == ["a", "b", "c"]
    with step(saap_jax.bars, "load the model"):
        pass
    said = capsys.readouterr().err
    assert "score: 100%" in said
    assert "3/3" in said
    assert "load the model: 100%" in said
