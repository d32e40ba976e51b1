"""What a command says when it ends by an error: one line on the error stream, whatever the error was."""

import contextlib
import difflib
import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable

from saap_jax.runtime.processes import place
from saap_jax.runtime.visible import visible

READER_GONE = 141
"""Exit code where the reader of standard output has gone (`saap ... | head -1`): the one that a shell gives then."""

_LONGEST = 2000
"""The most characters of a message that are printed."""


class UsageError(Exception):
    """Bad words on the command line."""


def failed(error: BaseException) -> int:
    """Say in one line why a command failed, and return its exit code.

    Errors that nobody foresaw are defects of this program: their line names a file that has the traceback.
    """
    if isinstance(error, BrokenPipeError):
        return reader_gone()
    return fail(explained(error), 2)


def explained(error: BaseException) -> str:
    """Return what an error says, in one line, and what to do if the error itself does not say it.

    >>> explained(ValueError("ratios: expected numbers,\\n got none"))
    'ratios: expected numbers, got none'
    """
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}; nothing half-written was kept: free some space, then run it again"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        where = "" if said == "MemoryError" else f" ({said})"
        return f"out of memory{where}; take smaller batches, shorter windows, bfloat16, or more devices"
    if isinstance(error, ValueError | OSError | UsageError):
        return said
    if isinstance(error, RecursionError):
        return f"what was given is nested too deeply to be read; {_traced(error)}"
    return f"{type(error).__name__}: {said}; nobody foresaw this error, please report it; {_traced(error)}"


def fail(message: str, code: int) -> int:
    """Print an error in one line, and return the exit code."""
    line = visible(" ".join(message.split()))
    if len(line) > _LONGEST:
        left_out = len(line) - _LONGEST
        line = f"{line[: _LONGEST // 2]} ... ({left_out:,} characters left out) ... {line[-_LONGEST // 2 :]}"
    with contextlib.suppress(BrokenPipeError):
        print(f"saap: {place()}{line}", file=sys.stderr, flush=True)
    return code


def reader_gone() -> int:
    """Give up standard output, which nobody reads any more, without a word; return the exit code."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_GONE


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a question for the known word that looks most like another one; empty if none does.

    Of options, `--examples` is taken for `--calibration.examples` too.

    >>> suggestion("comapre", ["compare", "score"]), suggestion("zzz", ["compare", "score"])
    ('; did you mean compare?', '')
    >>> suggestion("--exampels", ["--calibration.examples", "--name"])
    '; did you mean --calibration.examples?'
    """
    known = list(known)
    ends = {name: name.lstrip("-").rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if not near:
        end = difflib.get_close_matches(word.lstrip("-").rpartition(".")[2], set(ends.values()), n=1, cutoff=0.75)
        near = [name for name in known if [ends[name]] == end]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _traced(error: BaseException) -> str:
    """Write the traceback of an error to a file of its own, and say where it is."""
    try:
        text = f"{sys.argv}\n" + "".join(traceback.format_exception(error))
        with tempfile.NamedTemporaryFile(
            "w", prefix="saap-", suffix=".traceback", encoding="utf-8", errors="backslashreplace", delete=False
        ) as file:
            file.write(text)
    except Exception:  # a full disk, no memory: the line itself matters more
        return "SAAP_DEBUG=1 shows the traceback, which could not be written"
    return f"traceback: {file.name}"
