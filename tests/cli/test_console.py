"""What is printed: every table of the package at every width, names of any length, nothing that moves the cursor."""

import ast
import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

import saap_jax
from saap_jax.cli import blocks as page_terminal
from saap_jax.cli import console as terminal
from saap_jax.cli import plan as planning
from saap_jax.cli.blocks import show_blocks
from saap_jax.config.plan import PlanConfig
from saap_jax.evaluation.crossing import Estimate, Found
from saap_jax.evaluation.differences import AccuracyDifference, paired_difference
from saap_jax.evaluation.limits import Check
from saap_jax.evaluation.rank_correlation import MEASURES, Fidelity
from saap_jax.evaluation.tasks.results import TaskResult
from saap_jax.llama import LayerWidths, LlamaSpec, abstract_llama
from saap_jax.report.kinds import (
    against,
    bench,
    common,
    fidelity,
    frontier,
    fusion,
    overview,
    patterns,
    quality,
    recover,
    scores,
    sensitivity,
    variants,
    winner,
)
from saap_jax.report.kinds import tasks as task_tables
from saap_jax.report.kinds.views import read_view
from saap_jax.report.page import blocks
from saap_jax.report.page.blocks import Block, Detail, text_table
from saap_jax.runs import outcomes
from saap_jax.runs.standing import comparison_rows, merged
from saap_jax.trace import listing
from saap_jax.trace.listing import traced_tables
from saap_jax.trace.own_code import Verdict
from saap_jax.trace.trace import trace
from tests.fake_runs import fake_run
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


def benched() -> list[Block]:
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
    devices = {"platform": "cpu", "kind": "cpu", "count": 1, "cores": 2}
    about = {"dtype": "float32", "baseline": "smollm2-135m", "repeats": 3, "devices": devices}
    return bench.bench_blocks(about | {"models": models, "workloads": workloads})


def compared() -> outcomes.Comparison:
    difference = paired_difference(LOSSES + 0.4, LOSSES, resamples=999)
    rows = (outcomes.Compared(f"ppl@128 {LONG}", "in", 24, (30.0, 20.0), difference),)
    tasks = (outcomes.ComparedTask(LONG, "acc", 200, (50.0, 40.0), AccuracyDifference(10.0, 1.0, 19.0, 0.6, 0.02)),)
    return outcomes.Comparison(f"{LONG}:wanda@0.2", "runs/x:dense", 1, 999, rows, tasks)


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


def rows_of(lines: list[dict]) -> Block:
    return variants.variant_table(fake.fields(), comparison_rows(fake.fields(), lines))


def winner_of(lines: list[dict]) -> Block:
    found = merged(lines), comparison_rows(fake.fields(), lines)
    return winner.winner_table(fake.fields(), *found, against.against_best(fake.fields(), *found))


def traced_function():
    """The table of what is prunable of a function with a parameter of a long name."""
    params = {f"{LONG.split()[0]}_up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))}
    found = trace(lambda p, x: jax.nn.relu(x @ p[f"{LONG.split()[0]}_up"]) @ p["down"], params, jnp.ones((1, 3)))
    return traced_tables(LONG, found, {each.name: Verdict("takes") for each in found.structures})[0]


TABLES = {
    "traced_tables": traced_function,
    "bench_blocks": benched,
    "variant_table": lambda: rows_of([*fake.candidates(), fake.candidate(LONG, 0.2, (1, 2))]),
    "winner_table": lambda: winner_of([*fake.candidates(), fake.candidate(LONG, 0.2, (1, 2))]),
    "cut_table": lambda: variants.cut_table(fake.fields()),
    "frontier_table": lambda: frontier.frontier_table(
        RUN, [Found(name, 3, ESTIMATE, 0.2481, 37.1, ESTIMATE, 1, (0.4,)) for name in ("wanda", LONG)]
    ),
    "fusion_table": lambda: fusion.fusion_table(
        {"web": {f"{LONG}+b": record({LONG: {"mlp": 1.0}, "b": {"mlp": 2.0}})}}
    ),
    "pattern_table": lambda: patterns.pattern_table(
        patterns.patterns({f"{LONG}{n}": each for n, each in enumerate(drawn(2).values())}, "i", "u"), "mlp"
    ),
    "fidelity_table": lambda: fidelity.fidelity_table(
        [Fidelity(name, "mlp", each, 90, 0.5, 0.4, 0.6) for name in ("wanda", LONG) for each in MEASURES], "mlp"
    ),
    "rank_table": lambda: scores.rank_table({"a": units(1.0, 2.0), LONG: units(2.0, 1.0)}, LONG),
    "comparison_table": lambda: quality.comparison_table(compared()),
    "task_table": lambda: [quality.task_table(compared()), task_tables.task_table(evaluated())],
    "check_table": lambda: quality.check_table([Check("max_size", LONG, "80 % of B", "70.0 % of 513.1 MiB", True)]),
    "perplexity_table": lambda: task_tables.perplexity_table(evaluated()),
    "recovery_table": lambda: recover.recovery_table(RECOVERED),
    "extreme_table": lambda: sensitivity.extreme_table(PLACES, measured_places()),
    "stage_table": lambda: common.stage_table([{"name": LONG, "seconds": 1234.5, "tokens": 4096}]),
    "best_blocks": lambda: overview.best_blocks([read_view(fake_run(Path(tempfile.mkdtemp()) / "a"), Detail())]),
    "run_table": lambda: overview.run_table([read_view(fake_run(Path(tempfile.mkdtemp()) / "a"), Detail())]),
    "plan_table": planned,
    "listing": listed,
    "text_table": lambda: text_table(LONG, [], [("zeros added by the format", LONG), ("parameters", "1 -> 5")], 2),
}


def rendered(shown: Table | Block | list[Block], width: int, monkeypatch) -> list[str]:
    console = terminal.Terminal(width=width, markup=False, emoji=False, highlight=False)
    monkeypatch.setattr(terminal, "console", console)
    with console.capture() as caught:
        if isinstance(shown, Table):
            terminal.show(shown)
        else:
            show_blocks(*(shown if isinstance(shown, list) else [shown]))
    return caught.get().splitlines()


def words(*texts: object) -> Counter[str]:
    """Count the words of texts; frames, and colons that records put behind a name, are none."""
    split = (word.rstrip(":") for text in texts for word in str(text).split())
    return Counter(word for word in split if word.strip("─│┃━┏┓┡┩└┘┐┌├┤┼╇┴┬┳╞╪╡╰╯╭╮"))


def said_by(shown: Table | Block | list[Block]) -> Counter[str]:
    """Count the words of a table's title, notes, cells and (once) headings."""
    if isinstance(shown, list):
        return sum(map(said_by, shown), Counter())
    if isinstance(shown, Table):
        return words(shown.title or "", shown.caption or "", *(c for column in shown.columns for c in column.cells))
    if isinstance(shown, blocks.Table):
        return words(shown.title, *shown.notes, *(cell.text for line in shown.lines for cell in line.cells))
    return words(getattr(shown, "text", ""))


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
        for block in benched():
            console.print(page_terminal.drawn(block) if isinstance(block, blocks.Table) else block.text)
    assert said_by(benched()) - words(caught.get())


def test_all_tables_are_tried():
    """A function of the package that returns a table is in the list above."""
    found = set()
    for path in Path(saap_jax.__file__).parent.rglob("*.py"):
        source = path.read_text()
        if path.parent.name == "page" or not re.search(r"from rich\.table|page\.blocks import", source):
            continue
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        returning = {node.name for node in functions if node.returns and "Table" in ast.unparse(node.returns)}
        found |= {name for name in returning if not name.startswith("_")}
        assert not (returning and path.name == "cli.py"), "tables are made elsewhere"
    assert found - {"shown", "evaluation_blocks"} <= set(TABLES)
    assert {"task_table", "listing"} <= found


def test_a_table_that_fits_is_as_rich_draws_it(monkeypatch):
    table = rows_of(fake.candidates())
    console = Console(width=100, markup=False, highlight=False)
    with console.capture() as caught:
        console.print(page_terminal.drawn(table))
    ours, rich_s = (
        [line.rstrip() for line in lines] for lines in (rendered(table, 100, monkeypatch), caught.get().splitlines())
    )
    assert ours[:20] == rich_s[:20]


def test_control_characters_are_written_out(monkeypatch):
    hostile = "a\x1b[31m\x07\x9b2Jb\u202ec\x7f\ud800\r"
    table = text_table(hostile, [], [(hostile, "x")])
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
