"""`saap discover module:factory` on a model that has never heard of this library; bad factories in one line."""

from xml.etree import ElementTree

import pytest
from matplotlib.patches import Rectangle

from saap_jax.cli.main import main
from saap_jax.report.couplings import coupling_figure
from saap_jax.report.figures import painted
from saap_jax.trace.listing import coupling_record
from saap_jax.trace.problem import traced_factory

MODULE = """
import jax, jax.numpy as jnp

def mlp():
    shapes = {"up": (8, 12), "bias": (12,), "down": (12, 3)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    def function(params, x):
        return jax.nn.relu(x @ params["up"] + params["bias"][None]) @ params["down"]
    return function, params, jax.ShapeDtypeStruct((2, 8), jnp.float32)

def layered():
    layers = [{"up": (5, 6), "down": (6, 5), "heads": (5, 8), "back": (8, 5)} for _ in range(3)]
    keys = iter(jax.random.split(jax.random.key(0), 100))
    draw = lambda shape: jax.random.normal(next(keys), shape)
    params = jax.tree.map(draw, {"layers": layers, "square": (5, 5)}, is_leaf=lambda x: isinstance(x, tuple))
    def function(params, x):
        for w in params["layers"]:
            x = x + jnp.einsum("bf,fd->bd", jnp.tanh(jnp.einsum("bd,df->bf", x, w["up"])), w["down"])
            h = jnp.einsum("bd,df->bf", x, w["heads"])
            x = x + jnp.einsum("bf,fd->bd", jnp.tanh(h * (h.shape[1] / 8)), w["back"])
        return jnp.einsum("bd,de->be", x, jnp.linalg.inv(params["square"]))
    return function, params, jnp.ones((2, 5))

def broken():
    raise RuntimeError("no weights here")

def strange():
    return 3

def ends():
    raise SystemExit("no data set")

def wrong():
    function, params, x = mlp()
    return function, params, jax.ShapeDtypeStruct((2, 9), jnp.float32)
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path / "mine.py"


def test_a_file(file, capsys):
    assert main(["discover", f"{file}:mlp", "--details"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for line in ("12 units", "up[1]", "bias[0]", "down[0]", "prunable", "1 prunable structure of 3, 12 units"):
        assert line in text


def test_a_module_of_the_current_directory(file, capsys, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert main(["discover", "mine:mlp"]) == 0
    assert "12 units" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tables(file, capsys):
    """Equal layers share a row; the own code is tried; what is pinned says why, a missing rule with its line."""
    assert main(["discover", f"{file}:layered"]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row}
    assert rows["layers/*/down[0]"] == ["channels", "6 in each of 3", "10", "takes it"]
    assert rows["layers/*/back[0]"] == ["channels", "8 in each of 3", "10", "gives other outputs"]
    assert rows["square[0]"][:1] == ["5"]
    assert main(["discover", f"{file}:layered"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "meets an operation without a rule (lu) at" in text
    assert "mine.py:" in text
    assert "layers/*/back[0]: the own code gives other outputs (by up to" in text
    assert "the function itself takes fewer units of 3 of them" in text
    assert main(["discover", f"{file}:mlp"]) == 0
    assert "takes the shapes" in capsys.readouterr().out  # nothing was computed


def test_a_drawing(file, capsys):
    out = file.parent / "couplings.svg"
    assert main(["discover", f"{file}:mlp", "--drawing", str(out)]) == 0
    drawing = out.read_text()
    ElementTree.fromstring(drawing)
    (axes,) = painted(coupling_figure(coupling_record(traced_factory(f"{file}:mlp")[0]))).axes
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
    assert "--drawing: expected a file in a directory that exists" in errors[0]
    assert ".svg" in errors[1]
    assert "--colour" in "".join(errors[2:])


def test_a_module_beside_the_file_is_found(tmp_path, capsys):
    """While the file runs, and when its factory is called."""
    (tmp_path / "beside_mine.py").write_text("import jax\nWIDTH = 5\n")
    (tmp_path / "beside_later.py").write_text("def run(p, x):\n  return jax.nn.relu(x @ p['a']) @ p['b']\nimport jax\n")
    (tmp_path / "two.py").write_text(
        "import jax.numpy as jnp\nfrom beside_mine import WIDTH\n"
        "def made():\n  from beside_later import run\n"
        "  return run, {'a': jnp.ones((3, WIDTH)), 'b': jnp.ones((WIDTH, 2))}, jnp.ones((1, 3))\n"
    )
    assert main(["discover", f"{tmp_path}/two.py:made"]) == 0
    assert "5" in capsys.readouterr().out
    (tmp_path / "three.py").write_text("import nowhere_to_be_found\n")
    assert main(["discover", f"{tmp_path}/three.py:made"]) == 2
    said = capsys.readouterr().err
    assert "No module named 'nowhere_to_be_found'" in said
    assert "check the module's name" not in said


def test_one_of_our_models(tiny_model_directory, tmp_path, capsys):
    out = tmp_path / "llama.svg"
    assert main(["discover", str(tiny_model_directory), "--drawing", str(out)]) == 0
    assert "segments/0/attention/query" in out.read_text()
    assert "coupled structures of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FILE:broken", "the factory failed: RuntimeError: no weights here"),
        ("FILE:ends", "the factory failed: SystemExit: no data set"),
        ("nowhere://bucket/model", "nowhere://bucket/model"),
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
