"""Model cards: what they say is what was recorded, whatever names it holds; figures on record."""

import math
import re

import numpy as np
import pytest
from huggingface_hub.repocard import metadata_load

from saap_jax.evaluation.evidence import boundary, threshold
from saap_jax.evaluation.resample import FEWEST
from saap_jax.report.card import card
from saap_jax.runs.origin import SCHEMA, figures_of

ODD = "a: b # [x](http://y) `c` | *d* <e>\n---\n- {f}: '\"\x1b[31m"


def origin(**options):
    step = {
        "kind": "prune",
        "command": "saap prune --out pruned",
        "model": "models/dense",
        "parameters": (1200, 900),
        "ratio": (0.2, 0.2034),
        "facts": {"estimator": "saap", "calibration": "32 windows"},
        "versions": {"saap_jax": "1.0", "jax": None},
    } | options.pop("step", {})
    base = {"name": "models/dense", "repository": "org/dense", "license": "apache-2.0"} | options.pop("base", {})
    return {"schema": SCHEMA, "base": base, "loader": "transformers", "steps": [step]} | options


def metadata(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    return metadata_load(tmp_path / "README.md")


def test_a_card_says_what_is_on_record(tmp_path):
    text = card(origin(), "small")
    assert metadata(text, tmp_path) == {
        "base_model": "org/dense",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "saap_jax"],
    }
    for said in ("# small\n", "| parameters | 1,200 | 900 | −25.0 % |", "saap prune --out pruned\n",
                 "20.3 % of the prunable parameters removed, 20.0 % asked for", "No perplexity is on record",
                 "- versions: saap\\_jax 1.0\n"):  # fmt: skip
        assert said in text


@pytest.mark.parametrize(
    ("kind", "said", "tags"),
    [
        ("prune", "pruned: whole", ["pruned"]),
        ("recover", "fine-tuned. Made", []),
        ("export", "in other files. Made", []),
    ],
)
def test_what_was_done_to_it(kind, said, tags, tmp_path):
    text = card(origin(step={"kind": kind}), "small")
    assert f"small is org/dense, {said}" in text
    assert metadata(text, tmp_path)["tags"] == [*tags, "saap_jax"]


@pytest.mark.parametrize(
    ("loader", "library", "code"),
    [
        ("transformers", "transformers", "from_pretrained(DIRECTORY)"),
        ("remote_code", "transformers", "trust_remote_code=True"),
        ("saap_jax", "saap_jax", "saap_jax.load_model(DIRECTORY)"),
        ("traced", "saap_jax", "saap_jax.load_pruned(DIRECTORY, problem)"),
        ("maxtext", "saap_jax", "saap_jax.load_model(DIRECTORY)"),
    ],
)
def test_what_loads_it(loader, library, code, tmp_path):
    text = card(origin(loader=loader), "small")
    said = metadata(text, tmp_path)
    assert said["library_name"] == library
    assert ("pipeline_tag" in said) == (loader != "traced")
    assert code in text


@pytest.mark.parametrize("base", [{}, {"license": "llama2", "license_link": "https://x/LICENSE"}])
def test_an_unknown_licence_is_other_and_no_repository_is_none(base, tmp_path):
    text = card(origin() | {"base": {"name": "models/dense"} | base}, "small")
    said = metadata(text, tmp_path)
    assert (said["license"], said.get("license_link")) == (base.get("license", "other"), base.get("license_link"))
    assert "base_model" not in said
    assert ("do not say its licence" in text) == (not base)


def test_odd_names_are_shown_and_do_nothing(tmp_path):
    base = {"name": ODD, "repository": ODD, "license": "other", "license_name": ODD}
    step = {"command": f"saap prune --out '```\n````{ODD}'", "model": ODD, "facts": {ODD: ODD}}
    text = card(origin(base=base, step=step), ODD)
    said = metadata(text, tmp_path)
    assert (said["base_model"], said["license_name"], said["tags"]) == (ODD, ODD, ["pruned", "saap_jax"])
    body = text.partition("\n---\n\n")[2]
    assert "\x1b" not in body
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", body)
    assert not re.search(r"(?<!\\)\[x|(?<!\\)`|<e>", outside), "no link, code or tag begins outside of the fences"
    assert re.search(r"(?<!\\)`", body), "control: the fences themselves"
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert [line.partition(" ")[2] for line in headings[1:]] == ["Pruned", "Use", "Licence"]


def test_intervals_are_those_of_the_mean_over_the_windows():
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, 24)
    measured = {"ppl": {"ppl@16 x": float(np.exp(losses.mean()))}, "losses": {"ppl@16 x": losses.tolist()}}
    pairs = {"ppl@16 x": np.repeat(range(12), 2).tolist()}
    for units, articles in ((losses.reshape(12, 2).mean(1), pairs), (losses, {})):
        (figure,) = figures_of({"pruned": measured}, articles)
        half = boundary(len(units), threshold(1)) * units.std(ddof=1) / math.sqrt(len(units))
        assert figure["high"] / figure["value"] == pytest.approx(math.exp(half))
        assert figure["value"] / figure["low"] == pytest.approx(math.exp(half))
    assert figure["high"] / figure["low"] > 1.2, "control: wide against the tolerance"
    text = card(origin(step={"figures": [figure]}), "small")
    assert f"| {figure['value']:.2f} | {figure['low']:.2f} to {figure['high']:.2f} | 24 |" in text


@pytest.mark.parametrize(
    ("ppl", "losses", "windows"),
    [
        (np.e, [1.0] * (FEWEST - 1), FEWEST - 1),  # too few
        (3.0, [1.0] * 24, None),  # the figure of a race is not that of the windows
        (np.e, [], None),
        (np.e, [1.0] * 23 + [np.inf], None),
    ],
)
def test_without_an_interval(ppl, losses, windows):
    models = {"dense": {"ppl": {"ppl@16 x": ppl, "ppl@16 y": np.inf}, "losses": {"ppl@16 x": losses}}}
    (figure,) = figures_of(models, {})  # one that is not finite is left out
    assert "low" not in figure
    assert figure.get("windows") == windows
    assert "95 %" in card(origin(step={"figures": [figure]}), "small")
