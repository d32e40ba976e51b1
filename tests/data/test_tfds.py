"""Local text becomes a TensorFlow data set and is read back, without TensorFlow and without network."""

import runpy
import sys
from pathlib import Path

import pytest

from saap_jax.data import tfds_source
from saap_jax.data.sources import check_disjoint, read_texts
from saap_jax.recovery.packing import read_pieces

BUILDER = Path(__file__).parents[2] / "experiments" / "tfds_builder.py"
DOCUMENTS = [f"Document {number}: " + f"words and words {number} é " * 12 for number in range(20)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory of data sets with one of 20 documents."""
    root = tmp_path_factory.mktemp("data")
    text = root / "docs.jsonl"
    text.write_text("".join(f'{{"text": "{document}"}}\n' for document in DOCUMENTS), encoding="utf-8")
    build = runpy.run_path(str(BUILDER))["build_data_set"]
    build("my_text", [f"jsonl:{text}"], root / "sets", 0.2)
    build("whole", [f"jsonl:{text}"], root / "sets", 0)
    with pytest.raises(ValueError, match="expected no data set at"):
        build("whole", [f"jsonl:{text}"], root / "sets", 0)
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


def test_it_is_trained_on(sets, tokenizer):
    found = read_pieces(["tfds:my_text"], tokenizer, length=32, template="alpaca", seed=0)
    assert found.documents == 16
    whole = sum(len(tokenizer.encode(document.text)) for document in read_texts("tfds:my_text"))
    lost = sum(len(tokenizer.encode(document.text)) % 32 == 1 for document in read_texts("tfds:my_text"))
    assert sum(len(piece.tokens) for piece in found.pieces) == whole - lost
    assert found.left_out == lost


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("tfds:c4/en/train", ValueError, r"expected tfds:NAME\[/CONFIG\]"),
        ("tfds:c4/en", FileNotFoundError, r"expected the data set c4/en, prepared below .*tfds build c4/en --data_dir"),
        ("tfds:my_text:2.0.0", FileNotFoundError, "expected the data set my_text:2.0.0"),
        ("tfds:my_text@trian", ValueError, "expected a split of train, validation, or a slice of one, got 'trian'"),
        ("tfds:whole", ValueError, "expected a split validation or test for evaluation, found train"),
        ("tfds:my_text#txt", ValueError, r"expected a feature 'txt' of type Text, found features: name \(Text\)"),
    ],
)
def test_what_is_not_there_is_one_clear_line(sets, source, error, message):
    with pytest.raises(error, match=message) as raised:
        read_texts(source, "evaluation")
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
