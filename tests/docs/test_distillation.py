"""The ablation of distillation end to end on a tiny model: starts, arms, files and page; tables of the studies."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest
from tables import STUDIES, markers, write_block

from saap_jax.steps.chain import parse


@pytest.mark.parametrize("name", ["choices", "distillation", "scenarios"])
def test_tables_are_those_of_their_files(name, tmp_path):
    page, stale = STUDIES.read_text(), tmp_path / "studies.md"
    begin, end = markers(name)
    before, _, rest = page.partition(begin)
    stale.write_text(f"{before}{begin}\nanother table\n{end}{rest.partition(end)[2]}")
    write_block(name, importlib.import_module(name).block(), stale)
    assert stale.read_text() == page, f"run experiments/{name}.py report"


def test_a_table_wants_its_place(tmp_path):
    (tmp_path / "studies.md").write_text(markers("choices")[0])
    with pytest.raises(SystemExit, match=r"studies.md: expected <!-- choices: .* found them not"):
        write_block("choices", ["| a |"], tmp_path / "studies.md")


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
    (tmp_path / "studies.md").write_text("\n".join(markers("distillation")))
    distillation.report()
    page = (tmp_path / "studies.md").read_text()
    starts = re.findall(r"^\| 4, 256, 1 \| (.+?) \| language loss \|", page, re.M)
    assert starts == ["mask", "least squares", "scales"]
    assert page.count("against the same from least squares, seed 7: by *language loss* WikiText-2 ") == 2
    assert page.count("| all logits |") == 1
