"""Which fields of configurations the package reads: types of expressions, as far as annotations tell them.

A name `windows` that something else has is no read of `EvaluationConfig.windows`: only an attribute of an expression
whose type is that configuration counts. Types come from annotations of arguments, fields and results, and follow
assignments, loops and `dataclasses.replace`.
"""

import ast
import dataclasses
import re
from collections.abc import Iterable, Mapping

Reads = set[tuple[str, str]]
"""(class, field)."""

BY_NAME = ("TargetsConfig",)
"""Ends of the names of classes whose fields are read by names that are known when the program runs only."""


def reads_of(sources: Iterable[str], classes: Mapping[str, type]) -> Reads:
    """Return the fields of configuration classes that some sources read."""
    trees = [ast.parse(source) for source in sources]
    known = Known(trees, classes)
    reads: Reads = set()
    for tree in trees:
        for node in tree.body:
            visit(node, {}, known, reads)
    return reads


class Known:
    """What annotations say: fields of classes, and what functions return, by name."""

    def __init__(self, trees: Iterable[ast.Module], classes: Mapping[str, type]):
        self.fields: dict[str, dict[str, str]] = {}
        self.configs, self.returns = set(classes), {}
        self.unions: dict[str, list[str]] = {}
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    own = self.fields.setdefault(node.name, {})
                    for base in node.bases:
                        own |= self.fields.get(ast.unparse(base), {})
                    for item in node.body:
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                            own[item.target.id] = ast.unparse(item.annotation)
                        if isinstance(item, ast.FunctionDef):
                            if item.returns is not None and any(
                                "property" in ast.unparse(d) for d in item.decorator_list
                            ):
                                own[item.name] = ast.unparse(item.returns)
                            if item.name == "__init__":
                                own |= self._of_init(item)
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                    self.unions[ast.unparse(node.targets[0])] = ast.unparse(node.value).split(" | ")
                if isinstance(node, ast.FunctionDef) and node.returns is not None:
                    self.returns[node.name] = ast.unparse(node.returns)
        for name, kind in classes.items():
            self.fields.setdefault(name, {}).update(
                {field.name: str(getattr(field.type, "__name__", field.type)) for field in dataclasses.fields(kind)}
            )

    @staticmethod
    def _of_init(init: ast.FunctionDef) -> dict[str, str]:
        types = {arg.arg: ast.unparse(arg.annotation) for arg in init.args.args if arg.annotation}
        found = {}
        for node in ast.walk(init):
            if isinstance(node, ast.Assign):
                pairs = [(target, node.value) for target in node.targets]
                if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
                for target, value in pairs:
                    if isinstance(target, ast.Attribute) and isinstance(value, ast.Name) and value.id in types:
                        found[target.attr] = types[value.id]
        return found

    def classes(self, annotation: str | None) -> list[str]:
        """Return the classes that an annotation names, without modules and quotes."""
        names = [part.strip(" '\"").split(".")[-1] for part in (annotation or "").split("|")]
        return [name for each in names for name in self.unions.get(each, [each]) if name in self.fields]

    def element(self, annotation: str | None) -> str | None:
        """Return what the elements of a container are; of a mapping, its values."""
        inner = re.search(r"(\w+)\[(.*)\]", annotation or "")
        return inner[2].split(",")[-1 if inner[1] in ("Mapping", "dict") else 0] if inner else None


def type_of(node: ast.AST, env: dict[str, str], known: Known, reads: Reads) -> str | None:
    """Return the annotation of an expression's value; record what it reads."""
    match node:
        case ast.Name():
            return env.get(node.id)
        case ast.Attribute():
            owners = [
                each
                for each in known.classes(type_of(node.value, env, known, reads))
                if node.attr in known.fields[each]
            ]
            reads |= {(owner, node.attr) for owner in owners if owner in known.configs}
            return known.fields[owners[0]][node.attr] if owners else None
        case ast.Call():
            name = ast.unparse(node.func)
            values = [type_of(each, env, known, reads) for each in [*node.args, *(k.value for k in node.keywords)]]
            if name in ("dataclasses.replace", "replace") and values:
                return values[0]
            if name == "getattr" and not isinstance(node.args[1], ast.Constant):  # any of them
                owners = {owner for owner in known.classes(values[0]) if owner.endswith(BY_NAME)}
                reads |= {(owner, field) for owner in owners for field in known.fields[owner]}
            made = [each.func if isinstance(each, ast.Call) else each for each in node.args]
            of_class = next((a.id for a in made if isinstance(a, ast.Name) and a.id in known.configs), None)
            if of_class and name not in known.fields:  # such as `configure("report", ReportConfig, words)`
                return f"tuple[{of_class}]"
            type_of(node.func, env, known, reads)
            last = name.split(".")[-1]
            return last if last in known.fields else known.returns.get(last)
        case ast.IfExp():
            type_of(node.test, env, known, reads)
            both = [type_of(node.body, env, known, reads), type_of(node.orelse, env, known, reads)]
            return next(filter(None, both), None)
        case ast.BoolOp():
            found = [type_of(each, env, known, reads) for each in node.values]
            return next(filter(None, found), None)
        case ast.GeneratorExp() | ast.ListComp() | ast.SetComp() | ast.DictComp():
            inner = dict(env)
            for part in node.generators:
                bind(part.target, known.element(type_of(part.iter, inner, known, reads)), inner)
                for test in part.ifs:
                    type_of(test, inner, known, reads)
            parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            found = [type_of(part, inner, known, reads) for part in parts]
            return f"list[{found[-1]}]" if found[-1] else None
        case ast.Lambda():
            return type_of(node.body, dict(env), known, reads)
        case ast.List() | ast.Tuple() | ast.Set():
            found = [type_of(each, env, known, reads) for each in node.elts]
            return f"list[{found[0]}]" if found and found[0] else None
        case ast.Subscript():
            type_of(node.slice, env, known, reads)
            return known.element(type_of(node.value, env, known, reads))
        case ast.NamedExpr():
            env[node.target.id] = type_of(node.value, env, known, reads) or ""
            return env[node.target.id]
        case _:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr | ast.keyword | ast.comprehension | ast.FormattedValue):
                    type_of(child.value if isinstance(child, ast.keyword) else child, env, known, reads)
            return None


def bind(target: ast.AST, annotation: str | None, env: dict[str, str]) -> None:
    """Give a loop variable or an assigned name its type."""
    if isinstance(target, ast.Name):
        env[target.id] = annotation or ""
    elif isinstance(target, ast.Tuple):
        for each in target.elts:  # of pairs (key, value) the value, of (configuration, …) the configuration
            bind(each, annotation, env)


def visit(node: ast.AST, env: dict[str, str], known: Known, reads: Reads, owner: str = "") -> None:
    """Walk a statement with the types of the names that it sees."""
    match node:
        case ast.ClassDef():
            for item in node.body:
                visit(item, dict(env), known, reads, node.name)
        case ast.FunctionDef():
            inner = dict(env)
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for number, argument in enumerate(arguments):
                inner[argument.arg] = ast.unparse(argument.annotation) if argument.annotation else ""
                if owner and number == 0 and argument.arg == "self":
                    inner["self"] = owner
            if owner in known.configs and node.name == "__post_init__":
                return  # a configuration that checks itself has not used the value yet
            for item in node.body:
                visit(item, inner, known, reads)
        case ast.Assign():
            annotation = type_of(node.value, env, known, reads)
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for each, value in zip(target.elts, node.value.elts, strict=False):
                        bind(each, type_of(value, env, known, reads), env)
                else:
                    bind(target, known.element(annotation) if isinstance(target, ast.Tuple) else annotation, env)
        case ast.AnnAssign():
            if node.value is not None:
                type_of(node.value, env, known, reads)
            bind(node.target, ast.unparse(node.annotation), env)
        case ast.For():
            bind(node.target, known.element(type_of(node.iter, env, known, reads)), env)
            for item in [*node.body, *node.orelse]:
                visit(item, env, known, reads)
        case _:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt | ast.match_case | ast.ExceptHandler | ast.withitem):
                    visit(child, env, known, reads)
                elif isinstance(child, ast.expr):
                    type_of(child, env, known, reads)
