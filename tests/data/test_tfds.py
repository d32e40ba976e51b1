"""Local text becomes a TensorFlow data set and is read back, without TensorFlow and without network."""

import sys

import pytest

from saap_jax.data import tfds_builder, tfds_source
from saap_jax.data.pieces import read_pieces
from saap_jax.data.scenarios import parse_scenario
from saap_jax.data.sources import Document, check_disjoint, parse_source, read_texts
from saap_jax.data.tfds_builder import build_data_set, split_documents
from saap_jax.data.windows import calibration_windows

DOCUMENTS = [f"Document {number}: " + f"words and words {number} é " * 12 for number in range(20)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory of data sets with one of 20 documents."""
    root = tmp_path_factory.mktemp("data")
    text = root / "docs.jsonl"
    text.write_text("".join(f'{{"text": "{document}"}}\n' for document in DOCUMENTS), encoding="utf-8")
    build_data_set("my_text", [f"jsonl:{text}"], validation=0.2, data_dir=root / "sets")
    return root / "sets"


@pytest.fixture
def sets(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return prepared


def test_every_document_is_in_one_split(sets):
    train, held = (
        [document.text for document in read_texts("tfds:my_text", part)] for part in ("calibration", "evaluation")
    )
    assert sorted(train + held) == sorted(DOCUMENTS)
    assert (len(train), len(held)) == (16, 4)
    check_disjoint(["tfds:my_text"], ["tfds:my_text"])
    with pytest.raises(ValueError, match="is also in calibration source"):
        check_disjoint(["tfds:my_text@train"], ["tfds:my_text@train[:3]"])
    assert "tensorflow" not in sys.modules


def test_version_split_and_field_can_be_named(sets):
    first = read_texts("tfds:my_text:1.0.0@train[:3]")
    assert [document.text for document in first] == [d.text for d in read_texts("tfds:my_text")[:3]]
    assert first[0].name == "train[:3] 0"
    names = [document.text for document in read_texts("tfds:my_text@train#name")]
    assert all(name.startswith("line ") for name in names)
    assert len(read_texts("tfds:my_text@train+validation")) == 20


def test_it_calibrates(sets, tokenizer):
    windows = calibration_windows("tfds:my_text", tokenizer, 3, 16, seed=0)
    assert windows.tokens.shape == (3, 16)


def test_it_is_trained_on(sets, tokenizer):
    found = read_pieces(["tfds:my_text"], tokenizer, length=32, template="alpaca", seed=0)
    assert found.documents == 16
    whole = sum(len(tokenizer.encode(document.text)) for document in read_texts("tfds:my_text"))
    lost = sum(len(tokenizer.encode(document.text)) % 32 == 1 for document in read_texts("tfds:my_text"))
    assert sum(len(piece.tokens) for piece in found.pieces) == whole - lost
    assert found.left_out == lost


def test_a_reference_is_read_without_files():
    parsed = parse_source("tfds:c4/en:3.0.1@train[:1%]#text")
    assert parsed == ("tfds", "c4/en:3.0.1@train[:1%]", "text")
    assert parse_source("tfds:lm1b").field == "text"
    assert parse_scenario("tfds:wiki40b/en@train#text").name == "wiki40b-en"
    reference = tfds_source.parse_reference("", "wiki40b/en:1.3.0")
    assert (reference.name, reference.version, reference.split) == ("wiki40b/en", "1.3.0", "")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("tfds:c4/en/train", ValueError, r"expected tfds:NAME\[/CONFIG\]"),
        ("tfds:c4/en", FileNotFoundError, r"expected the data set c4/en, prepared below .*tfds build c4/en --data_dir"),
        ("tfds:my_text:2.0.0", FileNotFoundError, "expected the data set my_text:2.0.0"),
        ("tfds:my_text@trian", ValueError, "expected a split of train, validation, or a slice of one, got 'trian'"),
        ("tfds:my_text#txt", ValueError, r"expected a feature 'txt' of type Text, found features: name \(Text\)"),
    ],
)
def test_what_is_not_there_is_one_clear_line(sets, source, error, message):
    with pytest.raises(error, match=message) as raised:
        read_texts(source)
    assert "\n" not in str(raised.value)


def test_a_split_that_is_too_large_has_to_be_sliced(sets, monkeypatch):
    monkeypatch.setattr(tfds_source, "MOST", 10)
    with pytest.raises(ValueError, match=r"expected at most 10 examples, got 16; take a slice, such as @train\[:10\]"):
        read_texts("tfds:my_text")
    assert len(read_texts("tfds:my_text@train[:10]")) == 10


def test_another_file_format_is_refused(sets, tmp_path, monkeypatch):
    target = tmp_path / "my_text" / "1.0.0"
    target.mkdir(parents=True)
    for path in (sets / "my_text" / "1.0.0").iterdir():
        content = path.read_bytes()
        (target / path.name).write_bytes(content.replace(b'"fileFormat": "array_record"', b'"fileFormat": "tfrecord"'))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="expected files in the format array_record, got tfrecord"):
        read_texts("tfds:my_text")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "a.txt").write_text("Some text.")
    assert tfds_builder.main(["one", str(tmp_path / "a.txt"), "--validation", "0"]) == 0
    assert "source: tfds:one" in capsys.readouterr().out
    assert [document.text for document in read_texts("tfds:one")] == ["Some text."]
    with pytest.raises(ValueError, match="expected a split validation or test for evaluation, found train"):
        read_texts("tfds:one", "evaluation")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["1.0.0"]  # nothing half written
    for words, message in (
        (["one", str(tmp_path / "a.txt")], "expected no data set at"),
        (["Two", str(tmp_path / "a.txt")], "name: expected small letters"),
        (["two", str(tmp_path / "b.txt")], "expected a file"),
        (["two", str(tmp_path / "a.txt"), "--validation", "1"], "expected a share"),
        (["two", str(tmp_path / "a.txt"), "--version", "1"], "version: expected three numbers"),
        (["two", str(tmp_path / "a.txt"), "--validation", "0.6"], "expected a document or more for the split train"),
    ):
        assert tfds_builder.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "two").exists()


def test_the_split_depends_on_the_documents_alone():
    documents = [Document(str(number), text) for number, text in enumerate(DOCUMENTS)]
    first, again = (split_documents(documents, 0.25) for _ in range(2))
    assert first == again
    assert [len(members) for members in first.values()] == [15, 5]
