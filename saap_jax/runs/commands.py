"""The words to type for another run in the setting of one that is on record, with a few options changed."""

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from saap_jax.config.jobs import (
    CompareConfig,
    PruneConfig,
)
from saap_jax.recipes.registry import RECIPES
from saap_jax.records import Row, RunRecord
from saap_jax.steps.chain import parse

RUNS = {
    "CompareConfig": "compare",
    "FidelityConfig": "fidelity",
    "FrontierConfig": "frontier",
    "RecoverConfig": "recover",
    "ScoreConfig": "score",
    "SensitivityConfig": "sensitivity",
}
"""Class of the configuration of a job that keeps a run -> its command."""


def command_of(config: Any) -> str:
    """Write the command for a configuration of a run.

    >>> from saap_jax.config import ScoreConfig
    >>> command_of(ScoreConfig(name="mine"))
    'saap score --name mine'
    """
    kind = type(config)
    return " ".join(["saap", RUNS[kind.__name__], *options(dataclasses.asdict(config), kind())])


def config_file(config: Any) -> str:
    """Write a Python file whose CONFIG is a configuration, as far as it is not the usual one.

    >>> from saap_jax.config import ScoreConfig
    >>> print(config_file(ScoreConfig(name="mine", estimators=("wanda",))), end="")
    from saap_jax.config import ScoreConfig
    <BLANKLINE>
    CONFIG = ScoreConfig(
        name='mine',
        estimators=('wanda',),
    )
    """
    classes: dict[str, None] = {}

    def written(value: Any) -> str:
        if not dataclasses.is_dataclass(value):
            return repr(value)
        classes[type(value).__name__] = None
        usual = type(value)()
        fields = [(field.name, getattr(value, field.name), getattr(usual, field.name))
                  for field in dataclasses.fields(value)]  # fmt: skip
        return f"{type(value).__name__}({', '.join(f'{n}={written(v)}' for n, v, known in fields if v != known)})"

    usual = type(config)()
    fields = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    lines = [f"    {name}={written(value)},\n" for name, value in fields.items() if value != getattr(usual, name)]
    names = ", ".join(sorted({type(config).__name__, *classes}))
    return f"from saap_jax.config import {names}\n\nCONFIG = {type(config).__name__}(\n{''.join(lines)})\n"


def compare_command(run: RunRecord, name: str, changes: Mapping[str, Any]) -> str:
    """Write the `saap compare` of a run's setting with some changes; `name`, if any, is added to the run's name.

    Args:
        run: `run.json` of `saap compare`, `frontier` or `sensitivity`.
        changes: values of fields, of a part of the configuration those that change.
    """
    config: dict[str, Any] = dict(run["config"])
    for field, value in changes.items():
        config[field] = {**config[field], **value} if isinstance(value, Mapping) else value
    if "method" in config:  # of `saap sensitivity`
        config["ratios"], config["best_ratio"] = [config["ratio"]], config["ratio"]
    config["name"] = "-".join(filter(None, (config["name"], name)))
    return " ".join(["saap compare", *options(config, CompareConfig())])


def prune_command(run: RunRecord, row: Row) -> str:
    """Write the `saap prune` for a candidate, a line of `metrics.jsonl`, of a comparison or a frontier."""
    config: dict[str, Any] = dict(run["config"])
    config["calibration"] = {**config["calibration"], "seed": row["seed"]}
    chain = row["chain"]
    if row["variant"] in RECIPES and parse(row["variant"]).written == chain:
        method = row["variant"]
    else:
        method = chain
    config |= {"method": method, "ratio": row["ratio_asked"]}
    return " ".join(["saap prune", *options(config, PruneConfig())])


def options(config: Mapping[str, Any], default: Any, prefix: str = "") -> list[str]:
    """List the options that make a configuration of its defaults; fields that it does not have stay as they are.

    >>> options({"ratio": 0.3, "calibration": {"scenarios": ["text:a b.txt"], "seed": 0}}, PruneConfig())
    ['--calibration.scenarios', "'text:a b.txt'", '--ratio', '0.3']
    """
    words: list[str] = []
    for field in dataclasses.fields(default):
        if field.name not in config:
            continue
        value = config[field.name]
        usual = getattr(default, field.name)
        if (prefix, field.name) == ("model.", "name"):
            name = "model"
        else:
            name = f"{prefix}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(usual):
            words += options(value, usual, f"{name}.")
        elif isinstance(usual, bool) and value != usual:
            words.append(f"--{name}" if value else f"--{prefix}no-{field.name}".replace("_", "-"))
        elif (tuple(value) if isinstance(usual, tuple) else value) != usual:
            items = value if isinstance(usual, tuple) else [value]
            words += [f"--{name}", *(shlex.quote(str(item)) for item in items)]
    return words
