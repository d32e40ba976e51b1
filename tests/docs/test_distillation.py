"""The ablation of distillation end to end on a tiny model: starts, arms, files and page; pages of other experiments."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from saap_jax.steps.chain import parse

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["choices", "distillation", "scenarios"])
def test_pages_are_those_of_their_files(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "DOCS", tmp_path, raising=False)
    found = module.report() or (tmp_path / f"{name}.md").read_text()
    assert found == (DOCS / f"{name}.md").read_text(), f"run experiments/{name}.py report"


@pytest.fixture
def distillation(tiny_model_directory, tmp_path, monkeypatch):
    """The script, with little of everything."""
    module = importlib.import_module("distillation")
    shutil.copytree(tiny_model_directory, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    texts = {"WIKITEXT": "builtin:descriptions", "TREEBANK": "builtin:reference", "CALIBRATION": "builtin:reference"}
    small = {"MODEL": "tiny", "LENGTH": 16, "ROW": 16, "WINDOWS": 4, "DOCS": tmp_path, "RESULTS": tmp_path / "results"}
    shown = {"ppl@16 builtin:descriptions": "WikiText-2", "ppl@16 builtin:reference": "PTB"}
    for name, value in {**texts, **small, "TEXTS": shown}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.nightly
def test_starts_and_arms(distillation, tmp_path, monkeypatch):
    """Each start is another model, each arm another outcome; what is done is not run again; the page has all."""
    both = distillation.BASE, distillation.LOGITS
    cases = {distillation.Case(7, start, 4): both[: 1 + (start == "least squares")] for start in distillation.STARTS}
    for case, arms in cases.items():
        for arm in arms:
            distillation.one(case, arm, tmp_path / "runs")
    found = {case.start: json.loads(distillation._path(case).read_text()) for case in cases}
    starts = {start: each["pruned"]["WikiText-2"] for start, each in found.items()}
    assert not any(np.allclose(starts["mask"], starts[other]) for other in ("least squares", "scales"))
    assert not np.allclose(starts["least squares"], starts["scales"], rtol=1e-6)
    kinds = {start: [step.kind for step in parse(chain).steps] for start, chain in distillation.STARTS.items()}
    assert [each.count("repair") for each in kinds.values()] == [0, 1, 2]
    for case, arms in cases.items():
        assert found[case.start]["rows"].keys() == set(arms)
        assert all(row["losses"] != found[case.start]["pruned"] for row in found[case.start]["rows"].values())
    rows = found["least squares"]["rows"]
    assert rows[both[0]]["losses"] != rows[both[1]]["losses"]
    monkeypatch.setattr(distillation.subprocess, "run", lambda words: pytest.fail(f"is done already: {words}"))
    for case, arms in cases.items():
        distillation.run(case, arms, tmp_path / "runs")
    distillation.report()
    page = (tmp_path / "distillation.md").read_text()
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## 4 steps, 256 tokens", "### From mask", "### From least squares", "### From scales"]
    assert page.count("Against the same from least squares, seed 7: by *language loss* WikiText-2 ") == 2
    assert page.count("| all logits |") == 1
