"""Kill `saap` at random moments, start it again until it ends, and compare what it made with an undisturbed run.

    python experiments/kills.py --kills 200

Of the kills, 3 in 10 are for compare, and 1 in 10 each for frontier, sensitivity, fidelity, recover, prune, score and
export. Most are kill -9, some are Ctrl-C and SIGTERM, which also have to end with their code. A moment is a phase of
the undisturbed run (between two lines that it prints), drawn with equal chances, and a time in it; a process is killed
up to four times before it may end. All files are compared to the last byte, but for what `TIMED` lists. Tiny by
default; with `--model smollm2-135m` it takes hours. What differed stays below `--work`.
"""

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint
import tokenizers
from transformers import PreTrainedTokenizerFast

from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import random_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from saap_jax.report.write import write_reports

TIMED = (
    r"run\.json:stages\.\d+\.(?!name$).*",  # a stage that runs again adds its seconds and tokens, and compiles again
    r"run\.json:(started|finished)",
    r"run\.json:(dense|before|after)\.(seconds|tokens_per_second)",
    r"run\.json:best\.(dense_)?forward_seconds",
    r"run\.json:cost\..*",
    r"metrics\.jsonl:.*\.(seconds|tokens_per_second)",
    r"(run|targets)\.json:git_commit",  # of whatever is checked out when a run ends
)
"""What rests on timing, memory and prices, or counts what was done again, as FILE:PATH; it is not compared."""

REPORT = "report.html"
"""Holds some of that too; so it has to be, to the last byte, what `saap report` makes of the records beside it."""

SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGINT,) * 2 + (signal.SIGTERM,) * 2
MOST = 4
"""Kills of one run before it may end."""

ENDED = 600.0
"""Seconds after which a run that nobody kills counts as hanging."""


class Job(NamedTuple):
    """A command to kill."""

    name: str
    words: list[str]
    share: int
    """Of its kills, in twentieths."""
    makes: str = ""
    """What it never overwrites: once that is there, the same command is refused, and its work is done."""


class Undisturbed(NamedTuple):
    """What nobody killed: where its files are, and the seconds between the lines that it printed."""

    place: Path
    pauses: list[float]


class Kill(NamedTuple):
    """One kill, and what came of it."""

    signal: int
    line: int
    wait: float
    code: int
    seconds: float
    """Until the process had ended."""


def jobs_of(model: str, text: Path) -> list[Job]:
    """Return the commands, each on a few windows."""
    calibration = ["--calibration.examples", "6", "--calibration.length", "16", "--calibration.batch-size", "2"]
    evaluation = ["--evaluation.windows", "6", "--evaluation.length", "16", "--evaluation.batch-size", "2"]
    few = ["magnitude", "gate_fisher", "wanda"]
    common = ["--model.name", model, *calibration]
    return [
        Job("compare", ["compare", *common, *evaluation, "--methods", *few, "--seeds", "0", "1",
                        "--ratios", "0.2", "0.4", "--evaluation.candidates-at-once", "3"], 6),
        Job("frontier", ["frontier", *common, *evaluation, "--ratios", "0.1", "0.3", "--methods",
                         "{magnitude,gate_fisher,wanda} > global > rounds(0.15)",
                         "--resamples", "50", "--tolerance", "0.02"], 2),
        Job("sensitivity", ["sensitivity", *common, *evaluation, "--method", "wanda"], 2),
        Job("fidelity", ["fidelity", *common, "--estimators", *few, "--channels-per-layer", "6",
                         "--resamples", "50"], 2),
        Job("recover", ["recover", "--model", model, "--dense", model, *evaluation, "--new-tokens", "0",
                        "--method.name", "full", "--data.sources", f"text:{text}", "--data.length", "32",
                        "--training.epochs", "9", "--training.max-steps", "24", "--training.check-every", "3",
                        "--training.batch-size", "8", "--training.microbatch", "4", "--training.warmup", "2"], 2),
        Job("prune", ["prune", *common, "--method", "wanda", "--targets.parameters", "85%",
                      "--out", "made"], 2, "made"),
        Job("score", ["score", *common, "--estimators", *few, "--calibration.scenarios", "prose=builtin:descriptions",
                      "manual=builtin:reference"], 2),
        Job("export", ["export", model, "made", "--format", "ragged"], 1, "made"),
        Job("export to GGUF", ["export", model, "made.gguf", "--format", "gguf"], 1, "made.gguf"),
    ]  # fmt: skip


def tiny_model(directory: Path) -> Path:
    """Save a random model of three layers with a byte-level tokenizer."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["the cat sat on the mat"],
        tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet,
                                       show_progress=False),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    layers = (LayerWidths(kv_heads=2, q_per_kv=2, mlp=48),) * 3
    spec = LlamaSpec(vocab=len(tokenizer), embed=16, head_dim=4, layers=layers, tied=True)
    return save_model(random_llama(spec, jax.random.key(0)), directory, tokenizer=tokenizer)


# --- processes -----------------------------------------------------------------------------------


class Running:
    """`saap` in a process of its own, with the moments at which it printed a line."""

    def __init__(self, words: list[str], place: Path, cache: Path):
        place.mkdir(parents=True, exist_ok=True)
        settings = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
            "PYTHONUNBUFFERED": "1",
        }
        self.moments, self._line = [time.monotonic()], threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "saap_jax", *words], cwd=place, env=os.environ | settings,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._line:
                self._said.append(line)
                self.moments.append(time.monotonic())
                self._line.notify()

    def wait_for(self, line: int) -> None:
        """Wait until so many lines were printed, or the process has ended."""
        with self._line:
            while len(self.moments) <= line and self._reader.is_alive():
                self._line.wait(0.05)

    def end(self) -> tuple[int, str]:
        """Wait for the process; return its exit code, and its last line, or all of a traceback."""
        with self.process:
            try:
                code = self.process.wait(ENDED)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
            self._reader.join()
        whole = any(line.startswith("Traceback") for line in self._said)
        return code, "".join(self._said if whole else self._said[-1:])


def undisturbed(job: Job, place: Path, cache: Path) -> Undisturbed:
    """Run a command to its end."""
    running = Running(job.words, place, cache)
    code, errors = running.end()
    if code != 0:
        raise RuntimeError(f"{job.name}: expected an undisturbed run to end well, got code {code}: {errors}")
    return Undisturbed(place, np.diff(running.moments).tolist())


def killed(
    job: Job, whole: Undisturbed, dice: random.Random, most: int, place: Path, cache: Path
) -> tuple[list[Kill], list[str]]:
    """Kill a run at random moments, at most so often, and let it end.

    Returns:
        The kills that it did not escape, and what is wrong with what it made.
    """
    kills = []
    for _ in range(dice.randint(1, most)):
        number, line = dice.choice(SIGNALS), dice.randrange(len(whole.pauses))
        wait = dice.random() * whole.pauses[line]
        running = Running(job.words, place, cache)
        running.wait_for(line)
        time.sleep(wait)
        running.process.send_signal(number)  # nothing where it has ended
        sent = time.monotonic()
        code, errors = running.end()
        if code in (0, 2):
            break  # it was done
        kills.append(Kill(number, line, wait, code, time.monotonic() - sent))
        if number == signal.SIGKILL or (line == 0 and code == -number):  # then before any of our code was there
            continue
        if code != 128 + number or errors.count("\n") != 1 or not errors.startswith("saap: "):
            return kills, [f"expected code {128 + number} and one line, got code {code}: {errors}"]
    code, errors = Running(job.words, place, cache).end()
    done = bool(job.makes) and code == 2 and "exist" in errors and (place / job.makes).exists()
    if code != 0 and not done:
        return kills, [f"expected it to go on, got code {code}: {errors}"]
    return kills, differences(whole.place, place)


# --- what was made -------------------------------------------------------------------------------


def differences(ours: Path, theirs: Path) -> list[str]:
    """Return what differs between the files below two directories, but for what rests on timing."""
    names = sorted({str(path.relative_to(root)) for root in (ours, theirs) for path in _files(root)})
    steps = {name: match[1] for name in names if (match := re.match(r"(.*checkpoints/\d+)/", name))}
    found = []
    for name in names:
        if not (ours / name).exists() or not (theirs / name).exists():
            found.append(f"{name}: only in {ours if (ours / name).exists() else theirs}")
        elif name not in steps and (parts := _different(ours / name, theirs / name)):
            found.append(f"{name}: {', '.join(parts[:5])}")
    return found + [
        f"{step}: another state"
        for step in sorted(set(steps.values()))
        if _states(ours / step) != _states(theirs / step)
    ]


def _files(root: Path) -> Iterator[Path]:
    """Yield the files below a directory; those of a checkpoint have names drawn by the library, but for the first."""
    for path in root.rglob("*"):
        inside = re.search(r"checkpoints/\d+/(.*)", str(path.relative_to(root)))
        if {".cache", "tensorboard"} & {*path.relative_to(root).parts}:  # no results, or those of the records again
            continue
        if path.is_file() and (inside is None or inside[1] == "_CHECKPOINT_METADATA"):
            yield path


def _different(ours: Path, theirs: Path) -> list[str]:
    """Return the parts of two files that differ and do not rest on timing."""
    if ours.read_bytes() == theirs.read_bytes():
        return []
    if ours.name == REPORT:
        return [] if _made_anew(ours) and _made_anew(theirs) else ["not what its records make"]
    try:
        a, b = _leaves(ours), _leaves(theirs)
    except ValueError as error:
        return [f"damaged ({error})"]
    if a is None or b is None:
        return ["other bytes"]
    return [
        f"{path} {a.get(path)!r} {b.get(path)!r}"
        for path in sorted(a.keys() | b.keys())
        if a.get(path) != b.get(path) and not any(re.fullmatch(timed, f"{ours.name}:{path}") for timed in TIMED)
    ]


def _leaves(file: Path) -> dict[str, Any] | None:
    """Return the values of a file of records by their path; None of another file."""
    if file.suffix == ".json":
        return dict(_flat(json.loads(file.read_bytes()), ""))
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        once = [row for row in rows if not (isinstance(row, dict) and "step" in row)]
        return dict(_flat({_key(row): row for row in rows} | {"rows": len(once)}, ""))  # a step may be told again
    return None


def _key(row: Any) -> str:
    return row["candidate"] if isinstance(row, dict) else json.dumps(row[:-1])


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    yield f"{path}.", len(value)
    for key, item in items:
        yield from _flat(item, f"{path}.{key}" if path else str(key))


@functools.cache
def _states(step: Path) -> Any:
    """Return the arrays of a checkpoint as bytes, and its progress."""
    try:
        state = orbax.checkpoint.StandardCheckpointer().restore(step.absolute() / "state")
    except Exception as error:  # of whatever kind the library finds: it cannot be read
        return f"{step}: {error}"
    progress = json.loads((step / "progress" / "metadata").read_bytes())
    return {name: (leaf.dtype.name, np.asarray(leaf).tobytes()) for name, leaf in state.items()}, progress


@functools.cache
def _made_anew(report: Path) -> bool:
    """Say whether a report is what `saap report` makes of the records beside it."""
    with tempfile.TemporaryDirectory() as place:
        write_reports([report.parent], str(Path(place) / REPORT), "")
        return (Path(place) / REPORT).read_bytes() == report.read_bytes()


def unnoticed(whole: Path) -> list[str]:
    """Return the files of which a changed byte would not be noticed: the control of the comparison.

    Of checkpoints, whose format holds some bytes twice, it is another state that has to be noticed.
    """
    missed = []
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(whole, copy)
        for file in filter(lambda file: file.stat().st_size > 0, _files(whole)):
            other, content = copy / file.relative_to(whole), file.read_bytes()
            other.write_bytes(_changed(content, file.name))
            if "checkpoints" not in file.parts and not _different(file, other):
                missed.append(str(other))
            other.write_bytes(content)
    states = [_states(path.parent) for path in sorted(whole.rglob("checkpoints/*/state"))]
    return missed + [f"checkpoint {number}" for number, state in enumerate(states) if state in states[:number]]


def _changed(content: bytes, name: str) -> bytes:
    """Return a file with another byte: in a loss of the dense model or a candidate, else in the middle."""
    place = content.find(b"losses") if name.endswith(("run.json", "metrics.jsonl")) else len(content) // 2
    digit = next(at for at in range(max(place, 0), len(content)) if content[at] != ord("0"))
    if name.endswith((".json", ".jsonl")):
        digit = next((at for at in range(max(place, 0), len(content)) if content[at] in b"123456789"), digit)
        return content[:digit] + (b"1" if content[digit] != ord("1") else b"2") + content[digit + 1 :]
    return content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :]


# --- all of it -----------------------------------------------------------------------------------


def checked(job: Job, folder: Path, cache: Path) -> Undisturbed:
    """Run a command undisturbed, twice, and check what the comparison says of that.

    Raises:
        RuntimeError: the two differ, or a changed byte would be overlooked.
    """
    undisturbed(job, folder / "first", cache)
    whole = undisturbed(job, folder / "whole", cache)  # the first one compiled
    if found := differences(whole.place, folder / "first"):
        raise RuntimeError(f"{job.name}: two undisturbed runs differ: {found}")
    if found := unnoticed(whole.place):
        raise RuntimeError(f"{job.name}: the comparison overlooks a changed byte in {found}")
    return whole


def main(words: list[str] | None = None) -> int:
    """Kill, compare, say what came of it; return 1 where something differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="", help="a model of saap; a tiny random one by default")
    parser.add_argument("--only", nargs="*", default=[], help="names of the commands to kill")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no other run after so long")
    parser.add_argument("--work", type=Path, help="a new directory for the runs; a temporary one by default")
    arguments = parser.parse_args(words)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this behind itself has it ignored
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="kills-")) / "work").absolute()
    work.mkdir(parents=True)
    text = work / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 250)
    model = arguments.model or str(tiny_model(work / "model"))
    dice, end = random.Random(arguments.seed), time.monotonic() + 60 * arguments.minutes
    shared, total, good, answers = 0, 0, 0, [0.0]
    for job in jobs_of(model, text):
        before, shared = shared, shared + job.share
        if (arguments.only and job.name not in arguments.only) or time.monotonic() > end:
            continue
        wanted = arguments.kills * shared // 20 - arguments.kills * before // 20  # of all together none is lost
        if wanted == 0:
            continue
        folder, cache = work / job.name.replace(" ", "-"), work / "cache"
        whole = checked(job, folder, cache)
        kills, same = 0, 0
        while kills < wanted and time.monotonic() < end:
            place = folder / f"killed-{kills}"
            came, wrong = killed(job, whole, dice, min(MOST, wanted - kills), place, cache)
            kills, same = kills + len(came), same + len(came) * (not wrong)
            answers += [kill.seconds for kill in came if kill.signal != signal.SIGKILL]
            if wrong:
                print(f"{job.name}, {place}, {came}:", *wrong, sep="\n  ", flush=True)
                place = place.rename(f"{place}-differs-{time.monotonic_ns()}")
            else:
                shutil.rmtree(place)
        print(f"{job.name}: {same} of {kills} kills, bit for bit", flush=True)
        total, good = total + kills, good + same
    print(
        f"{good} of {total} kills at random moments, taken up again, ended bit for bit; "
        f"Ctrl-C and SIGTERM ended it in at most {max(answers):.1f} s",
        flush=True,
    )
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
