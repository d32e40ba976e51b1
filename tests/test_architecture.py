"""The house rules that can be read off the source: imports run one way, no configuration field is idle."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import pkgutil
import re
import runpy
from collections.abc import Collection, Iterable
from pathlib import Path

import jax
import pytest

import saap_jax
from saap_jax import config as configuration
from saap_jax.config.packaged import packaged
from saap_jax.llama import LayerWidths, LlamaSpec, abstract_llama
from saap_jax.planning.models import spec_of

PACKAGE = Path(saap_jax.__file__).parent
PROJECT = PACKAGE.parent
FOLDERS: dict[str, tuple[str, ...]] = {
    "version": (),
    "types": (),
    "runtime.errors": (),
    "config": ("types",),
    "recipes": ("config", "types"),
    "data": ("config", "types"),
    "runtime": ("config", "types"),
    "llama": ("runtime", "data", "config", "types"),
    "trace": ("llama", "runtime", "config", "types"),
    "structures": ("trace", "llama", "runtime", "config", "types"),
    "trace.listing": ("structures", "trace", "llama"),
    "trace.subject": ("trace", "trace.listing", "subjects.base", "evaluation", "steps", "surgery", "estimation",
                      "structures", "llama", "runtime", "config", "types"),
    "estimation": ("trace", "structures", "llama", "runtime", "config", "types"),
    "steps": ("subjects.base", "surgery", "estimation", "structures", "recipes", "runtime", "config", "types"),
    "surgery": ("estimation", "structures", "llama", "runtime", "config", "types"),
    "recovery": ("surgery", "estimation", "llama", "data", "runtime", "config", "types"),
    "export": ("llama", "runtime", "config", "types"),
    "evaluation": ("structures", "estimation", "surgery", "llama", "data", "runtime", "config", "types"),
    "planning": ("recovery", "evaluation", "estimation", "llama", "runtime", "config", "types"),
    "runs": ("subjects.base", "evaluation", "steps", "surgery", "estimation", "structures", "llama", "recipes",
             "data", "runtime", "config", "types"),
    "api": ("trace", "trace.listing", "trace.subject", "subjects", "subjects.base", "evaluation", "steps",
            "surgery", "estimation", "structures", "llama",
            "data", "runtime", "config", "types"),
    "report": ("trace", "trace.listing", "trace.subject", "runs", "steps", "evaluation", "structures",
               "estimation", "runtime", "config", "types"),
    "jobs": ("trace", "trace.listing", "trace.subject", "report", "subjects", "subjects.base", "api", "runs",
             "planning", "evaluation", "export", "recovery",
             "surgery", "steps", "estimation", "structures", "llama", "recipes", "data", "runtime", "config",
             "types"),
    "subjects.base": ("surgery", "estimation", "structures", "runtime", "config", "types"),
    "subjects": ("trace", "trace.listing", "trace.subject", "subjects.base", "evaluation", "steps",
                 "surgery", "estimation", "structures", "llama",
                 "data", "runtime", "config", "types"),
    "lm_eval": ("evaluation",),
    "cli": ("trace", "trace.listing", "trace.subject", "jobs", "report", "planning", "runs", "evaluation", "export",
            "steps", "estimation", "structures", "llama", "recipes", "data", "runtime", "config", "types",
            "version"),
    "__main__": ("cli", "runtime"),
    "__init__": ("trace", "trace.listing", "trace.subject", "jobs", "subjects", "runs", "api", "steps", "surgery",
                 "estimation", "structures", "llama", "data",
                 "config", "runtime", "version"),
}  # fmt: skip
"""Folder (or module at the root) -> those that it may import beside itself. Stages read the seam, `subjects.base`, and
what implements it stands above them."""
BOUNDARY = "runtime.errors"
"""What turns errors of libraries into one line about a file; it imports nothing of ours, and everybody uses it."""
RECORDS = "runs.records"
"""The types of what runs keep: it imports nothing of ours, and whoever computes from records may read it."""
NO_MODEL = ("config", "recipes", "report", "steps", "runs.directory", "runs.records", "runs.standing")  # fmt: skip
"""What sees no model, at most its widths (`llama.spec`)."""
NO_JAX = ("config", "recipes", "report", "version", "runs.directory", "runs.records", "runs.stages",
          "runs.standing", "runtime.errors", "runtime.files", "runtime.interrupts", "runtime.sources",
          "runtime.words")  # fmt: skip
"""What is read where no accelerator is: it imports jax within functions at most."""
REMOTE = PACKAGE / "export" / "remote"
"""Code that travels with exported models: it imports its neighbour by a relative name, and nothing of saap_jax."""
CONFIGS = packaged()
EXPERIMENTS = sorted((PROJECT / "experiments").rglob("*.py"))


def modules() -> dict[str, str]:
    """Return the source of every module of the package by its dotted name below `saap_jax`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for path in PACKAGE.rglob("*.py")
        if path.parent != REMOTE
    }


def imports_of(source: str, known: Collection[str]) -> set[str]:
    """Return the modules of saap_jax that a module imports, anywhere in it; names of a package stand for it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        ours = [name.removeprefix("saap_jax").removeprefix(".") for name in names if name.split(".")[0] == "saap_jax"]
        found |= {name if name in known else name.rpartition(".")[0] or "__init__" for name in ours}
    return found


def forbidden(module: str, imported: Iterable[str]) -> set[str]:
    """Return what a module imports although its folder may not."""
    folder = folder_of(module)
    allowed = {folder, *FOLDERS[folder]}
    return {name for name in imported if folder_of(name) not in allowed and name not in (RECORDS, BOUNDARY)}


def folder_of(module: str) -> str:
    """Return the entry of `FOLDERS` that a module belongs to."""
    parts = module.split(".")
    return next((name for end in (3, 2) if (name := ".".join(parts[:end])) in FOLDERS), parts[0])


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
        "copy",
    }


def test_imports_run_one_way():
    sources = modules()
    imported = {name: imports_of(source, sources) for name, source in sources.items()}
    assert {name.split(".")[0] for name in sources} <= FOLDERS.keys(), "name the folder in FOLDERS"
    assert not {name: wrong for name in sources if (wrong := forbidden(name, imported[name]))}
    assert not imported[RECORDS]
    models = [name for name in sources if name.startswith(NO_MODEL)]
    assert not {
        name: seen for name in models if (seen := {m for m in imported[name] if m.startswith("llama")} - {"llama.spec"})
    }
    graphlib.TopologicalSorter({name: wanted - {name} for name, wanted in imported.items()}).prepare()


def test_records_and_reports_import_no_jax():
    named = {name: source for name, source in modules().items() if name.startswith(NO_JAX)}
    assert len(named) > 30
    assert not {name: found for name, source in named.items() if (found := libraries_of(source) & {"jax", "flax"})}
    assert libraries_of("from jax import numpy\nimport flax.nnx\ndef f():\n    import optax") == {"jax", "flax"}


def libraries_of(source: str) -> set[str]:
    """Return the libraries that a module imports when it is imported."""
    nodes = ast.parse(source).body
    found = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    found += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in found}


def test_folders_run_one_way():
    graphlib.TopologicalSorter(FOLDERS).prepare()


def test_a_forbidden_import_and_a_circle_are_found():
    known = ("__init__", "jobs.compare", "llama", "llama.model", "steps.run", "config")
    assert imports_of("from saap_jax.jobs.compare import compare", known) == {"jobs.compare"}
    assert imports_of("def f():\n    from saap_jax.jobs import compare", known) == {"jobs.compare"}
    assert imports_of("from saap_jax.llama import Llama\nimport saap_jax", known) == {"llama", "__init__"}
    assert forbidden("steps.run", {"jobs.compare", "config.method", "steps.base"}) == {"jobs.compare"}
    assert forbidden("steps.run", {"subjects.base", "subjects.llama"}) == {"subjects.llama"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"llama.a": {"llama.b"}, "llama.b": {"llama.a"}}).prepare()


def config_classes() -> list[type]:
    names = [each.name for each in pkgutil.iter_modules(configuration.__path__, f"{configuration.__name__}.")]
    defined = [value for name in names for value in vars(importlib.import_module(name)).values()]
    found = dict.fromkeys(value for value in defined if isinstance(value, type) and dataclasses.is_dataclass(value))
    return found


def names_read(source: str) -> set[str]:
    """Return the attributes that a module reads, and its texts: a field may be read by its name, or from a record.

    What a class checks of itself, in `__post_init__` or by `BESIDE`, is not used yet.
    """
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        own = [node.name] if isinstance(node, ast.FunctionDef) else map(ast.unparse, getattr(node, "targets", ()))
        if {"__post_init__", "BESIDE"} & {*own}:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        nodes += ast.iter_child_nodes(node)
    return found


def test_every_field_of_a_configuration_is_read():
    read = set().union(*map(names_read, modules().values()))
    fields = {(kind.__name__, field) for kind in config_classes() for field in inspect.get_annotations(kind)}
    assert not {(kind, field) for kind, field in fields if field not in read}
    checked = "class C:\n    idle: int\n    def __post_init__(self):\n        check(self.idle)\n"
    assert "idle" not in names_read(checked), "control"
    assert "idle" in names_read(checked + "def f(c):\n    return c.idle")


def too_much(source: str) -> list[str]:
    """List functions of more than seven parameters or 60 lines, and checks of records of more than 15 lines."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        each.name
        for each in functions
        if len({arg.arg for arg in each.args.posonlyargs + each.args.args + each.args.kwonlyargs} - {"self", "cls"}) > 7
        or (each.end_lineno or 0) - each.lineno >= (15 if each.name == "__post_init__" else 60)
    ]


def test_functions_are_small():
    assert not {name: found for name, source in modules().items() if (found := too_much(source))}
    assert too_much("def f(a, b, c, d, *, e, f, g, h): ...") == ["f"], "control"
    assert too_much("def f():" + "\n    pass" * 60) == ["f"] != too_much("def f():" + "\n    pass" * 59)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    assert runpy.run_path(str(path))["__doc__"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name):
    """Each file exports a valid CONFIG, says how it is run, and its model takes its batches (abstractly)."""
    exported = runpy.run_path(str(CONFIGS[name]))
    config = exported["CONFIG"]
    assert type(config) in config_classes()
    command = type(config).__name__.removesuffix("Config").lower()
    assert f"saap {command} {name}\n" in exported["__doc__"]
    widths = LayerWidths(kv_heads=3, q_per_kv=3, mlp=1536)
    spec = LlamaSpec(vocab=49152, embed=576, head_dim=64, layers=(widths,) * 30, tied=True)
    model = abstract_llama(spec_of(exported["PLANNED"]) if "PLANNED" in exported else spec)
    rows = (
        (config.training.microbatch, config.data.length)
        if command == "recover"
        else (config.calibration.batch_size, config.calibration.length)
    )
    tokens = jax.ShapeDtypeStruct(rows, "int32")
    logits = jax.eval_shape(lambda model, tokens: model(tokens), model, tokens)
    assert logits.shape == (*tokens.shape, model.spec.vocab)


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
