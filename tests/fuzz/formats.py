"""The formats that are harmed: the file, the command that reads it, what it says, and what it should say.

`FORMATS` is the list. A function `expected_…` runs in the directory of a case, in the worker, and computes by
`independent` what the harmed file means: the figures; `ValueError` where it is no such file. Then a refusal is right,
and so is the figure of the unharmed file, as long as the rest of the file says it.
"""

import ast
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from tests.fuzz import independent as own
from tests.fuzz import mutations
from tests.fuzz.mutations import Mutation

RATIO, LENGTH, WINDOWS = 0.3, 8, 3
SHOWN = ("--windows", str(WINDOWS), "--length", str(LENGTH), "--batch-size", "2", "--json", "result.json")
SOURCES = ("--sources", "text:evaluation.txt")
MODEL = ("--model.name", "tiny")
COMPARE = (
    *("compare", *MODEL, "--name", "c", "--calibration.scenarios", "a=text:calibration.txt"),
    *("--calibration.examples", "2", "--calibration.length", str(LENGTH), "--calibration.batch-size", "2"),
    *("--estimation.estimators", "wanda", "magnitude", "--ratios", str(RATIO), "--best-ratio", str(RATIO)),
    *("--evaluation.windows", str(WINDOWS), "--evaluation.length", str(LENGTH), "--evaluation.batch-size", "2"),
    *("--evaluation.in-domain", "text:evaluation.txt", "--evaluation.out-of-domain", "text:other.txt"),
    *("--new-tokens", "0"),
)
SCORE = (
    *("score", *MODEL, "--name", "s", "--calibration.scenarios", "a=text:calibration.txt", "--calibration.examples"),
    *("2", "--calibration.length", str(LENGTH), "--calibration.batch-size", "2"),
    *("--estimation.estimators", "wanda", "gate_taylor"),
)
RECOVER = (
    *("recover", "ragged", "--name", "r", "--dense", "", "--new-tokens", "0", "--method.name", "full"),
    *("--data.sources", "text:calibration.txt", "--data.length", "16", "--data.held-out", "0"),
    *(
        "--training.batch-size",
        "1",
        "--training.microbatch",
        "1",
        "--training.max-steps",
        "1",
        "--training.warmup",
        "0",
    ),
    *("--evaluation.windows", str(WINDOWS), "--evaluation.length", str(LENGTH), "--evaluation.batch-size", "2"),
    *("--evaluation.in-domain", "text:evaluation.txt", "--evaluation.out-of-domain", "text:other.txt"),
)
RESCORE = ("score", *MODEL, "--from-run", "runs/s", "--name", "new")
REPORT = ("report", "runs/c", "--out", "page.html")
AB = ("ab", f"runs/c:wanda@{RATIO}", "runs/c:dense", "--resamples", "100", "--json", "result.json")
GATE = ("ab", f"runs/c:wanda@{RATIO}", "runs/c:dense", "--resamples", "100", "--limits", "limits.toml")
CONFIG = """\
from saap_jax.config import ScoreConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, FusionConfig, ModelConfig

CONFIG = ScoreConfig(
    name="new",
    from_run="runs/s",
    keep_statistics="small",
    runs="runs",
    model=ModelConfig(
        name="tiny",
        dtype="float32",
    ),
    calibration=CalibrationConfig(
        scenarios=("a=text:calibration.txt",),
        examples=2,
        seed=0,
    ),
    estimation=EstimationConfig(
        estimators=("wanda", "gate_taylor"),
        remat="dots",
    ),
    fusion=FusionConfig(
        estimators=("wanda", "gate_taylor"),
        method="closed_form",
    ),
)
"""
LIMITS = 'max_ppl_increase = "500%"\nmax_size = "100%"\n'

Figures = dict[str, Any]


class Format(NamedTuple):
    """A kind of file, and how it is read."""

    file: str
    """The file that is harmed."""
    words: tuple[str, ...]
    """The command that reads it."""
    harm: Callable[[bytes], st.SearchStrategy[Mutation]]
    figures: Callable[[Path], Figures]
    """What the command said, read in the directory of a case."""
    expected: str = ""
    """Function of this module that says what it should say; empty: what it says of the unharmed file."""
    cases: int = 40
    needs: tuple[str, ...] = ("tiny", "evaluation.txt")
    """What else the command reads."""
    places: tuple[str, ...] = ()
    """Outputs that may be begun although the command is refused in the end."""
    environment: Mapping[str, str] = {}
    codes: tuple[int, ...] = (0, 2)
    compare: Callable[[Figures, Figures], str] = own.differing


# --- what a command said -----------------------------------------------------------------------------


def evaluated(place: Path) -> Figures:
    """Perplexities, parameters and the accuracy and log-likelihoods of tasks of `saap evaluate`."""
    figures: Figures = {}
    for model in json.loads((place / "result.json").read_text())["models"]:
        figures |= {"parameters": model["parameters"], **model["ppl"]}
        for task in model["tasks"]:
            figures |= {name: each["value"] for name, each in task["metrics"].items()}
            figures["log-likelihoods"] = [item["log_likelihoods"] for item in task["items"]]
    return figures


def evaluated_if_asked(place: Path) -> Figures:
    """The same, nothing where no result was written."""
    return evaluated(place) if (place / "result.json").exists() else {}


def compared(place: Path) -> Figures:
    """Perplexities of both models of `saap ab`."""
    result = json.loads((place / "result.json").read_text())
    return {row["metric"]: [row["ppl_a"], row["ppl_b"]] for row in result["metrics"]}


def reported(place: Path) -> Figures:
    """The perplexities of a report, without their names."""
    if not (place / "page.csv").exists():
        return {}
    lines = [line.split(",") for line in (place / "page.csv").read_text().splitlines()]
    column, metric = lines[0].index("ppl"), lines[0].index("metric")
    found: Figures = {}
    for line in lines[1:]:
        found.setdefault(line[metric], []).append(float(line[column] or "nan"))
    words = re.search(r"(\d+) unreadable line", (place / "page.md").read_text())
    return {name: sorted(values) for name, values in found.items()} | {"left out": int(words[1]) if words else 0}


def differing_but_left_out(found: Figures, expected: Figures) -> str:
    """Return where a report differs: it may leave lines out, if it says how many."""
    for metric in expected.keys() - {"left out"}:
        values, missing = found.get(metric, []), list(expected[metric])
        for value in values:
            same = next((each for each in missing if not own.differing(value, each)), None)
            if same is None:
                return f"{metric}: {value}, expected some of {expected[metric]}"
            missing.remove(same)
        if len(missing) > found.get("left out", 0):
            return f"{metric}: without {missing}, {found.get('left out', 0)} lines said to be left out"
    return ""


def swept(place: Path) -> Figures:
    """The losses of a comparison's candidates on record, what the best one keeps, and the table that is printed."""
    run = place / "runs/c"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().split(b"\n") if _is_json(line)]
    names = [f"{name}@{RATIO}" for name in ("wanda", "magnitude")]
    rows = {row["candidate"]: row for row in lines if row.get("candidate") in names}  # damaged ones come first
    record = json.loads((run / "run.json").read_text())
    models = {name: rows[name] for name in names} | {"dense": record["dense"]}
    figures: Figures = {name: [row["ppl"], row["losses"], row["parameters"]] for name, row in models.items()}
    lines = (place / "stdout").read_text().splitlines()
    figures["table"] = [line.split() for line in lines if re.match(r" *(dense|wanda|magnitude) ", line)]
    return figures | {"best": record["best"]["candidate"], "keep": kept(run / "best")["keep"]}


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def kept(place: Path) -> Figures:
    """Which units a pruned model has."""
    return {"keep": json.loads((place / "keep.json").read_text())}


def pruned(place: Path) -> Figures:
    """Which units of the model that was pruned last are left."""
    return kept(place / "cut")


def scored(place: Path) -> Figures:
    """The scores of a new run."""
    (made,) = [path for path in place.rglob("scores.npz") if path.parent not in (place / "runs/c", place / "runs/s")]
    with np.load(made) as file:
        return {name: np.nan_to_num(file[name], nan=-1).tolist() for name in file.files}


def recovered(place: Path) -> Figures:
    """The units of the unpruned model that a fine-tuned one still has."""
    return kept(place / "runs/r/model")


def written(place: Path) -> Figures:
    """What was generated."""
    return {"text": (place / "stdout").read_bytes().decode()}


def judged(place: Path) -> Figures:
    """The outcome of limits; it is the exit code."""
    return {}


# --- what it should have said --------------------------------------------------------------------------


def network_of(directory: str) -> own.Network:
    """Read a directory as a network."""
    config = own.read_json((Path(directory) / "config.json").read_bytes())
    tensors = own.read_tensors(Path(directory))
    return own.meaning(lambda: own.read_config(config, tensors))


def text_of(path: str) -> str:
    """Read a text."""
    return own.decoded(Path(path).read_bytes())


def expected_model(directory: str) -> Figures:
    """Perplexity and parameters of a directory."""
    network = network_of(directory)
    tokens = own.plain_tokens(own.read_tokenizer(Path(directory)), text_of("evaluation.txt"))
    return _evaluation(network, tokens, "text:evaluation.txt")


def _evaluation(network: own.Network, tokens: Sequence[int], source: str) -> Figures:
    value = own.perplexity(network, tokens, LENGTH, WINDOWS)
    return {"parameters": own.parameters(network), f"ppl@{LENGTH} {source}": value}


def expected_gguf() -> Figures:
    """The same of the GGUF file."""
    found = own.read_gguf(Path("tiny.gguf").read_bytes())
    tokens = own.gguf_tokens(found, text_of("evaluation.txt"))
    return _evaluation(own.meaning(lambda: own.gguf_network(found)), tokens, "text:evaluation.txt")


def expected_text(source: str) -> Figures:
    """Perplexity of the unharmed model on a harmed text."""
    kind, _, rest = source.partition(":")
    path, _, field = rest.partition("#")
    if kind == "text":
        text = text_of(path)
    else:
        rows = own.json_lines(Path(path).read_bytes())
        texts = [_text(row, field) for row in rows] if kind == "jsonl" else [_exchange(row) for row in rows]
        text = "\n\n".join(texts)
    tokens = own.plain_tokens(own.read_tokenizer(Path("tiny")), text)
    return _evaluation(network_of("tiny"), tokens, source)


def _text(row: dict[str, Any], field: str) -> str:
    if not isinstance(row.get(field), str) or not _is_text(row[field]):
        raise ValueError("no text")
    return row[field]


def _is_text(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def _exchange(row: dict[str, Any]) -> str:
    context = next((row[name] for name in ("input", "context") if name in row), "")
    response = next((row[name] for name in ("output", "response") if name in row), None)
    context = "" if context is None else context
    fields = {"instruction": row.get("instruction"), "context": context, "response": response}
    asked, about, said = (_text(fields, name).strip() for name in fields)
    start = "Below is an instruction that describes a task"
    start += ", paired with an input that provides further context. " if about else ". "
    start += "Write a response that appropriately completes the request.\n\n### Instruction:\n" + asked
    return start + (f"\n\n### Input:\n{about}" if about else "") + "\n\n### Response:\n" + said


def expected_tasks() -> Figures:
    """Accuracy of the unharmed model on harmed tasks."""
    network, tokenizer = network_of("tiny"), own.read_tokenizer(Path("tiny"))
    items, seen = [], set()
    for number, line in enumerate(own.decoded(Path("tasks.jsonl").read_bytes()).split("\n"), start=1):
        if line.strip():
            row = own.read_json(line)
            items.append(_item(row))
            seen.add(str(row.get("id", number)))
    if len(seen) < len(items) or len({kind for *_, kind in items}) != 1:
        raise ValueError("no task")
    likelihoods = []
    for contexts, choices, _, _ in items:
        found = []
        for context, choice in zip(contexts, choices, strict=True):
            before = tokenizer.encode(context.rstrip()).ids if context else [own_token(tokenizer)]
            whole = tokenizer.encode(f"{context} {choice}").ids
            whole = whole if context else [*before, *whole]
            if len(whole) <= len(before) or not before:
                raise ValueError("a choice without a token")
            found.append(float(own.log_likelihoods(network, whole)[len(before) - 1 :].sum()))
        likelihoods.append(found)
    right = [np.argmax(found) == gold for found, (_, _, gold, _) in zip(likelihoods, items, strict=True)]
    figures: Figures = {"acc": float(np.mean(right)), "log-likelihoods": likelihoods}
    if items[0][3]:
        lengths = [[len(choice) for choice in choices] for _, choices, _, _ in items]
        normed = [np.divide(found, each) for found, each in zip(likelihoods, lengths, strict=True)]
        figures["acc_norm"] = float(np.mean([np.argmax(f) == item[2] for f, item in zip(normed, items, strict=True)]))
    return figures | {"parameters": own.parameters(network)}


def own_token(tokenizer: Any) -> int:
    """Return the token that begins texts."""
    return tokenizer.token_to_id("<|endoftext|>")


def _item(row: Any) -> tuple[list[str], list[str], int, bool]:
    """Return contexts, choices, the right one, and whether choices differ."""
    if not isinstance(row, dict):
        raise ValueError("no item")
    several = "choices" in row
    texts = row.get("choices" if several else "contexts")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and _is_text(t) for t in texts):
        raise ValueError("no texts")
    one = _text(row, "context" if several else "continuation")
    if several and not all(texts):
        raise ValueError("an empty choice")
    gold = row.get("gold")
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise ValueError("no gold")
    return ([one] * len(texts), texts, gold, True) if several else (texts, [one] * len(texts), gold, False)


def expected_chat(template: str) -> Figures:
    """What the unharmed model writes after what a harmed template makes of the prompt."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, network = own.read_tokenizer(Path("tiny")), network_of("tiny")
    chat = [[{"role": "user", "content": "the cat"}]]
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    try:
        source = Path(template).read_text(encoding="utf-8")
        ((text,), _) = render_jinja_template(chat, chat_template=source, add_generation_prompt=True, **special)
    except (TemplateError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"no template ({error})") from None
    if not _is_text(text):
        raise ValueError("no text")
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if not tokens:
        raise ValueError("no token")
    written = own.continuation(network, tokens, 4, [own_token(tokenizer)])
    return {"text": tokenizer.decode(written, skip_special_tokens=True) + "\n"}


def expected_ab() -> Figures:
    """Perplexities of the losses on record."""
    record, rows = _record("runs/c"), _rows("runs/c")
    name = f"wanda@{RATIO}"
    if name not in rows or not isinstance(record.get("dense"), dict):
        raise ValueError("no candidate")
    figures: Figures = {}
    for metric in _metrics(record):
        both = [_losses(each, metric) for each in (rows[name], record["dense"])]
        if len(both[0]) != len(both[1]):
            raise ValueError("other windows")
        figures[metric] = [_perplexity(losses) for losses in both]
    return figures


def _record(run: str) -> dict[str, Any]:
    record = own.read_json(Path(run, "run.json").read_bytes())
    if not isinstance(record, dict) or record.get("schema") != 1:
        raise ValueError("no run")
    return record


def _rows(run: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for line in Path(run, "metrics.jsonl").read_bytes().split(b"\n"):
        if _is_json(line) and isinstance(json.loads(line).get("candidate"), str):
            rows[json.loads(line)["candidate"]] = json.loads(line)
    return rows


def _metrics(record: dict[str, Any]) -> list[str]:
    metrics = record.get("metrics")
    if not isinstance(metrics, list) or not metrics or not all(isinstance(each, dict) for each in metrics):
        raise ValueError("no metrics")
    names = [each.get("name") for each in metrics]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("no metrics")
    return names


def _losses(row: dict[str, Any], metric: str) -> list[float]:
    """Return the losses of a row, whose perplexity has to be theirs."""
    losses, ppl = row.get("losses"), row.get("ppl")
    losses = losses.get(metric) if isinstance(losses, dict) else None
    ppl = ppl.get(metric) if isinstance(ppl, dict) else None
    if not isinstance(losses, list) or not losses or not all(type(each) in (int, float) for each in losses):
        raise ValueError("no losses")
    if type(ppl) not in (int, float) or not math.isclose(ppl, _perplexity(losses), rel_tol=1e-6):
        raise ValueError("another perplexity than that of the losses")
    return losses


def _perplexity(losses: list[float]) -> float:
    mean = math.fsum(losses) / len(losses)
    if not 0 <= mean < 700:
        raise ValueError("no loss")
    return math.exp(mean)


def expected_report() -> Figures:
    """The perplexities on record: of all rows whose losses are beside them."""
    record, rows = _record("runs/c"), _rows("runs/c")
    if record.get("kind") != "compare":  # of which there is a page of the files that it has
        raise own.NotComputedError
    dense = record.get("dense")
    if not isinstance(dense, dict):
        raise ValueError("no model")
    each = [dense, *rows.values()]
    return {metric: sorted(_perplexity(_losses(row, metric)) for row in each) for metric in _metrics(record)}


def expected_scores() -> Figures:
    """The scores by the statistics on file."""
    tensors, metadata = own.read_safetensors(Path("runs/s/statistics/a.safetensors").read_bytes())
    about = own.read_json(metadata.get("scenarios", ""))
    if metadata.get("format") != "saap_jax statistics 1" or not isinstance(about, dict) or list(about) != ["a"]:
        raise ValueError("no statistics")
    return _scores(tensors)


def _scores(tensors: own.Tensors) -> Figures:
    network = network_of("tiny")
    figures: Figures = {}
    for structure in ("attention", "mlp"):
        square = tensors[f"a/activation_moments/square/{structure}"]
        gradient = tensors[f"a/gate_gradient/{structure}"]
        if not (np.isfinite(square).all() and np.isfinite(gradient).all() and (square >= 0).all()):
            raise ValueError("no numbers")
        layers = []
        for number, (kv_heads, group, mlp) in enumerate(network.layers):
            name = "self_attn.o_proj" if structure == "attention" else "mlp.down_proj"
            writing = np.abs(network.tensors[f"model.layers.{number}.{name}.weight"]).sum(axis=0)  # over the stream
            unit = (kv_heads, group * network.head_dim) if structure == "attention" else (mlp, 1)
            layers.append((writing.reshape(unit) * np.sqrt(square[number])).sum(axis=1))
        figures[f"a/wanda/{structure}"] = np.array(layers).tolist()
        figures[f"a/gate_taylor/{structure}"] = np.abs(gradient).mean(axis=0).tolist()
    return figures


def expected_spec(words: list[str]) -> Figures:
    """The scores by an estimator that somebody named, as far as they are computed here."""
    name = words[-1]
    tree = ast.parse(name.strip(), mode="eval").body
    node = tree.func if isinstance(tree, ast.Call) and not (tree.args or tree.keywords) else tree
    if not isinstance(node, ast.Name):
        raise own.NotComputedError
    known = _scores(own.read_safetensors(Path("runs/s/statistics/a.safetensors").read_bytes())[0])
    found = {key.replace(node.id, name): value for key, value in known.items() if f"/{node.id}/" in key}
    if not found:
        raise own.NotComputedError
    return found


def expected_words(words: list[str]) -> Figures:
    """What `saap evaluate` says, called with some words."""
    options: dict[str, list[str]] = {"": []}
    key = ""
    for word in words[1:]:
        if word.startswith("--") and len(word) > 2:
            key, _, value = word.partition("=")
            options[key] = [value] if value else []
        else:
            options[key].append(word)
    known = {"", "--sources", "--windows", "--length", "--batch-size", "--json"}
    if words[0] != "evaluate" or not options.keys() <= known or options.get("--json") != ["result.json"]:
        raise own.NotComputedError

    def size(name: str, default: int, least: int) -> int:
        (text,) = options.get(name, [str(default)])
        return own.integer(int(text), least)

    windows, length = size("--windows", 24, 0), size("--length", 128, 2)
    size("--batch-size", 8, 1)
    figures: Figures = {}
    if not options[""] or "--sources" not in options:  # the packaged model, and built-in texts
        raise own.NotComputedError
    for model in options[""]:
        network, tokenizer = network_of(model), own.read_tokenizer(Path(model))
        for source in options.get("--sources", []):
            kind, _, path = source.partition(":")
            if kind != "text":
                raise own.NotComputedError
            value = own.perplexity(network, own.plain_tokens(tokenizer, text_of(path)), length, windows)
            figures |= {f"ppl@{length} {source}": value, "parameters": own.parameters(network)}
    return figures


def expected_gate() -> Figures:
    """The exit code of limits."""
    limits = tomllib.loads(Path("limits.toml").read_text(encoding="utf-8"))
    record, row = _record("runs/c"), _rows("runs/c")[f"wanda@{RATIO}"]
    if not limits or not limits.keys() <= {"max_ppl_increase", "max_size"}:
        raise ValueError("no limit")
    holds = []
    for name, value in limits.items():
        match = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?)\s*(\D+?)\s*", value if isinstance(value, str) else "")
        if match is None or not math.isfinite(float(match[1])):
            raise ValueError("no limit")
        if name == "max_ppl_increase":
            if match[2] != "%":
                raise ValueError("no limit")
            for metric in _metrics(record):
                pair = [_perplexity(_losses(each, metric)) for each in (row, record["dense"])]
                holds.append(100 * (pair[0] / pair[1] - 1) <= float(match[1]))
        else:
            units = {"%": 4 * record["dense"]["parameters"] / 100, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
            if match[2].lower() not in units:
                raise ValueError("no limit")
            holds.append(4 * row["parameters"] <= float(match[1]) * units[match[2].lower()])
    return {"code": 0 if all(holds) else 1}


def expected_keep() -> Figures:
    """The units that the unharmed model of a harmed record still has."""
    keep = own.read_json(Path("ragged/keep.json").read_bytes())
    network = network_of("ragged")
    if not isinstance(keep, dict) or not {"attention", "mlp"} <= keep.keys():
        raise ValueError("no record")
    for name, column in (("attention", 0), ("mlp", 2)):
        rows = keep[name]["kept"]
        widths = [layer[column] for layer in network.layers]
        units = own.integer(keep[name]["units"])
        if [len({own.integer(unit, 0) for unit in row if unit < units}) for row in rows] != widths:
            raise ValueError("another model")
    return {"keep": {name: keep[name] for name in ("attention", "mlp")}}


# --- the list ------------------------------------------------------------------------------------------


def _gguf(content: bytes) -> st.SearchStrategy[Mutation]:
    places = own.read_gguf(content).places
    _, offset, size = places[-1]
    return mutations.of_gguf(content, places, offset + size)


_JSON, _LINES, _NPZ = mutations.of_json, mutations.of_json_lines, mutations.of_npz
_RUNS = ("tiny", "runs", "calibration.txt", "evaluation.txt", "other.txt")
_RESUMED = ("tiny", "unfinished", "calibration.txt", "evaluation.txt", "other.txt")


def _evaluate(model: str, file: str, harm: Any, *, cases: int, expected: str = "expected_model") -> Format:
    needs = (model, "evaluation.txt")
    return Format(f"{model}/{file}", ("evaluate", model, *SOURCES, *SHOWN), harm, evaluated, expected, cases, needs)


def _read(file: str, source: str, harm: Any, *, cases: int) -> Format:
    words = ("evaluate", "tiny", "--sources", source, *SHOWN)
    return Format(file, words, harm, evaluated, "expected_text", cases, ("tiny", file))


FORMATS: dict[str, Format] = {
    "safetensors": _evaluate("tiny", "model.safetensors", mutations.of_safetensors, cases=90),
    "index": _evaluate("sharded", "model.safetensors.index.json", _JSON, cases=50),
    "config": _evaluate("tiny", "config.json", _JSON, cases=120),
    "layers": _evaluate("ragged", "config.json", _JSON, cases=60),
    "tokenizer": _evaluate("tiny", "tokenizer.json", _JSON, cases=90),
    "tokenizer_config": _evaluate("tiny", "tokenizer_config.json", _JSON, cases=40),
    "gguf": Format(
        "tiny.gguf", ("evaluate", "tiny.gguf", *SOURCES, *SHOWN), _gguf, evaluated, "expected_gguf", 140,
        ("tiny.gguf", "evaluation.txt"),
    ),
    "template": Format(
        "tiny/chat_template.jinja", ("generate", "tiny", "the cat", "--chat", "--max-new-tokens", "4"),
        mutations.of_template, written, "expected_chat", 60,
    ),
    "text": _read("evaluation.txt", "text:evaluation.txt", mutations.of_text, cases=30),
    "jsonl": _read("lines.jsonl", "jsonl:lines.jsonl#text", _LINES, cases=50),
    "instruct": _read("instruct.jsonl", "instruct:instruct.jsonl", _LINES, cases=40),
    "tasks": Format(
        "tasks.jsonl", ("evaluate", "tiny", "--tasks", "tasks.jsonl", *SHOWN, "--sources"), _LINES, evaluated,
        "expected_tasks", 60, ("tiny",),
    ),
    "run_ab": Format("runs/c/run.json", AB, _JSON, compared, "expected_ab", 60, ("runs",)),
    "metrics_ab": Format("runs/c/metrics.jsonl", AB, _LINES, compared, "expected_ab", 60, ("runs",)),
    "run_report": Format(
        "runs/c/run.json", REPORT, _JSON, reported, "expected_report", 90, ("runs",), compare=differing_but_left_out
    ),
    "metrics_report": Format(
        "runs/c/metrics.jsonl", REPORT, _LINES, reported, "expected_report", 60, ("runs",),
        compare=differing_but_left_out,
    ),
    "run_resume": Format("runs/c/run.json", COMPARE, _JSON, swept, "", 40, _RESUMED, ("runs/c",)),
    "metrics_resume": Format("runs/c/metrics.jsonl", COMPARE, _LINES, swept, "", 30, _RESUMED, ("runs/c",)),
    "scores_resume": Format("runs/c/scores.npz", COMPARE, _NPZ, swept, "", 20, _RESUMED, ("runs/c",)),
    "keeps_resume": Format("runs/c/keeps.npz", COMPARE, _NPZ, swept, "", 20, _RESUMED, ("runs/c",)),
    "scores_prune": Format(
        "runs/s/scores.npz",
        ("prune", *MODEL, "--from-run", "runs/s", "--estimator", "wanda", "--search.skip-layers", "--ratio", str(RATIO),
         "--compensation.method", "none", "--out", "cut"),
        _NPZ, pruned, "", 50, ("tiny", "runs", "calibration.txt"),
    ),
    "statistics": Format(
        "runs/s/statistics/a.safetensors", (*RESCORE, "--estimation.estimators", "wanda", "gate_taylor"),
        mutations.of_safetensors, scored, "expected_scores", 60, ("tiny", "runs"), ("runs/new",),
    ),
    "run_score": Format(
        "runs/s/run.json", (*RESCORE, "--estimation.estimators", "wanda", "gate_taylor"), _JSON, scored, "", 40,
        ("tiny", "runs"), ("runs/new",),
    ),
    "limits": Format(
        "limits.toml", GATE, mutations.of_toml, judged, "expected_gate", 60, ("runs",), codes=(0, 1, 2)
    ),
    "keep": Format("ragged/keep.json", RECOVER, _JSON, recovered, "expected_keep", 20, ("ragged", *_RUNS[2:])),
    "configuration": Format(
        "mine.py", ("score", "mine.py"), mutations.of_python, scored, "", 60, ("tiny", "runs"), ("runs/new",)
    ),
}  # fmt: skip
"""Name -> format; command lines and estimators, which are no files, come beside them."""
