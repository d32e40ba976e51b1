"""The house rules that can be read off the source: imports run one way, no configuration field is idle."""

import ast
import dataclasses
import re
import runpy
from pathlib import Path

import jax
import pytest

import saap_jax
from saap_jax import config as configuration
from saap_jax import config_plan, config_recover, config_traced, config_use, options, options_mesh
from saap_jax.llama import LayerWidths, LlamaSpec, abstract_llama

PACKAGE = Path(saap_jax.__file__).parent
PROJECT = PACKAGE.parent
ORDER = (
    ("interrupts", "steps"),
    ("json_files", "toml_files", "field_types"),
    ("types", "version"),
    ("terminal",),
    ("amounts", "checks"),
    ("options",),
    ("options_mesh",),
    ("config", "config_plan", "config_use", "config_recover", "config_traced"),
    ("processes",),
    ("locks",),
    ("watch",),
    ("constraints",),
    ("fetching",),
    ("sharding",),
    ("chat",),
    ("llama", "data"),
    ("digests",),
    ("discovery",),
    ("estimation",),
    ("fusion",),
    ("stability",),
    ("budget",),
    ("shapes",),
    ("search",),
    ("query_heads",),
    ("surgery",),
    ("corrections",),
    ("compensation",),
    ("recovery",),
    ("export",),
    ("evaluation",),
    ("report",),
    ("calibration",),
    ("kept",),
    ("variants", "query_stage"),
    ("pipeline", "generation", "benchmark"),
    ("keeps",),
    ("selection", "residual"),
    ("pruning",),
    ("sweep",),
    ("comparison",),
    ("recover",),
    ("fidelity",),
    ("frontier",),
    ("sensitivity",),
    ("references",),
    ("task_comparison",),
    ("quality",),
    ("failures", "progress"),
    ("arguments",),
    ("traced",),
    ("adapters",),
    ("pruned",),
    ("planning", "structures_command"),
    ("cli", "lm_eval"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
REMOTE = PACKAGE / "export" / "remote"
"""Code that travels with exported models: it imports its neighbour by a relative name, and nothing of saap_jax."""
CONFIGURATION = (
    "config.py",
    "config_plan.py",
    "config_recover.py",
    "config_traced.py",
    "config_use.py",
    "options.py",
    "options_mesh.py",
)
CONFIGS = sorted((PROJECT / "configs").glob("*.py"))
EXPERIMENTS = sorted((PROJECT / "experiments").rglob("*.py"))


def imports_of(source: str) -> set[str]:
    """Return the parts of saap_jax that a module imports; `saap_jax` itself for a name from the package's root."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [node.module or ""]
            if node.module == "saap_jax":
                names = [f"saap_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] if "." in name else name for name in names if name.split(".")[0] == "saap_jax"}
    return found


def upward(part: str, source: str) -> set[str]:
    """Return what a module of `part` imports although it stands later in the order (or at the root)."""
    return {name for name in imports_of(source) if LEVEL.get(name, 99) > LEVEL[part]}


@pytest.mark.parametrize("path", sorted(REMOTE.glob("*.py")), ids=lambda path: path.name)
def test_code_that_travels_stands_alone(path):
    assert "saap_jax" not in path.read_text()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {module.split(".")[0] for module in modules} <= {
        "typing",
        "torch",
        "transformers",
        "configuration_saap_llama",
    }


@pytest.mark.parametrize(
    "path",
    sorted(path for path in PACKAGE.rglob("*.py") if path.parent != REMOTE),
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if part != "__init__":
        assert part in LEVEL, f"name the place of {part} in the order"
        assert not upward(part, path.read_text())


def test_an_upward_import_is_found():
    assert upward("search", "from saap_jax.pipeline import compare") == {"pipeline"}
    assert upward("llama", "import saap_jax") == {"saap_jax"}
    assert not upward("search", "from saap_jax.config import SearchConfig")


def config_classes() -> list[type]:
    defined = (
        vars(options)
        | vars(configuration)
        | vars(config_recover)
        | vars(config_use)
        | vars(options_mesh)
        | vars(config_plan)
        | vars(config_traced)
    )
    return [value for value in defined.values() if isinstance(value, type) and dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("kind", config_classes(), ids=lambda kind: kind.__name__)
def test_every_field_is_read_somewhere(kind):
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name not in CONFIGURATION]
    for field in dataclasses.fields(kind):
        by_name = kind.__name__.endswith("PerStructure")  # read by the structure's name
        pattern = r"getattr\(config\.\w+, name\)" if by_name else rf"\.{field.name}\b"
        assert any(re.search(pattern, source) for source in sources), f"nobody reads {kind.__name__}.{field.name}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    assert runpy.run_path(str(path))["__doc__"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_builds(path):
    """Each file exports a valid CONFIG, says how it is run, and its model takes its batches (abstractly)."""
    exported = runpy.run_path(str(path))
    config = exported["CONFIG"]
    assert type(config) in config_classes()
    command = type(config).__name__.removesuffix("Config").lower()
    assert f"saap {command} configs/{path.name}" in exported["__doc__"]
    widths = LayerWidths(kv_heads=3, q_per_kv=3, mlp=1536)
    model = abstract_llama(LlamaSpec(vocab=49152, embed=576, head_dim=64, layers=(widths,) * 30, tied=True))
    rows = (
        (config.training.microbatch, config.data.length)
        if command == "recover"
        else (config.calibration.batch_size, config.calibration.length)
    )
    tokens = jax.ShapeDtypeStruct(rows, "int32")
    logits = jax.eval_shape(lambda model, tokens: model(tokens), model, tokens)
    assert logits.shape == (*tokens.shape, 49152)


def test_there_are_configs():
    assert PROJECT / "configs" / "quickstart.py" in CONFIGS


def test_the_lock_pins_everything_and_names_no_index():
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    further = (PROJECT / "requirements-eval.lock").read_text().splitlines()
    assert all(re.match(r"[A-Za-z0-9._-]+==\S+( ;.*)?$", line) for line in lines + further)
    assert not any("http" in line.partition("==")[2] for line in lines + further)
    everywhere = {line.partition("==")[0] for line in lines if ";" not in line}
    assert not everywhere & {line.partition("==")[0] for line in further}
    assert any(line.startswith("lm-eval==") for line in further)
    project = (PROJECT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)
    assert dependencies is not None
    wanted = set(re.findall(r'"([A-Za-z0-9_-]+)', dependencies[1]))
    pinned = {line.partition("==")[0].lower() for line in lines}
    assert {name.lower() for name in wanted} <= pinned
