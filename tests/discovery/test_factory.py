"""`saap discover module:factory` on a model that has never heard of this library; bad factories in one line."""

from xml.etree import ElementTree

import pytest
from matplotlib.patches import Rectangle

from saap_jax.cli import main
from saap_jax.discovery.factory import traced_factory
from saap_jax.report.figures.couplings import coupling_plot, coupling_record
from saap_jax.report.figures.draw import painted

MODULE = """
import jax, jax.numpy as jnp

def mlp():
    shapes = {"up": (8, 12), "bias": (12,), "down": (12, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    def function(params, x):
        return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]
    return function, params, jax.ShapeDtypeStruct((2, 8), jnp.float32)

def broken():
    raise RuntimeError("no weights here")

def strange():
    return 3

def wrong():
    function, params, x = mlp()
    return function, params, jax.ShapeDtypeStruct((2, 9), jnp.float32)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path / "mine.py"


def test_a_file(file, capsys):
    assert main(["discover", f"{file}:mlp"]) == 0
    text = capsys.readouterr().out
    for line in ("12 units", "up[1]", "bias[0]", "down[0]", "prunable", "1 prunable structure of 3, 12 units"):
        assert line in text


def test_a_module_of_the_current_directory(file, capsys, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert main(["discover", "mine:mlp"]) == 0
    assert "12 units" in capsys.readouterr().out


def test_a_drawing(file, capsys):
    out = file.parent / "couplings.svg"
    assert main(["discover", f"{file}:mlp", "--drawing", str(out)]) == 0
    drawing = out.read_text()
    ElementTree.fromstring(drawing)
    (axes,) = painted(coupling_plot(coupling_record(traced_factory(f"{file}:mlp")))).axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(axes.get_lines()) == 3, "a dot a structure"
    assert len(boxes) == len(axes.patches) - len(boxes) == 5, "an axis of a parameter each, and a line to its structure"
    assert {text.get_text() for text in axes.texts} >= {"up", "down", "bias", "8", "12", "3"}
    assert "12 units, 12 parameters each" in drawing
    assert "prunable, one gate" in drawing
    assert main(["discover", f"{file}:mlp", f"--drawing={file.parent / 'none' / 'a.svg'}"]) == 2
    assert main(["discover", f"{file}:mlp", "--drawing", "a.png"]) == 2
    assert main(["discover", f"{file}:mlp", "--colour"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "expected a directory" in errors[0]
    assert ".svg" in errors[1]
    assert "--colour" in errors[2]


def test_one_of_our_models(tiny_model_directory, tmp_path, capsys):
    out = tmp_path / "llama.svg"
    assert main(["discover", str(tiny_model_directory), "--drawing", str(out)]) == 0
    assert "runs/0/attention/query" in out.read_text()
    assert "coupled structures of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FILE:broken", "the factory failed: RuntimeError: no weights here"),
        ("FILE:strange", "expected the factory to return (function, params, *inputs), got int"),
        ("FILE:wrong", "the function cannot be traced: TypeError"),
        ("FILE:missing", "expected a function 'missing'"),
        ("nowhere.py:mlp", "found none at nowhere.py"),
        ("no_such_module_at_all:mlp", "ModuleNotFoundError"),
    ],
)
def test_bad_factories(name, message, file, capsys):
    assert main(["discover", name.replace("FILE", str(file))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
