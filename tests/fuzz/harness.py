"""One case: a harmed file in a directory of its own, the command that reads it, and what is wrong with what it did."""

import hashlib
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.formats import Figures, Format
from tests.fuzz.independent import AnotherError, NotComputedError
from tests.fuzz.mutations import Mutation
from tests.fuzz.worker import MEMORY, Outcome, Worker

LONGEST = 2200
"""Characters of the longest line that says what is wrong."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd]")
_UNFORESEEN = re.compile("traceback|nobody foresaw|out of memory", re.IGNORECASE)
_numbers = itertools.count()


class Case(NamedTuple):
    """A directory in which a command is run."""

    place: Path
    words: tuple[str, ...]
    before: dict[str, str]
    """Digest of each file before the command."""


class Harness:
    """Runs cases, each on a copy of what it needs."""

    def __init__(self, base: Path, scratch: Path, worker: Worker) -> None:
        self._base, self._scratch, self.worker = base, scratch, worker
        self._unharmed: dict[str, Figures] = {}
        self.codes: Counter[int] = Counter()
        """How often each exit code came."""

    def case(self, given: Format, mutation: Mutation | None = None, words: Sequence[str] = ()) -> Case:
        """Lay out a case."""
        place = self._scratch / f"case-{next(_numbers)}"
        place.mkdir(parents=True)
        own = {given.file.split("/")[0]} - ({"", "runs"} if "unfinished" in given.needs else {""})
        for name in {*given.needs} | own:
            source, target = self._base / name, place / ("runs" if name == "unfinished" else name)
            if source.is_dir():
                shutil.copytree(source, target)
            elif source.exists():
                shutil.copy(source, target)
        if mutation is not None:
            (place / given.file).write_bytes(mutation.content)
        return Case(place, tuple(words or given.words), digests(place))

    def content(self, given: Format) -> bytes:
        """Return the unharmed file."""
        name = given.file
        if "unfinished" in given.needs:
            name = name.replace("runs", "unfinished")
        return (self._base / name).read_bytes()

    def unharmed(self, given: Format) -> Figures:
        """Return the figures of the unharmed file, which have to be the expected ones."""
        key = repr(given)
        if key not in self._unharmed:
            case = self.case(given)
            outcome = self.worker.run(case.words, case.place, given.environment)
            assert outcome.code == 0, outcome.err
            figures = self._figures(given, case, outcome)
            if given.expected:
                assert given.compare(figures, self._expected(given, case)) == ""
            self._unharmed[key] = figures
            shutil.rmtree(case.place)
        return self._unharmed[key]

    def check(self, given: Format, mutation: Mutation | None, words: Sequence[str] = ()) -> str:
        """Run a case; return what is wrong, in words, or nothing."""
        case = self.case(given, mutation, words)
        outcome = self.worker.run(case.words, case.place, given.environment)
        self.codes[outcome.code] += 1
        wrong = self.faults(given, case, outcome)
        if not wrong:
            shutil.rmtree(case.place)
            return ""
        done = mutation.done if mutation is not None else "words"
        return f"{given.file or 'words'}: {done}\n    {'; '.join(wrong)}\n    in {case.place}: saap {shown(case.words)}"

    def faults(self, given: Format, case: Case, outcome: Outcome) -> list[str]:
        """Return what is wrong with what a command did."""
        wrong = []
        if outcome.stopped:
            return [f"stopped at {outcome.stopped}"]
        if outcome.peak > MEMORY:
            wrong.append(f"held {outcome.peak / 2**30:.1f} GiB")
        if outcome.code not in given.codes:
            return [*wrong, f"exit code {outcome.code}: {outcome.err.strip()[-400:]!r}"]
        if outcome.code == 2:
            return [*wrong, *refusal_faults(outcome.err), *self._left(given, case)]
        if _UNFORESEEN.search(outcome.err) or _CONTROL.search(outcome.err.replace("\n", "")):
            wrong.append(f"on the error stream: {outcome.err[-300:]!r}")
        return wrong + self._figure_faults(given, case, outcome)

    def _left(self, given: Format, case: Case) -> list[str]:
        after = digests(case.place)
        changed = sorted(
            name
            for name in after.keys() | case.before.keys()
            if after.get(name) != case.before.get(name) and not name.startswith(given.places or "\0")
        )
        return [f"refused, but wrote {', '.join(changed[:5])}"] if changed else []

    def _figure_faults(self, given: Format, case: Case, outcome: Outcome) -> list[str]:
        try:
            figures = self._figures(given, case, outcome)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"exit code {outcome.code}, but no result: {type(error).__name__} {error}"]
        try:
            expected, where = self._expected(given, case), "another figure than the file says"
        except NotComputedError:
            return []
        except AnotherError as error:
            return [f"accepted, although no model is meant: {error}"]
        except ValueError as error:
            expected, where = self.unharmed(given), f"another figure than that of the unharmed file ({error})"
        found = given.compare(figures, expected)
        return [f"{where}: {found}"] if found else []

    def _figures(self, given: Format, case: Case, outcome: Outcome) -> Figures:
        (case.place / "stdout").write_bytes(outcome.out.encode())
        return given.figures(case.place) | ({"code": outcome.code} if 1 in given.codes else {})

    def _expected(self, given: Format, case: Case) -> Any:
        """Return the figures that the file means; see `Worker.call` for what is raised."""
        if not given.expected:
            raise ValueError("whatever it says")
        return self.worker.call(f"tests.fuzz.formats:{given.expected}", case.place, *_arguments(given, case))


def _arguments(given: Format, case: Case) -> list[Any]:
    return {
        "expected_model": [given.file.split("/")[0]],
        "expected_text": [case.words[3]] if len(case.words) > 3 else [],
        "expected_chat": [given.file],
        "expected_words": [list(case.words)],
        "expected_spec": [list(case.words)],
    }.get(given.expected, [])


def refusal_faults(err: str) -> list[str]:
    """Return what is wrong with how a command refused its input."""
    wrong = []
    if not err.startswith("saap: ") or not err.endswith("\n"):
        wrong.append(f"no line of ours: {err[-300:]!r}")
    elif err.count("\n") != 1 or _CONTROL.search(err[:-1]):
        wrong.append(f"more than a line of text: {err[-300:]!r}")
    if len(err) > LONGEST:
        wrong.append(f"a line of {len(err)} characters: {err[:200]!r}")
    if _UNFORESEEN.search(err):
        wrong.append(f"an error that nobody foresaw: {err[-400:]!r}")
    return wrong


def digests(place: Path) -> dict[str, str]:
    """Return a digest of each file below a directory, by path; empty directories too."""
    return {
        str(path.relative_to(place)): hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in place.rglob("*")
    }


def shown(words: Sequence[str]) -> str:
    """Return words as a shell takes them, as far as they are not too long."""
    return " ".join(word if re.fullmatch(r"[\w./:@#=-]+", word) else ascii(word[:80]) for word in words)
