"""What the documentation site promises, as far as it can be told without Sphinx: names, formulas, pages, links."""

import ast
import doctest
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

import saap_jax
from saap_jax.cli.arguments import parse
from saap_jax.cli.main import COMMANDS
from saap_jax.estimation.registry import ESTIMATORS
from saap_jax.steps.base import Kind
from saap_jax.steps.chain import expand

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
API = sorted((DOCS / "api").glob("*.md"))
FORMULAS = (DOCS / "api" / "formulas.md").read_text()
NOTEBOOK = DOCS / "notebook.md"
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BESIDE = {"arena", "leaderboard"}
"""Pages of the site that are not counted, as the API reference is not."""
PARTS = ("Start", "Use", "Extend", "Understand", "Results", "Reference")
MOST_PAGES, MOST_WORDS, MOST_OF_A_TITLE = 15, 25_000, 4
CELL = re.compile(r"^```\{code-cell\}\n(?::[^\n]*\n)*(.*?)^```$", re.M | re.S)


def load(name: str) -> ModuleType:
    """Load a module of the site that needs no Sphinx."""
    spec = importlib.util.spec_from_file_location(f"saapsite_{name}", DOCS / "_ext" / "saapsite" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


public, registry, links, signs = map(load, ("public", "registry", "links", "signs"))


def entries(page: str) -> list[str]:
    """Return what the tables of contents of a page list."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```$", page, re.M | re.S)
    return [line for block in blocks for line in block.split("\n") if line and not line.startswith(":")]


def target_of(entry: str) -> str:
    """Return the page of an entry of a table of contents."""
    return re.sub(r".*<(.+)>", r"\1", entry)


@pytest.mark.parametrize("module", [registry, signs], ids=lambda module: module.__name__)
def test_examples_of_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_the_reference_lists_every_public_name_with_its_docstring(tmp_path, monkeypatch):
    assert public.problems(API) == []
    assert len(public.listed_names(API)) > 100
    (tmp_path / "less.md").write_text(API[-1].read_text().replace("saap_jax.load_run\n", ""))
    less = public.problems([*API[:-1], tmp_path / "less.md"])
    assert less == ["saap_jax.load_run: expected in an api block of docs/api, found it in none; add it"], "control"
    (tmp_path / "fresh.py").write_text(
        'from typing import NamedTuple\ndef said():\n    """Say."""\ndef bare():\n    pass\n'
        'class Pair(NamedTuple):\n    a: int\nGIVEN = 1\n"""One."""\nPLAIN = 2\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ("said", "bare", "Pair", "GIVEN", "PLAIN")
    page = tmp_path / "page.md"
    page.write_text("```{api}\n" + "".join(f"fresh.{name}\n" for name in (*names, "said")) + "```\n")
    assert public.problems([page], ["fresh"]) == [
        "fresh.said: expected once in the reference, got it twice",
        *(f"fresh.{name}: expected a docstring, got none" for name in ("bare", "Pair", "PLAIN")),
    ]


def test_every_public_function_and_class_has_an_example_that_runs():
    """Examples of docstrings that `pytest saap_jax` finds, by name."""
    public = [value for name in saap_jax.__all__ if callable(value := getattr(saap_jax, name))]
    find = doctest.DocTestFinder(exclude_empty=False).find
    found = {test.name: test.examples for value in public for test in find(sys.modules[value.__module__])}
    assert [value.__name__ for value in public if not found[f"{value.__module__}.{value.__qualname__}"]] == []
    assert [] in found.values(), "control: of other names there are none"


def test_every_estimator_has_its_formula_its_row_and_its_source(monkeypatch):
    assert registry.missing_rows(FORMULAS) == []
    monkeypatch.setitem(ESTIMATORS, "energy", lambda: ESTIMATORS["wanda"]())
    assert {line.partition(":")[0] for line in registry.missing_rows(FORMULAS)} == {"energy"}, "control"
    monkeypatch.undo()
    for change, said in (
        (("```{estimator} wanda\n", "```\n"), "wanda: expected an estimator block"),
        (("(formula-obs)", "(formula)"), "obs: expected a formula labelled formula-obs"),
        (("```{estimator} wanda\n", "```{estimator} wand\n"), "wand: expected an estimator, got a row of none"),
        ((":source: The floor of every comparison.\n", ""), "random: expected a source"),
    ):
        assert any(line.startswith(said) for line in registry.missing_rows(FORMULAS.replace(*change))), said


def test_rows_come_from_the_code():
    rows = dict(registry.estimator_rows("fluctuation"))
    assert rows["Statistics"] == "`activation_moments`"
    assert "`attention_power=2` (`1`, `2`)" in rows["Hyper-parameters"]
    assert rows["Source"].startswith("FLAP ([arXiv:2312.11983](https://arxiv.org/abs/2312.11983))")
    assert rows["Deviation"].startswith("The population variance")
    assert dict(registry.estimator_rows("fluctuation", source="Here."))["Source"] == "Here."
    names = [name for name, recipe, facts in registry.recipe_rows()]
    assert names[-1] == "tyr"
    assert sorted(names) == sorted(registry.RECIPES)
    steps = {name: (kind.kind, dict(rows)) for name, kind, rows in registry.step_rows()}
    assert list(steps) == sorted(steps, key=lambda name: get_args(Kind).index(steps[name][0]))
    assert steps["rounds"][1]["every = 0.1"] == "Share of the prunable parameters that goes in a round."


def test_every_page_is_in_a_table_of_contents():
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("*.md")} - {"index"}
    listed = [target_of(entry) for path in DOCS.glob("*.md") for entry in entries(path.read_text())]
    assert len(listed) == len(set(listed))
    assert set(listed) == pages | {"api/index"}, "list new pages in docs/index.md, or on another"
    there = entries((DOCS / "api" / "index.md").read_text())
    assert sorted(there) == [path.stem for path in API if path.stem != "index"]


def too_much(pages: dict[str, str]) -> list[str]:
    """Say what is more than the site may have; pages are texts by name."""
    found = []
    if len(pages) > MOST_PAGES:
        found.append(f"{len(pages)} pages: expected at most {MOST_PAGES}; put new text on the page that it belongs to")
    if (words := sum(len(text.split()) for text in pages.values())) > MOST_WORDS:
        found.append(f"{words} words: expected at most {MOST_WORDS}; take as many out as come in")
    return found


def test_the_site_is_short():
    pages = {path.stem: path.read_text() for path in DOCS.glob("*.md") if path.stem not in BESIDE}
    pages["contributing"] = (PROJECT / "CONTRIBUTING.md").read_text()
    assert too_much(pages) == []
    assert [line.split()[1] for line in too_much({**pages, "more": "word " * MOST_WORDS})] == ["pages:", "words:"]
    folders = {path.parent.name for path in DOCS.rglob("*.md")}
    assert folders == {"docs", "api"}, "a page lies in docs; only the API reference has a folder of its own"


def title_of(entry: str) -> str:
    """Return what the menu calls an entry of a table of contents: its own title, else the heading of its page."""
    if "<" in entry:
        return entry.partition("<")[0].strip()
    path = DOCS / f"{entry}.md"
    text = (PROJECT / "CONTRIBUTING.md" if entry == "contributing" else path).read_text()
    return re.search(r"^# (.+)$", text, re.M)[1]  # type: ignore[index]


def test_menu_titles_have_few_words():
    index = (DOCS / "index.md").read_text()
    assert tuple(re.findall(r"^:caption: (.+)$", index, re.M)) == PARTS
    listed = [*entries(index), *(f"api/{entry}" for entry in entries((DOCS / "api" / "index.md").read_text()))]
    assert [title for entry in listed if len((title := title_of(entry)).split()) > MOST_OF_A_TITLE] == []
    assert title_of("Leaderboard of <leaderboard>") == "Leaderboard of", "control: a title of its own comes first"


def test_the_notebook_installs_and_is_python():
    text = NOTEBOOK.read_text()
    assert text.startswith("---\nfile_format: mystnb\nkernelspec:\n  name: python3\n")
    first, *others = CELL.findall(text)
    assert '\nREPOSITORY = ""\n' in first
    assert "figures are demonstrations" in text
    assert others
    for cell in others:
        assert ast.parse(cell).body


def test_links_of_a_site(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="sub/page.html#here">a</a><a href="https://example.org/x">b</a><img src="missing.png"><a href="#top">'
    )
    (tmp_path / "sub" / "page.html").write_text('<h1 id="here"></h1><a href="../index.html"></a><a href="#gone"></a>')
    assert [line.partition(": expected")[0] for line in links.broken_links(tmp_path)] == [
        "index.html: link to missing.png",
        "index.html: link to #top",
        "sub/page.html: link to #gone",
    ]


def test_the_lock_file_adds_to_the_main_one():
    def names(file: str) -> list[str]:
        return re.findall(r"^([\w.-]+)==\S+", (PROJECT / file).read_text(), re.M)

    lines = (PROJECT / "requirements/docs.lock").read_text().splitlines()
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", line) for line in lines)
    assert {"sphinx", "myst-nb", "sphinx-book-theme"} <= set(names("requirements/docs.lock"))
    assert not set(names("requirements/docs.lock")) & set(names("requirements/base.lock"))


def calls(page: str) -> list[str]:
    """Return the calls of `saap` that a page shows: those in blocks, and those with options in sentences."""
    fenced = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page, re.M)
    blocks = [*(code for kind, code in fenced if not kind), *re.findall(r"(?:^    .*\n)+", page, re.M)]
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).split("\n")
    found = [call[1] for line in lines if (call := re.match(r"\s*(?:\w+=\S+ )*(?:.* && |.*\| )?saap (.*?) ?&?$", line))]
    return [*found, *(call.replace("\n", " ") for call in re.findall(r"`saap ([a-z]+ [^`]* --[^`]+)`", page))]


def refusal(call: str, capsys) -> str:
    """Say why a call of `saap` cannot be read, whatever files it names; nothing where it can."""
    name, *words = shlex.split(call, comments=True)
    if name == "help" or {"mine.py", "recipe.py", "mine.py:energy > uniform"} & {*words}:
        return ""
    try:
        config, *_ = parse(name, COMMANDS[name], [word.replace("$i", "0") for word in words if word != "--resume"])
        expand(getattr(config, "methods", ()))
    except (ValueError, KeyError, SystemExit) as error:
        return f"saap {call}: {error} {capsys.readouterr().out}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_that_a_page_shows_can_be_called(page, capsys):
    assert [said for call in calls(page.read_text()) if (said := refusal(call, capsys))] == []


def test_a_command_that_is_gone_is_found(capsys):
    page = "```\nsaap compare --recipes all\nA=b saap compare wanda,unifrom\nsaap gone\n```\n`saap ab a b --lim 3`"
    said = [refusal(call, capsys) for call in calls(page)]
    assert [line.partition(":")[0] for line in said] == [
        "saap compare --recipes all", "saap compare wanda,unifrom", "saap gone", "saap ab a b --lim 3",
    ]  # fmt: skip
