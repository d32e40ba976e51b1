"""The types of what runs keep, and their check: an example with every field, and each field of it harmed.

What real jobs write is held against the types in every test that runs one, see `declared_records` of the root.
"""

import ast
import copy
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest

import saap_jax
from saap_jax.runs import origin, records
from saap_jax.runs.directory import RunDirectory
from saap_jax.runs.reading import contradiction_of, read_correlations, read_rows, read_run
from saap_jax.runs.records import Correlation, Row, RunRecord, fault_of
from saap_jax.runs.standing import Variant
from tests.fake_runs import fake_run
from tests.records import check_declared

PROBES = (None, True, 3, 1.5, "text", [], {})
SCALARS: dict[Any, tuple[type, ...]] = {
    float: (int, float), int: (int,), str: (str,), bool: (bool,), types.NoneType: (types.NoneType,),
}  # fmt: skip
EXAMPLES = {float: 0.5, int: 2, str: "a", bool: False, types.NoneType: None}


def options(kind: Any) -> tuple[Any, ...]:
    """Return what a type may be."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def example(kind: Any) -> Any:
    """Return a value of a type, with all fields; of several types the last, which is the one with the most fields."""
    kind = max(options(kind), key=lambda option: (is_typeddict(option), get_origin(option) is not None))
    if is_typeddict(kind):
        return {name: example(field) for name, field in get_type_hints(kind).items()}
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (list, tuple, dict, Literal):
        return {
            list: lambda: [example(inner[0])],
            tuple: lambda: [example(item) for item in inner],
            dict: lambda: {"x": example(inner[1])},
            Literal: lambda: inner[-1],
        }[origin]()
    return EXAMPLES.get(kind, "any")


def places(value: Any, kind: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any, bool]]:
    """Yield path and type of each part of an example, and whether it has to be there."""
    kind = next(option for option in reversed(options(kind)) if not fault_of(value, option))
    inner = get_args(kind)
    if is_typeddict(kind):
        for name, field in get_type_hints(kind).items():
            yield (*path, name), field, name in kind.__required_keys__
            yield from places(value[name], field, (*path, name))
    elif get_origin(kind) in (list, tuple, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for place, (key, item) in enumerate(items):
            field = inner[{list: 0, tuple: place, dict: 1}[get_origin(kind)]]
            yield (*path, key), field, get_origin(kind) is tuple
            yield from places(item, field, (*path, key))


def accepts(kind: Any, probe: Any) -> bool:
    """Say whether a probe is of a type: a second, shallow implementation."""
    for option in options(kind):
        if is_typeddict(option) and probe == {} and not option.__required_keys__:
            return True
        empty = {list: [], dict: {}}.get(get_origin(option), ...)
        if option is Any or type(probe) in SCALARS.get(option, ()) or (probe == empty and type(probe) is type(empty)):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RunRecord, Row, list[Correlation]], ids=str)
def test_every_field_is_checked(kind):
    whole = example(kind)
    assert fault_of(whole, kind) == ""
    refused = 0
    for path, field, required in list(places(whole, kind)):
        harmed = copy.deepcopy(whole)
        holder = harmed
        for name in path[:-1]:
            holder = holder[name]
        for probe in PROBES:
            holder[path[-1]] = probe
            fault = fault_of(harmed, kind)
            assert (fault == "") == accepts(field, probe), (path, probe)
            assert "\n" not in fault
            refused += bool(fault)
        del holder[path[-1]]
        assert bool(fault_of(harmed, kind)) == required, path
    assert refused > 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "kind", "fault"),
    [
        ({"schema": True}, RunRecord, "schema: expected a whole number, got True"),
        ({"schema": 1, "stages": [{"name": "a"}]}, RunRecord, "stages[0]: expected a field seconds, got name"),
        ({"schema": 1, "metrics": [{"name": "a", "domain": "x"}]}, RunRecord,
         "metrics[0].domain: expected in or out, got 'x'"),
        ({"schema": 1, "scenarios": {"a": [1]}}, RunRecord, "scenarios.a: expected 2 values, got 1"),
        ({"schema": 1, "suggestions": [3]}, RunRecord, "suggestions[0]: expected text or an object, got 3"),
        ({"schema": 1, "suggestions": [{"text": 3}]}, RunRecord, "suggestions[0].text: expected text, got 3"),
        ({"candidate": "a", "losses": {"x": [0.5] * 10**6 + [None]}}, Row,
         "losses.x[1000000]: expected a number, got None"),
        ({"candidate": "a", "losses": {"x": [0.5, 1] * 10**6}, "mine": 3}, Row, ""),
        ([], Row, "the value: expected an object, got a list"),
    ],
)  # fmt: skip
def test_says_what_was_expected_and_what_came(value, kind, fault):
    assert fault_of(value, kind) == fault


def test_what_a_type_does_not_name_is_seen(tmp_path):
    path = fake_run(tmp_path / "run")
    run = RunDirectory(path, read_run(path))
    check_declared(run)
    for harm in ({"mine": 3}, {"dense": {"mine": 3}}):
        with pytest.raises(AssertionError, match="mine"):
            check_declared(RunDirectory(run.path, run.record | harm))
    run.append({"candidate": "b", "mine": 3})
    with pytest.raises(AssertionError, match="mine"):
        check_declared(run)


def names_got(source: str) -> set[str]:
    """Return the names that a module gives to `get` methods."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args)
    named = (call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "get")
    return {name.value for name in named if isinstance(name, ast.Constant)}


def test_a_field_that_is_asked_for_is_declared():
    """Pyright sees a misspelt key in brackets; one in `get` it takes for a field that may be absent."""
    root = Path(saap_jax.__file__).parent
    files = [file for folder in ("runs", "report/kinds", "report/figures") for file in (root / folder).glob("*.py")]
    files += [root / "evaluation" / f"{name}.py" for name in ("crossing", "price", "sensitivity")]
    kinds = [kind for module in (records, origin) for kind in vars(module).values() if is_typeddict(kind)]
    declared = {name for kind in kinds for name in get_type_hints(kind)}
    declared |= set(get_type_hints(Variant))
    others = {"saap_jax", "SAAP_USD_PER_HOUR"}
    read = {name for file in files for name in names_got(file.read_text())}
    assert len(read) > 30
    assert read - declared - others == set()
    assert names_got('run.get("sceanrios", {})') - declared == {"sceanrios"}


FUSED = {"sigmas": {"a": {"mlp/0": 1.0, "mlp/1": 2.0}}, "weights": {"a": {"mlp/0": 1.0, "mlp/1": 2.0}}}
METRICS = [{"name": "x", "domain": "in"}]
DENSE = {"ppl": {"x": 1.0}, "losses": {"x": [0.0, 0.0]}, "parameters": 4}
LINE = {"variant": "v", "seed": 0, "ratio": 0.1, "candidate": "v@0.1", "breaks_at": None, "again": []}
LINE |= {"largest_possible": 0.5, "rounds": 1}
FRONTIER = {
    "schema": 1, "kind": "frontier", "metrics": METRICS, "dense": DENSE, "seeds": {"calibration": [0]},
    "frontier": {"metric": "x", "percent": 5.0, "limit": 2.0, "tolerance": 0.1, "ratios": [0.1], "resamples": 100,
                 "rounds": 1, "lines": [LINE]},
}  # fmt: skip
SENSITIVITY = {
    "schema": 1, "kind": "sensitivity", "metrics": METRICS, "dense": DENSE, "model": {"layers": 2},
    "config": {"judged": "in", "ratio": 0.3, "resamples": 100, "estimator": "wanda", "align": 8},
    "trials": [{"kind": "aligned", "changes": {}, "candidate": "b", "instead_of": "a", "seconds": [[1.0], [2.0]],
                "segments": [1, 1]}],
}  # fmt: skip
RECOVERED = {"kind": "recover", "model": {"parameters": 3}, "before": DENSE, "after": DENSE, "data": {},
             "training": {}, "config": {"method": {"name": "full"}, "data": {"length": 8}}}  # fmt: skip


def changed(record: dict, path: str, value: Any = ...) -> dict:
    """Return a record with another value at a path, or without one."""
    record = copy.deepcopy(record)
    *outer, last = path.split(".")
    holder: Any = record
    for name in outer:
        holder = holder[int(name) if isinstance(holder, list) else name]
    if value is ...:
        del holder[last]
    else:
        holder[int(last) if isinstance(holder, list) else last] = value
    return record


@pytest.mark.parametrize("whole", [FRONTIER, SENSITIVITY, RECOVERED, {"fusions": {"s": {"a+b": FUSED}}}])
def test_what_fits_together_is_read(whole):
    assert contradiction_of(whole) == ""


@pytest.mark.parametrize(
    ("whole", "path", "value", "said"),
    [
        (FRONTIER, "dense.losses", ..., "expected a field dense.losses beside frontier, got none"),
        (FRONTIER, "seeds", ..., "expected a field seeds.calibration beside frontier, got none"),
        (FRONTIER, "frontier.metric", "y", "frontier.metric: expected one of x, got 'y'"),
        (FRONTIER, "frontier.lines", [], "frontier.lines: expected one or more, got none"),
        (SENSITIVITY, "config.judged", ..., "expected a field config.judged beside dense, got none"),
        (SENSITIVITY, "config.judged", "out", "metrics: expected one of domain out"),
        (SENSITIVITY, "model.layers", 0, "model.layers: expected a number of layers"),
        (SENSITIVITY, "config.align", ..., "trials[0]: expected a field config.align beside trials, got none"),
        (SENSITIVITY, "trials.0.segments", ..., "trials[0]: expected a field segments beside kind, got none"),
        (SENSITIVITY, "trials.0.seconds.1", [], "trials[0].seconds: expected times of both models"),
        (RECOVERED, "config.method", {}, "expected a field config.method.name beside training, got none"),
        (RECOVERED, "before.ppl", ..., "expected those of the same texts"),
        (RECOVERED, "before", ..., "expected a field before.ppl beside after, got none"),
        (FUSED, "weights.a.mlp/1", ..., "fusions.s.f.weights: expected every member and scope"),
        (FUSED, "sigmas", {}, "fusions.s.f.sigmas: expected members, and scopes"),
        (FUSED, "sigmas.a", {"mlp/x": 1.0}, "fusions.s.f.sigmas: expected members, and scopes"),
        (FUSED, "trajectory", {"b": [[1.0, 2.0]]}, "fusions.s.f.trajectory: expected every member"),
        (FUSED, "trajectory", {"a": [[1.0]]}, "fusions.s.f.trajectory: expected 2 numbers a step"),
    ],
)
def test_what_contradicts_another_part_is_refused(whole, path, value, said):
    record = changed(whole, path, value)
    assert said in contradiction_of({"fusions": {"s": {"f": record}}} if whole is FUSED else record)


CURVE = {"candidate": "v@0.1", "variant": "v", "seed": 0, "ratio_asked": 0.1, **DENSE}
PLACE = {"candidate": "p", "layer": 1, "structure": "mlp", "asked": 0.5, "actual": 0.5, "units": 4, "removed": 2}
PLACE |= DENSE


class TestRows:
    def read(self, path, run, *rows):
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(path, run, run["kind"])

    def test_of_a_frontier(self, tmp_path):
        assert self.read(tmp_path, FRONTIER, CURVE) == [CURVE]
        for rows, said in (
            ([], "expected a line of 'v@0.1', which the frontier names"),
            ([{**CURVE, "seed": 1}], "expected a line of 'v@0.1'"),
            ([{**CURVE, "seed": "0"}], "expected a line of 'v@0.1', which the frontier names; 1 damaged"),
            ([changed(CURVE, "ratio_asked")], "v@0.1: expected a field ratio_asked beside candidate, got none"),
            ([{**CURVE, "losses": {"x": [0.0]}}], "v@0.1: expected 2 losses of 'x'"),
        ):
            with pytest.raises(ValueError, match=f"metrics.jsonl: {said}.*; the file was changed or damaged"):
                self.read(tmp_path, FRONTIER, *rows)

    def test_of_places(self, tmp_path):
        tried = [{"candidate": name, **DENSE} for name in "ab"]
        assert self.read(tmp_path, SENSITIVITY, PLACE, *tried) == [PLACE, *tried]
        for rows, said in (
            ([PLACE, tried[0]], "expected a line of 'b', which a trial names"),
            ([changed(PLACE, "removed"), *tried], "p: expected a field removed beside layer, got none"),
            ([{**PLACE, "layer": 2}, *tried], "p: expected one of 2 layers, got 2"),
        ):
            with pytest.raises(ValueError, match=said):
                self.read(tmp_path, SENSITIVITY, *rows)

    def test_correlations_have_all_measures(self, tmp_path):
        row = {"estimator": "wanda", "scope": "pooled", "units": 3, "value": 0.5, "low": 0.1, "high": 0.9}
        rows = [{**row, "measure": measure} for measure in ("spearman", "kendall")]
        (tmp_path / "fidelity.json").write_text(json.dumps(rows))
        assert read_correlations(tmp_path) == rows
        for harmed, said in (
            (rows[1:], r"expected spearman of 'wanda', pooled, got kendall"),
            ([*rows, {**rows[0], "units": "3"}], r"\[2\].units: expected a whole number, got '3'"),
            ({}, "the value: expected a list, got an object"),
        ):
            (tmp_path / "fidelity.json").write_text(json.dumps(harmed))
            with pytest.raises(ValueError, match=f"fidelity.json: {said}; the file was changed or damaged"):
                read_correlations(tmp_path)
