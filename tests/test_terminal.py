"""What is printed: every table of the package at every width, names of any length, nothing that moves the cursor."""

import ast
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table

import saap_jax
from saap_jax import terminal
from saap_jax.config_plan import PlanConfig
from saap_jax.discovery import listing
from saap_jax.evaluation.fidelity import MEASURES, Fidelity
from saap_jax.evaluation.frontier import Estimate, Found
from saap_jax.evaluation.gate import Check
from saap_jax.evaluation.paired import AccuracyDifference, paired_difference
from saap_jax.evaluation.tasks.results import TaskResult
from saap_jax.llama import LayerWidths, LlamaSpec, abstract_llama
from saap_jax.planning import command as planning
from saap_jax.report.kinds import (
    bench,
    fidelity,
    frontier,
    fusion,
    patterns,
    quality,
    recover,
    scores,
    sensitivity,
    tables,
)
from saap_jax.report.kinds import tasks as task_tables
from saap_jax.report.kinds import traced as traced_tables
from tests.report import conftest as fake
from tests.report.test_fusion_figures import record
from tests.report.test_patterns import drawn
from tests.report.test_scores import units

WIDTHS = (20, 40, 60, 80, 100, 200)
LONG = "/home/somebody/models/" + "a-directory-of-models/" * 3 + "[bold]x[/y]"
LOSSES = np.random.default_rng(0).normal(3, 1, (1, 24))
ESTIMATE = Estimate(0.2472, 0.0031, 0.21, 0.28)
RUN = fake.fields() | {
    "frontier": {
        "percent": 10.0, "metric": f"ppl@128 {LONG}", "limit": 37.2, "ratios": [0.1, 0.5], "tolerance": 0.005,
        "rounds": 4,
    },
    "dense": {"ppl": {f"ppl@128 {LONG}": 33.8}, "parameters": 134_515_008},
}  # fmt: skip
RECOVERED = {
    "config": {"method": {"name": "groupwise"}},
    "training": {"steps": 100, "rows": 32},
    "metrics": [{"name": f"ppl@128 {LONG}", "domain": "out"}],
    **{
        name: {"parameters": 134_515_008, "bytes": 538_060_032, "tokens_per_second": 25.1,
               "ppl": {f"ppl@128 {LONG}": 33.8}}
        for name in ("dense", "before", "after")
    },
}  # fmt: skip
PLACES = {
    "config": {"ratio": 0.2, "estimator": LONG, "judged": "out", "resamples": 50},
    "metrics": [{"name": f"ppl@128 {LONG}", "domain": "out"}],
    "dense": {"ppl": {f"ppl@128 {LONG}": 33.8}, "losses": {f"ppl@128 {LONG}": [3.5]}},
}


def benched() -> Group:
    times = {"median": 0.1234, "low": 0.12, "high": 0.13}
    speed = {"median": 1.514, "low": 1.4, "high": 1.6, "predicted": 1.652}
    size = {"layers": 30, "parameters": 134_515_008, "macs_per_token": 134_479_872, "weight_bytes": 538_060_032}
    workload = {
        "batch": 1, "prompt": 128, "new": 32, "prefill_seconds": times, "first_token_seconds": times,
        "tokens_per_second": {"median": 24.66, "low": 20.0, "high": 25.0}, "memory_bytes": 600_000_000,
        "prefill_speed_up": speed, "decode_speed_up": speed,
    }  # fmt: skip
    names = ("smollm2-135m", LONG)
    models, workloads = ([{"model": name, **each} for name in names] for each in (size, workload))
    return bench.rich_bench({"dtype": "float32", "models": models, "workloads": workloads})


def compared() -> quality.Comparison:
    difference = paired_difference(LOSSES + 0.4, LOSSES, resamples=999)
    rows = (quality.Compared(f"ppl@128 {LONG}", "in", 24, (30.0, 20.0), difference),)
    tasks = (quality.ComparedTask(LONG, "acc", 200, (50.0, 40.0), AccuracyDifference(10.0, 1.0, 19.0, 0.6, 0.02)),)
    return quality.Comparison(f"{LONG}:wanda@0.2", "runs/x:dense", 1, 999, rows, tasks)


def evaluated() -> dict[str, task_tables.Evaluated]:
    result = TaskResult(LONG, "file", ("1", "2"), {"acc": np.array([0.0, 1.0]), "acc_norm": np.array([1.0, 1.0])})
    return {
        name: task_tables.Evaluated(134_515_008, {f"ppl@128 {LONG}": 33.8, "ppl@128 b": 17.5}, (result, result))
        for name in ("smollm2-135m", LONG)
    }


def planned() -> Table:
    amount = {"parameters": 2**33, "state": 2**33, "temporaries": 2**32, "peak": 2**34}
    seconds = {"compute": 0.123, "memory": 0.456, "links": 0.01}
    mesh = {"data": 1, "fsdp": 16, "tensor": 1}
    sent = {"all-gather": 2e9, "reduce-scatter": 1e9}
    result = {"target": "v5e:4x4", "chips": 16, "mesh": mesh, "bytes": amount, "memory": 2**34, "seconds": seconds,
              "flops": 1e15, "moved": 1e12, "sent": sent}  # fmt: skip
    return planning.plan_table(PlanConfig(model=LONG), result)


def measured_places() -> list[dict]:
    return [
        {"structure": structure, "layer": layer, "asked": 0.2, "actual": 0.2, "removed": 12_345,
         "losses": {f"ppl@128 {LONG}": [3.5 + 0.01 * layer]}}
        for structure in ("attention", "mlp") for layer in range(3)
    ]  # fmt: skip


def listed() -> Table:
    widths = LayerWidths(kv_heads=3, q_per_kv=3, mlp=1536)
    spec = LlamaSpec(vocab=128, embed=576, head_dim=64, layers=(widths,) * 2, tied=True)
    return listing.listing(LONG, abstract_llama(spec))[0]


def traced() -> Table:
    rows = [
        {"candidate": "dense", "parameters": 1_234_567, "loss": 1.2345},
        {"candidate": "a", "estimator": LONG, "ratio_asked": 0.25, "ratio": 0.2512, "parameters": 1_000_000,
         "loss": 1.5, "change": 0.2655, "change_error": 0.012, "kept": {"mlp": 3}},
    ]  # fmt: skip
    return traced_tables.rich_traced({"model": {"name": LONG}}, rows)


TABLES = {
    "rich_bench": benched,
    "rich_table": lambda: tables.rich_table(fake.fields(), [*fake.candidates(), fake.candidate(LONG, 0.2, (1, 2))]),
    "rich_cut_table": lambda: tables.rich_cut_table(fake.fields()),
    "rich_frontier": lambda: frontier.rich_frontier(
        RUN, [Found(name, 3, ESTIMATE, 0.2481, 37.1, ESTIMATE, 1, (0.4,)) for name in ("wanda", LONG)]
    ),
    "rich_fusions": lambda: fusion.rich_fusions(
        {"web": {f"{LONG}+b": record({LONG: {"mlp": 1.0}, "b": {"mlp": 2.0}})}}
    ),
    "rich_patterns": lambda: patterns.rich_patterns(
        patterns.patterns({f"{LONG}{n}": each for n, each in enumerate(drawn(2).values())}, "i", "u"), "mlp"
    ),
    "rich_fidelity_table": lambda: fidelity.rich_fidelity_table(
        [Fidelity(name, "mlp", each, 90, 0.5, 0.4, 0.6) for name in ("wanda", LONG) for each in MEASURES], "mlp"
    ),
    "rank_table": lambda: scores.rank_table({"a": units(1.0, 2.0), LONG: units(2.0, 1.0)}, LONG),
    "rich_comparison": lambda: quality.rich_comparison(compared()),
    "rich_task_comparison": lambda: quality.rich_task_comparison(compared()),
    "rich_checks": lambda: quality.rich_checks(
        LONG, "dense", [Check("max_size", LONG, "80 % of baseline", "70.0 % of 513.1 MiB", True)]
    ),
    "rich_perplexities": lambda: task_tables.rich_perplexities(evaluated()),
    "rich_tasks": lambda: task_tables.rich_tasks(evaluated()),
    "rich_recovery": lambda: recover.rich_recovery(RECOVERED),
    "rich_sensitivity": lambda: sensitivity.rich_sensitivity(PLACES, measured_places()),
    "rich_traced": traced,
    "plan_table": planned,
    "listing": listed,
    "facts_table": lambda: terminal.facts_table(
        LONG, [("zeros added by the format", LONG), ("parameters", "1,234 -> 567")]
    ),
}


def rendered(printed: Table | Group, width: int, monkeypatch) -> list[str]:
    console = terminal.Terminal(width=width, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(terminal, "console", console)
    with console.capture() as caught:
        terminal.show(printed)
    return caught.get().splitlines()


def words(*texts: object) -> Counter[str]:
    """Count the words of texts; frames, and colons that records put behind a name, are none."""
    split = (word.rstrip(":") for text in texts for word in str(text).split())
    return Counter(word for word in split if word.strip("─│┃━┏┓┡┩└┘┐┌├┤┼╇┴┬┳╞╪╡╰╯╭╮"))


def said_by(table: Table | Group) -> Counter[str]:
    """Count the words of a table's title, caption, cells and (once) headings."""
    if isinstance(table, Group):
        return sum((said_by(each) for each in table.renderables), Counter())  # type: ignore[arg-type]
    cells = (cell for column in table.columns for cell in column.cells)
    return words(table.title or "", table.caption or "", *cells)


@pytest.mark.parametrize("name", TABLES)
def test_every_word_is_whole_at_every_width(name, monkeypatch):
    table = TABLES[name]()
    wanted, longest = said_by(table), max(map(cell_len, said_by(table)))
    for width in WIDTHS:
        lines = rendered(table, width, monkeypatch)
        assert not wanted - words(*lines), f"at {width} columns, words are missing"
        wide = [line for line in lines if cell_len(line) > width]
        assert all(max(map(cell_len, line.split())) > width for line in wide), "only where one word is too wide"
        assert not (wide and longest <= width)


def test_what_rich_does_by_itself_cuts_words(monkeypatch):
    """The negative control of the test above."""
    console = Console(width=40, markup=False)
    with console.capture() as caught:
        console.print(benched())
    assert said_by(benched()) - words(caught.get())


def test_all_tables_are_tried():
    """A function of the package that returns a table for the terminal is in the list above."""
    found = set()
    for path in Path(saap_jax.__file__).parent.rglob("*.py"):
        source = path.read_text()
        if "from rich.table" in source and path.name != "terminal.py":
            returning = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
            found |= {node.name for node in returning if node.returns and "Table" in ast.unparse(node.returns)}
            assert path.name != "cli.py", "tables are made elsewhere, or by facts_table"
    assert {name for name in found if not name.startswith("_")} - {"shown"} <= set(TABLES)
    assert "rich_tasks" in found


def test_a_table_that_fits_is_as_rich_draws_it(monkeypatch):
    table = tables.rich_table(fake.fields(), fake.candidates())
    console = Console(width=100, markup=False, highlight=False)
    with console.capture() as caught:
        console.print(table)
    ours, rich_s = (
        [line.rstrip() for line in lines] for lines in (rendered(table, 100, monkeypatch), caught.get().splitlines())
    )
    assert ours[:20] == rich_s[:20]


def test_control_characters_are_written_out(monkeypatch):
    hostile = "a\x1b[31m\x07\x9b2Jb\u202ec\x7f\ud800\r"
    table = terminal.facts_table(hostile, [(hostile, "x")])
    assert terminal.visible(hostile) == r"a\x1b[31m\x07\x9b2Jb\u202ec\x7f\ud800\r"
    for printed in ("\n".join(rendered(table, 80, monkeypatch)), terminal.visible(hostile)):
        assert r"a\x1b[31m" in printed
        assert not any(character in printed for character in "\x1b\x07\x9b\u202e\x7f\ud800\r")
    assert terminal.visible("é\t中文\n≈ עברית") == "é\t中文\n≈ עברית"


@pytest.mark.parametrize(
    ("columns", "is_terminal", "width"),
    [("60", False, 60), ("60", True, 60), ("", False, 100), ("", True, None), ("0", False, 100), ("wide", False, 100)],
)
def test_columns(monkeypatch, columns, is_terminal, width):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    assert terminal.columns() == width


def test_paths_are_never_broken(capsys, monkeypatch):
    monkeypatch.setattr(terminal.console, "width", 40)
    terminal.show_paths(report="runs/a/report.html", model="a b/c")
    terminal.show_paths(report=LONG, model="a b/c")
    terminal.show_lines(f"saap prune --model.name {LONG} --ratio 0.3")
    assert capsys.readouterr().out.splitlines() == [
        "report: runs/a/report.html",
        "model: a b/c",
        f"report: {LONG}",
        "model: a b/c",
        f"saap prune --model.name {LONG} --ratio 0.3",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_model_writes_is_raw_in_a_pipe_only(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    terminal.write("a\x1b]0;x\x07\n")
    assert capsys.readouterr().out == ("a\\x1b]0;x\\x07\n" if is_terminal else "a\x1b]0;x\x07\n")
