"""The house rules that can be read off the source: imports run one way, no configuration field is idle."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import pkgutil
import re
import runpy
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import jax
import pytest

import saap_jax
from saap_jax import config as configuration
from saap_jax.config.packaged import packaged
from saap_jax.llama.model import abstract_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.planning.models import spec_of

PACKAGE = Path(saap_jax.__file__).parent
PROJECT = PACKAGE.parent
GROUND = ("version", "types", "syntax", "errors", "checks", "extras", "records", "wings")
"""What everybody may import: it imports nothing of ours but what stands before it here."""
CORE: dict[str, tuple[str, ...]] = {
    "config": (),
    "recipes": ("config",),
    "data": ("config", "runtime"),
    "runtime": ("config",),
    "llama": ("data", "runtime", "config"),
    "structures": ("llama",),
    "estimation": ("structures", "llama", "runtime", "config"),
    "surgery": ("estimation", "structures", "llama", "runtime", "config"),
    "evaluation": ("surgery", "estimation", "structures", "llama", "data", "runtime", "config"),
    "subjects.base": ("surgery", "estimation", "structures", "runtime", "config"),
    "steps": ("subjects.base", "surgery", "estimation", "structures", "recipes", "runtime", "config"),
    "subjects": ("subjects.base", "evaluation", "surgery", "estimation", "structures", "llama", "data", "runtime",
                 "config"),
    "api": ("subjects", "subjects.base", "steps", "evaluation", "surgery", "estimation", "llama", "data", "runtime"),
    "runs": ("subjects.base", "steps", "evaluation", "surgery", "estimation", "structures", "llama", "recipes", "data",
             "runtime", "config"),
    "report": ("runs", "steps", "evaluation", "structures", "estimation", "runtime", "config"),
    "jobs": ("report", "runs", "api", "subjects", "subjects.base", "steps", "evaluation", "surgery", "estimation",
             "structures", "llama", "recipes", "data", "runtime", "config"),
    "configs": ("estimation", "recipes", "config"),
    "lm_eval": ("evaluation",),
    "cli": ("jobs", "runs", "report", "steps", "estimation", "recipes", "runtime", "config"),
    "__main__": ("cli", "runtime"),
}  # fmt: skip
"""Folder (or module at the root) -> those that it may import beside itself and the ground. Steps know the seam,
`subjects.base`, and what implements it stands above them."""
WINGS: dict[str, tuple[str, ...]] = {"trace": (), "recovery": (), "export": (), "planning": ("recovery",)}
"""Wing -> other wings that it may import beside the core."""
CONTRIB = "contrib"
"""It may import all of the above, and nothing imports it."""
NO_MODEL = ("config", "recipes", "report", "steps", "runs.directory", "records", "runs.standing")
"""What sees no model, at most its widths (`llama.spec`)."""
NO_JAX = (
    *("config", "recipes", "report", "version", "syntax", "errors", "checks", "extras", "records", "wings"),
    *("runs.directory", "runs.stages", "runs.standing"),
    *("runtime.files", "runtime.interrupts", "runtime.sources", "runtime.words"),
)
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


def imports_of(source: str, known: Collection[str], top: bool = False) -> set[str]:
    """Return the modules of saap_jax that a module imports, anywhere or at its top; names of a package stand for it."""
    found = set()
    tree = ast.parse(source)
    for node in tree.body if top else ast.walk(tree):
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


def allowed(folder: str) -> set[str]:
    """Return what a folder may import: itself, the ground, and what its table says."""
    if folder in GROUND:
        return {*GROUND[: GROUND.index(folder) + 1]}
    if folder in CORE:
        return {folder, *GROUND, *CORE[folder]}
    below = {*GROUND, *CORE, *([CONTRIB, *WINGS] if folder == CONTRIB else [folder, *WINGS[folder]])}
    return below - {"cli", "__main__"}


def forbidden(module: str, imported: Iterable[str]) -> set[str]:
    """Return what a module imports although its folder may not."""
    may = allowed(folder_of(module))
    return {name for name in imported if folder_of(name) not in may}


def folder_of(module: str) -> str:
    """Return the folder (or module at the root) that a module belongs to."""
    two = ".".join(module.split(".")[:2])
    return two if two in CORE else module.split(".")[0]


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
    imported = {name: imports_of(source, sources) for name, source in sources.items() if name != "__init__"}
    assert {folder_of(name) for name in imported} <= {*GROUND, *CORE, *WINGS, CONTRIB}, "name the folder in the tables"
    assert not {name: wrong for name in imported if (wrong := forbidden(name, imported[name]))}
    models = [name for name in imported if name.startswith(NO_MODEL)]
    assert not {
        name: seen for name in models if (seen := {m for m in imported[name] if m.startswith("llama")} - {"llama.spec"})
    }
    graphlib.TopologicalSorter({name: wanted - {name} for name, wanted in imported.items()}).prepare()


def closure(module: str, imported: Mapping[str, set[str]]) -> set[str]:
    """Return all that an import of a module brings in, packages on the way included."""
    found: set[str] = set()
    left = [module]
    while left:
        name = left.pop()
        if name in found or name not in imported:
            continue
        found.add(name)
        parents = [name.rpartition(".")[0]] if "." in name else []
        left += [*imported[name], *parents]
    return found


@pytest.mark.parametrize(("module", "most"), [("api", 16_500), ("jobs.compare", 22_000), ("estimation.gates", 4_000)])
def test_core_stands_alone(module, most):
    """What an import of the core's show-pieces needs: no wing, and not more lines than can be read."""
    sources = modules()
    imported = {name: imports_of(source, sources, top=True) for name, source in sources.items()}
    needed = closure(module, imported)
    assert not [name for name in needed if name.split(".")[0] in {*WINGS, CONTRIB}]
    assert sum(len(sources[name].splitlines()) for name in needed) <= most
    assert "trace.trace" in closure("trace.subject.subject", imported), "control"


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
    graphlib.TopologicalSorter(CORE).prepare()


def test_a_forbidden_import_and_a_circle_are_found():
    known = ("__init__", "jobs.compare", "llama", "llama.model", "steps.run", "config")
    assert imports_of("from saap_jax.jobs.compare import compare", known) == {"jobs.compare"}
    assert imports_of("def f():\n    from saap_jax.jobs import compare", known) == {"jobs.compare"}
    assert imports_of("from saap_jax.llama import Llama\nimport saap_jax", known) == {"llama", "__init__"}
    assert forbidden("steps.run", {"jobs.compare", "config.method", "steps.base"}) == {"jobs.compare"}
    assert forbidden("steps.run", {"subjects.base", "subjects.llama", "trace.trace"}) == {
        "subjects.llama",
        "trace.trace",
    }
    assert forbidden("errors", {"types", "checks"}) == {"checks"}
    assert forbidden("export.hf", {"llama.model", "trace.trace", "contrib.suggestions"}) == {
        "trace.trace",
        "contrib.suggestions",
    }
    assert not forbidden("contrib.suggestions", {"trace.trace", "jobs.compare"})
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
    """List functions of more than seven parameters or 80 lines, and checks of records of more than 15 lines."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        each.name
        for each in functions
        if len({arg.arg for arg in each.args.posonlyargs + each.args.args + each.args.kwonlyargs} - {"self", "cls"}) > 7
        or (each.end_lineno or 0) - each.lineno >= (15 if each.name == "__post_init__" else 80)
    ]


def test_functions_are_small():
    assert not {name: found for name, source in modules().items() if (found := too_much(source))}
    assert too_much("def f(a, b, c, d, *, e, f, g, h): ...") == ["f"], "control"
    assert too_much("def f():" + "\n    pass" * 80) == ["f"] != too_much("def f():" + "\n    pass" * 79)


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
    lines = (PROJECT / "requirements/base.lock").read_text().splitlines()
    further = (PROJECT / "requirements/eval.lock").read_text().splitlines()
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
