import json
import re
import sys

import pytest

from saap_jax.data.sources import (
    BUILTIN,
    REPEATED,
    Document,
    check_disjoint,
    join_texts,
    parse_source,
    part_of,
    read_texts,
)

LONG = "The quick brown fox jumps over the lazy dog, and then does so again, which nobody had expected of it. "


def paragraphs(documents):
    return {" ".join(p.split()) for d in documents for p in re.split(r"\n\s*\n", d.text)}


def test_a_source_is_a_format_and_a_path():
    assert parse_source("a/b.jsonl#output") == ("jsonl", "a/b.jsonl", "output")
    assert (
        parse_source("a#b.jsonl#output") == parse_source("jsonl:a#b.jsonl#output") == ("jsonl", "a#b.jsonl", "output")
    )
    assert parse_source("a#b.txt") == ("text", "a#b.txt", "")
    assert parse_source("text:a:b.rst") == ("text", "a:b.rst", "")
    assert parse_source("tfds:c4/en:3.0.1@train[:1%]") == ("tfds", "c4/en:3.0.1@train[:1%]", "text")


@pytest.mark.parametrize(
    ("source", "near"),
    [
        ("builtin:refrence", "builtin:reference"),
        ("descriptons", "builtin:descriptions"),
        ("wikitxt:a.raw", "wikitext:PATH"),
        ("jsnl:a.jsonl", "jsonl:PATH"),
    ],
)
def test_an_unknown_source_names_the_nearest_known_one(source, near):
    with pytest.raises(ValueError, match=f"did you mean {near}\\?$"):
        parse_source(source)


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_parts_are_disjoint_and_complete(name):
    parts = {part: read_texts(f"builtin:{name}", part) for part in ("calibration", "evaluation", "all")}
    names = {part: [d.name for d in documents] for part, documents in parts.items()}
    assert len(set(names["all"])) == len(names["all"])
    assert not set(names["calibration"]) & set(names["evaluation"])
    assert sorted(names["calibration"] + names["evaluation"]) == sorted(names["all"])
    shared = paragraphs(parts["calibration"]) & paragraphs(parts["evaluation"])
    assert all(len(p) < REPEATED for p in shared)
    sizes = [len(join_texts(parts[part])) for part in ("calibration", "evaluation")]
    assert min(sizes) > 90_000
    assert min(sizes) / sum(sizes) > 0.4


def test_topics_do_repeat_each_other():
    """Without the removal of repeated paragraphs the two parts of the reference would overlap."""
    from pydoc_data.topics import topics

    raw = [Document(name, text) for name, text in topics.items()]
    halves = [[d for d in raw if part_of(d.name) == part] for part in ("calibration", "evaluation")]
    assert sum(len(p) >= REPEATED for p in paragraphs(halves[0]) & paragraphs(halves[1])) > 100


def test_descriptions_are_read_without_importing_the_package():
    before = "tensorflow_datasets" in sys.modules
    names = [d.name for d in read_texts("builtin:descriptions")]
    assert ("tensorflow_datasets" in sys.modules) == before
    assert sum(name.endswith("README.md") for name in names) > 100
    assert sum(name.endswith("_DESCRIPTION") for name in names) > 100


def test_parts_are_pinned():
    """The expected values are the lowest bits of `printf NAME | sha256sum | cut -c1-2`: 25, 8d, 06, 08, 10."""
    parts = [part_of(name) for name in ("assert", "types", "with", "class", "for")]
    assert parts == ["evaluation"] * 2 + ["calibration"] * 3


def test_text_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert read_texts(str(file)) == (Document(str(file), "one\n\ntwo\n"),)
    assert read_texts(str(file), "calibration") == read_texts(str(file), "evaluation")


def test_a_json_line_is_a_document(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028still one", "n": 1}, {"text": "  "}, {"text": "two"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert [d.text for d in read_texts(str(file))] == ["one\u2028still one", "two"]
    assert join_texts(read_texts(str(file))) == "one\u2028still one\n\ntwo"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "n": 1}', r"line 2: expected a string field 'text', found fields: body \(str\), n \(int\);"),
        ('{"text": 3}', r"line 2: expected a string field 'text', found fields: text \(int\);"),
        ("[1]", "line 2: expected an object, got list"),
        ('{"text": "a", "text": "b"}', "line 2: expected JSON.*'text' comes twice"),
        (json.dumps({f"k{i}": 0 for i in range(10**4)}), r"found fields: k0 \(int\), .* k9 \(int\) and 9990 more;"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_texts(str(file))
    file.write_text('{"text": "fine"}\n')
    assert len(read_texts(str(file))) == 1


@pytest.mark.parametrize("end", ["", "\n"])
def test_wikitext_is_joined_as_papers_do(tmp_path, end):
    file = tmp_path / "wiki.raw"
    file.write_text(" \n = Title = \n \n One . \n Two . " + end)
    rows = ["", " = Title = \n", "", " One . \n", " Two . \n"]
    assert read_texts(f"wikitext:{file}")[0].text == "\n\n".join(rows)
    assert read_texts(f"text:{file}")[0].text != "\n\n".join(rows)


def test_treebank_sentences_are_joined_by_one_blank(tmp_path):
    file = tmp_path / "ptb.txt"
    file.write_text(" no it was n't <unk> \n\n but N of them did \n")
    assert read_texts(f"ptb:{file}")[0].text == "no it was n't <unk> but N of them did"


def test_relative_paths_are_looked_up_below_saap_data(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("found")
    monkeypatch.delenv("SAAP_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"expected a file sub/a\.txt, .*SAAP_DATA, which is not set"):
        read_texts("sub/a.txt")
    monkeypatch.setenv("SAAP_DATA", str(tmp_path))
    assert read_texts("sub/a.txt")[0].text == "found"
    with pytest.raises(FileNotFoundError, match="none here nor below SAAP_DATA="):
        read_texts("sub/b.txt")
    (tmp_path / "here" / "sub").mkdir(parents=True)
    (tmp_path / "here" / "sub" / "a.txt").write_text("nearer")
    monkeypatch.chdir(tmp_path / "here")
    assert read_texts("sub/a.txt")[0].text == "nearer"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_texts("text:~/sub/a.txt")[0].text == "found"
    with pytest.raises(FileNotFoundError, match="expected a file ~nobody/a.txt"):
        read_texts("text:~nobody/a.txt")


def test_the_same_text_is_refused_on_both_sides(tmp_path):
    files = {name: tmp_path / name for name in ("a.txt", "copy.txt", "other.txt", "docs.jsonl", "more.jsonl")}
    files["a.txt"].write_text(LONG)
    files["copy.txt"].write_text(LONG)
    files["other.txt"].write_text(LONG + "Not the same.")
    files["docs.jsonl"].write_text('{"text": "Yes."}\n' + json.dumps({"text": LONG.upper()}))
    files["more.jsonl"].write_text('{"text": "Yes."}\n{"text": "No."}\n' + json.dumps({"text": LONG.upper() + " "}))
    a, copy, other, docs, more = map(str, files.values())
    check_disjoint([a], [other, docs])
    check_disjoint([f"builtin:{name}" for name in BUILTIN], [f"builtin:{name}" for name in BUILTIN])
    with pytest.raises(ValueError, match="the file of evaluation source"):
        check_disjoint([other, a], [a])
    with pytest.raises(ValueError, match="the file of evaluation source"):
        check_disjoint([a], [f"ptb:{copy}"])
    with pytest.raises(ValueError, match="document 'line 3' of evaluation source"):
        check_disjoint([docs], [more])
    files["more.jsonl"].write_text('{"text": "Yes."}\n{"text": "No."}\n')
    check_disjoint([docs], [more])
