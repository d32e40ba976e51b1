"""Where text comes from: a source is written `FORMAT:PATH` (or `builtin:NAME`) and gives documents.

| source                    | documents                                                                          |
|---------------------------|------------------------------------------------------------------------------------|
| `builtin:reference`       | topics of the Python language reference, from the standard library's `pydoc_data`  |
| `builtin:descriptions`    | descriptions of data sets, from the installed tensorflow-datasets package          |
| `text:PATH`               | the file, as one document                                                          |
| `jsonl:PATH#FIELD`        | string FIELD (default `text`) of the JSON object on each line                      |
| `wikitext:PATH`           | a raw WikiText file, as one document, joined as papers join its rows               |
| `ptb:PATH`                | a Penn Treebank file (a sentence a line), as one document, sentences joined by " " |
| `instruct:PATH`           | instructions with responses, see `instruct`: Alpaca's prompt with the response     |
| `tfds:NAME@SPLIT#FIELD`   | text FIELD of a prepared TensorFlow data set's examples, see `tfds_source`         |

A plain path that ends in .txt or .md means `text:`, one that ends in .jsonl (or .jsonl#FIELD) means `jsonl:`. A
relative PATH that does not exist as given is looked up below the directory that the variable SAAP_DATA names.
"""

import ast
import difflib
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saap_jax.data import tfds_source
from saap_jax.data.instruct import Exchange, exchange_of
from saap_jax.runtime.errors import fields_of, parse_json, read_lines, reading

Part = Literal["calibration", "evaluation", "all"]
"""Which of a built-in source's documents to read; a file is always read whole."""

DEFAULT_FIELD = "text"
"""Field of a JSON line that is read when the source names none."""

SHORT = 100
"""Characters below which two equal documents are taken for a coincidence ("Yes."), not for an overlap."""

REPEATED = 40
"""Characters from which a paragraph that a built-in source repeats is left out the second time."""


class Document(NamedTuple):
    """A piece of running text; `name` tells it apart from the others of its source."""

    name: str
    text: str


class Source(NamedTuple):
    """A parsed source: `FORMAT:PATH`, and the field of a JSON line or of a TFDS example (else empty)."""

    format: str
    path: str
    field: str = ""


def parse_source(source: str) -> Source:
    """Split a source's text into format, path and field, without looking at any file.

    Raises ValueError for an unknown format or built-in name, with the nearest known one.

    >>> parse_source("jsonl:web/c4.jsonl#text")
    Source(format='jsonl', path='web/c4.jsonl', field='text')
    >>> parse_source("notes.md")
    Source(format='text', path='notes.md', field='')
    """
    kind, colon, path = source.partition(":")
    if not colon:
        kind, path = _SUFFIXES.get(Path(source.partition("#")[0]).suffix, ""), source
    if kind == "builtin" and path in BUILTIN:
        return Source(kind, path)
    if kind not in (*FORMATS, "tfds") or not path:
        raise ValueError(_unknown(source))
    if kind == "tfds":
        tfds_source.parse_reference(source, path.partition("#")[0])
    if kind not in ("jsonl", "tfds"):
        return Source(kind, path)
    path, _, field = path.partition("#")
    return Source(kind, path, field or DEFAULT_FIELD)


def read_texts(source: str, part: Part = "all") -> tuple[Document, ...]:
    """Read the documents of a source, in an order that never changes; those of nothing but white space are left out.

    `part` chooses among the documents of a built-in source, whose two parts are fixed (see `part_of`) and share no
    paragraph. A file has no parts: keep calibration and evaluation apart by giving them different files, which
    `check_disjoint` verifies. Raises ValueError for an unknown source and for a file that is empty, not UTF-8 or not
    in its format; FileNotFoundError for a missing one.
    """
    parsed = parse_source(source)
    if parsed.format == "builtin":
        documents = BUILTIN[parsed.path]()
        documents = tuple(d for d in documents if part in ("all", part_of(d.name)))
    elif parsed.format == "tfds":
        reference = tfds_source.parse_reference(source, parsed.path)
        documents = tuple(Document(*each) for each in tfds_source.read_examples(reference, parsed.field, part))
    else:
        documents = FORMATS[parsed.format](_find(source, parsed.path), source, parsed)
    documents = tuple(d for d in documents if d.text.strip())
    if not documents:
        raise ValueError(f"data source {source!r}: expected text, found none; give a file that is not empty")
    return documents


def read_exchanges(source: str) -> tuple[Exchange, ...]:
    """Read the instructions and responses of a source `instruct:PATH`.

    Raises:
        ValueError, FileNotFoundError: as `read_texts`; the source is of another format.
    """
    parsed = parse_source(source)
    if parsed.format != "instruct":
        raise ValueError(f"data source {source!r}: expected instruct:PATH, got the format {parsed.format}")
    return _exchanges(_find(source, parsed.path), source)


def join_texts(documents: Sequence[Document]) -> str:
    """Join documents into one text, a blank line between any two."""
    return "\n\n".join(document.text for document in documents)


def part_of(name: str) -> Literal["calibration", "evaluation"]:
    """Return the part that a built-in document of this name belongs to: the lowest bit of the name's SHA-256.

    It depends on nothing else, so no seed and no other version of the installed packages moves a document across.
    """
    return "evaluation" if hashlib.sha256(name.encode()).digest()[0] & 1 else "calibration"


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Refuse a file, or a document of at least 100 characters, that is used for calibration and for evaluation.

    Files are compared by content, so that copies and links count as the same; documents by their words. Built-in
    sources are compared by their calibration and evaluation parts, and pass. Raises ValueError.
    """
    seen = {digest: source for source in calibration for digest, _ in _fingerprints(source, "calibration")}
    for source in evaluation:
        for digest, what in _fingerprints(source, "evaluation"):
            if digest in seen:
                raise ValueError(
                    f"data: {what} of evaluation source {source!r} is also in calibration source {seen[digest]!r}; "
                    "calibrate on one text and evaluate on another"
                )


def _fingerprints(source: str, part: Part) -> Iterator[tuple[str, str]]:
    """Yield (digest, what it is the digest of) for a source's file and for each of its longer documents."""
    parsed = parse_source(source)
    if parsed.format not in ("builtin", "tfds"):
        with open(_find(source, parsed.path), "rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest(), "the file"
    for document in read_texts(source, part):
        if len(document.text) >= SHORT:
            yield hashlib.sha256(_words(document.text).encode()).hexdigest(), f"document {document.name!r}"


def _words(text: str) -> str:
    return " ".join(text.split())


def _unknown(source: str) -> str:
    """Return the message for a source whose format or built-in name does not exist."""
    builtin = {name: f"builtin:{name}" for name in BUILTIN}
    known = (
        builtin
        | {name: name for name in builtin.values()}
        | {name: f"{name}:{'NAME' if name == 'tfds' else 'PATH'}" for name in (*FORMATS, "tfds")}
    )
    near = difflib.get_close_matches(source, known, 1) or difflib.get_close_matches(source.partition(":")[0], known, 1)
    hint = f"; did you mean {known[near[0]]}?" if near else ""
    expected = ", ".join(dict.fromkeys(known.values()))
    return f"data source {source!r}: expected one of {expected}, or a path ending in {', '.join(_SUFFIXES)}{hint}"


def _find(source: str, path: str) -> Path:
    """Return the file: the path as given, or below SAAP_DATA."""
    given, root = Path(path), os.environ.get("SAAP_DATA")
    candidates = [given, *([Path(root) / given] if root else [])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if given.is_absolute():
        where = "check the path"
    elif root:
        where = f"neither here nor below SAAP_DATA={root}"
    else:
        where = "not found here, and SAAP_DATA, below which relative paths are looked up next, is not set"
    raise FileNotFoundError(f"data source {source!r}: expected a file {path}; {where}")


def _decode(source: str, path: Path) -> str:
    """Read a file as UTF-8, with `\\n` line ends and without a byte order mark."""
    with reading(f"data source {source!r}", "text in UTF-8"):
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


def _records(path: Path, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and object of each line of JSON; blank lines are passed over."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"data source {source!r}: line {number}"
        record = parse_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        yield f"line {number}", record


def _exchanges(path: Path, source: str) -> tuple[Exchange, ...]:
    return tuple(exchange_of(name, record, source) for name, record in _records(path, source))


def _read_text(path: Path, source: str, parsed: Source) -> tuple[Document, ...]:
    return (Document(source, _decode(source, path)),)


def _read_jsonl(path: Path, source: str, parsed: Source) -> tuple[Document, ...]:
    documents = []
    for name, record in _records(path, source):
        value = record.get(parsed.field)
        if not isinstance(value, str):
            raise ValueError(
                f"data source {source!r}: {name}: expected a string field {parsed.field!r}, "
                f"found fields: {fields_of(record)}; name one as PATH#FIELD"
            )
        documents.append(Document(name, value))
    return tuple(documents)


def _read_wikitext(path: Path, source: str, parsed: Source) -> tuple[Document, ...]:
    """Join the rows as `"\\n\\n".join(dataset["text"])` does, where a blank row is "" and others keep their `\\n`."""
    rows = _decode(source, path).removesuffix("\n").split("\n")
    return (Document(source, "\n\n".join(row + "\n" if row.strip() else "" for row in rows)),)


def _read_ptb(path: Path, source: str, parsed: Source) -> tuple[Document, ...]:
    return (Document(source, " ".join(row.strip() for row in _decode(source, path).split("\n") if row.strip())),)


def _read_instruct(path: Path, source: str, parsed: Source) -> tuple[Document, ...]:
    return tuple(Document(each.name, each.prompt + each.response) for each in _exchanges(path, source))


FORMATS: dict[str, Callable[[Path, str, Source], tuple[Document, ...]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "wikitext": _read_wikitext,
    "ptb": _read_ptb,
    "instruct": _read_instruct,
}
"""Format of a file -> reader of (the file, source as written, parsed source)."""

_SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "jsonl"}


@functools.cache
def _reference() -> tuple[Document, ...]:
    try:
        from pydoc_data.topics import topics  # some distributions leave it out
    except ImportError:
        raise ValueError(
            "data source 'builtin:reference': this Python has no module pydoc_data; install its full standard library"
        ) from None
    return _unrepeated(Document(name, topics[name]) for name in sorted(topics))


@functools.cache
def _descriptions() -> tuple[Document, ...]:
    # The package is only found, never imported: importing it takes seconds and reading its text needs no code of it.
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("data source 'builtin:descriptions': tensorflow-datasets is not installed; install it")
    root = Path(spec.submodule_search_locations[0])
    readmes = [
        Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(root.glob("datasets/*/README.md"))
    ]
    return _unrepeated([*readmes, *_description_constants(root)])


def _description_constants(root: Path) -> Iterator[Document]:
    """Yield the string constants `…_DESCRIPTION` of the data-set modules below `root`, except templates with `{…}`."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("core/", "scripts/", "testing/")) or name.endswith("_test.py"):
            continue
        code = path.read_text(encoding="utf-8")
        if "_DESCRIPTION" not in code:
            continue
        for node in ast.parse(code).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=constant)], value=ast.Constant(value=str(text))):
                    if constant.endswith("_DESCRIPTION") and not re.search(r"\{\w*\}", text):
                        yield Document(f"{name}:{constant}", text)


def _unrepeated(documents: Iterator[Document] | list[Document]) -> tuple[Document, ...]:
    """Leave out each paragraph that an earlier document, or this one, has had already.

    Half of the reference's topics are chapters that hold other topics whole: without this, what is calibrated on
    would come back in the evaluation.
    """
    seen, kept = set(), []
    for name, text in documents:
        fresh = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            words = _words(paragraph)
            if len(words) < REPEATED or words not in seen:
                fresh.append(paragraph.rstrip())
            seen.add(words)
        kept.append(Document(name, "\n\n".join(fresh).strip("\n")))
    return tuple(kept)


BUILTIN: dict[str, Callable[[], tuple[Document, ...]]] = {"reference": _reference, "descriptions": _descriptions}
"""Name of a built-in source -> its documents, read without network or files of the user."""
