"""What `run.json` and a line of `metrics.jsonl` hold: the type of every field that something reads.

| in a type        | stands for                                            |
|------------------|-------------------------------------------------------|
| `(a, b)`         | one of several                                        |
| `[a]`            | a list                                                |
| `{str: a}`       | an object with any keys                               |
| `{"x": a, …}`    | an object; fields that are not named here may be there |
| `"x!"`           | a field that has to be there, if its object is        |
"""

from typing import Any

_NUMBER = (int, float)
_MAYBE = (int, float, None)
_BY_NAME = {str: _NUMBER}
_BY_SCOPE = {str: {str: _NUMBER}}
_OBJECT = {str: object}

_MEASURED = {
    "ppl": {str: _MAYBE},
    "losses": ({str: [_NUMBER]}, None),
    "parameters": int,
    "bytes": int,
    "loss": _MAYBE,
    "tokens_per_second": _MAYBE,
}
"""What is measured of a model."""

_STAGE = {
    "name!": str,
    "seconds!": _NUMBER,
    "times": int,
    **dict.fromkeys(
        ("compile_seconds", "peak_host_gib", "peak_device_gib", "tokens_per_second", "compiles", "tokens"), _MAYBE
    ),
}

_CUT = {
    "candidate": str,
    "parameters": int,
    "bytes": int,
    "dense_bytes": int,
    "forward_seconds": _MAYBE,
    "dense_forward_seconds": _MAYBE,
    "forward_tokens": (int, None),
    "ppl": _BY_NAME,
    "ppl_masked": _BY_NAME,
    "runs": int,
}

_LINE = {
    "variant!": str,
    "seed!": int,
    "ratio!": _NUMBER,
    "candidate!": str,
    "breaks_at!": _MAYBE,
    "largest_possible!": _NUMBER,
    "rounds!": int,
    "again!": [_NUMBER],
}

MODELS = ("dense", "before", "after")
"""Fields of `run.json` that hold what was measured of a model."""

RUN = {
    "name": str,
    "kind": str,
    "status": str,
    "config": _OBJECT,
    "stages": [_STAGE],
    "files": [str],
    "inputs": {str: str},
    "left_out": [str],
    "digests": {str: [str]},
    "rows": int,
    "versions": {str: (str, None)},
    "devices": {"platform": str, "kind": str, "count": int, "cores": (int, None)},
    "git_commit": (str, None),
    "seeds": {str: (int, [int])},
    "model": {
        "name": str,
        "parameters": int,
        "prunable_parameters": int,
        "layers": int,
        "units": {str: int},
    },
    "metrics": [{"name!": str, "domain!": str}],
    "scenarios": {str: [int]},
    **dict.fromkeys(MODELS, _MEASURED),
    "best": (_CUT, [{"candidate!": str, "masked!": _NUMBER, "cut!": _NUMBER}], None),
    "cost": (
        {
            "device_hours!": _NUMBER,
            "devices!": int,
            "usd": _MAYBE,
            "usd_per_million_tokens": ({"dense!": _NUMBER, "cut!": _NUMBER}, None),
            "prices": ({"kind": str, "usd_per_hour": _NUMBER, "date": str}, None),
            "note": (str, None),
        },
        None,
    ),
    "couplings": {
        "parameters!": {str: [int]},
        "structures!": [{"name!": str, "members!": [[(str, int)]], "label!": [str], "pinned!": bool}],
    },
    "suggestions": [(str, {"text": str, "effect": str, "expected_effect": str, "command": str})],
    "fusions": {
        str: {
            str: {
                "sigmas": _BY_SCOPE,
                "weights": _BY_SCOPE,
                "shares": _BY_SCOPE,
                "trajectory": ({str: [[_NUMBER]]}, None),
                "loss": _NUMBER,
            }
        }
    },
    "structures": [{"name!": str, "units!": int, "copied!": [(int, str)]}],
    "frontier": {
        "metric!": str,
        "percent!": _NUMBER,
        "limit!": _NUMBER,
        "tolerance!": _NUMBER,
        "ratios!": [_NUMBER],
        "resamples!": int,
        "rounds!": int,
        "lines!": [_LINE],
    },
    "trials": [
        {
            "kind!": str,
            "changes!": _OBJECT,
            "candidate!": str,
            "instead_of!": str,
            "seconds": [[_NUMBER]],
            "tokens": int,
            "runs": [int],
        }
    ],
    "data": {
        **dict.fromkeys(("documents", "pieces", "cut", "left_out", "rows", "predicted", "held_out_rows"), int),
        "filled": _NUMBER,
    },
    "training": {
        "steps!": int,
        "rows!": int,
        "best_step!": (int, None),
        "best_loss!": _MAYBE,
        "first_loss!": _MAYBE,
        "stopped!": bool,
        "trained!": int,
    },
    "planned_steps": int,
    "first_loss": _MAYBE,
    "out": str,
}
"""`run.json`."""

ROW = {
    "candidate!": str,
    **_MEASURED,
    "variant": (str, None),
    "estimator": (str, None),
    "scenario": (str, None),
    "allocation": (str, None),
    "seed": int,
    "ratio_asked": _MAYBE,
    "ratio_actual": _MAYBE,
    "ratio": _MAYBE,
    "kept": {str: (int, [_NUMBER])},
    "keep": str,
    "same_as": (str, None),
    "layer": int,
    "structure": str,
    "asked": _NUMBER,
    "actual": _NUMBER,
    "units": int,
    "removed": (int, _BY_NAME),
    "change": _NUMBER,
    "change_error": _NUMBER,
    "step": int,
    "held_out": _MAYBE,
    "divergence": _NUMBER,
    "norm": _NUMBER,
    "learning_rate": _NUMBER,
    "tokens": int,
}
"""A line of `metrics.jsonl`."""

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}


def fault_of(value: Any, kind: Any, place: str = "") -> str:
    """Return where a value is not of a type, what was expected and what came; empty where it is.

    >>> fault_of({"stages": [{"name": "load"}]}, RUN)
    'stages[0]: expected a field seconds, got name'
    >>> fault_of({"files": "all"}, RUN), fault_of({"name": "a", "mine": 3}, RUN)
    ("files: expected a list, got 'all'", '')
    """
    if isinstance(kind, tuple):
        faults = [fault_of(value, each, place) for each in kind]
        alike = [f for each, f in zip(kind, faults, strict=True) if type(value) is type(each)]
        return "" if not all(faults) else alike[0] if alike else _fault(value, _named(kind), place)
    if isinstance(kind, list):
        if not isinstance(value, list):
            return _fault(value, "a list", place)
        if set(map(type, value)) <= _plain(kind[0]):  # at once: a run may hold a million numbers
            return ""
        return next((f for i, each in enumerate(value) if (f := fault_of(each, kind[0], f"{place}[{i}]"))), "")
    if isinstance(kind, dict):
        return _object_fault(value, kind, place)
    if kind is object or (value is None if kind is None else type(value) is kind):
        return ""
    return _fault(value, _named((kind,)), place)


def _object_fault(value: Any, kind: dict, place: str) -> str:
    if not isinstance(value, dict):
        return _fault(value, "an object", place)
    if str in kind:
        return next((f for key, each in value.items() if (f := fault_of(each, kind[str], _inside(place, key)))), "")
    for name, each in kind.items():
        key = name.removesuffix("!")
        if key not in value:
            if key != name:
                return f"{place or 'the object'}: expected a field {key}, got {', '.join(value)[:80] or 'none'}"
        elif fault := fault_of(value[key], each, _inside(place, key)):
            return fault
    return ""


def _plain(kind: Any) -> set[type]:
    """Return those of the types that hold nothing else."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return {type(None) if each is None else each for each in kinds if each is None or isinstance(each, type)}


def _inside(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _fault(value: Any, expected: str, place: str) -> str:
    got = type(value).__name__ if isinstance(value, dict | list) else repr(value)[:60]
    got = {"dict": "an object", "list": "a list"}.get(got, got)
    return f"{place or 'the value'}: expected {expected}, got {got}"


def _named(kinds: tuple) -> str:
    names = [
        "a list" if isinstance(kind, list) else "an object" if isinstance(kind, dict) else _NAMES[kind]
        for kind in kinds
        if not (kind is int and float in kinds)
    ]
    return " or ".join(names)
