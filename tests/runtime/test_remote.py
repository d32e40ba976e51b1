"""Addresses: fetched once for each state, sent whole or not at all, errors in one line."""

import logging
from contextlib import contextmanager
from pathlib import Path

import pytest

from saap_jax.checks import check_local
from saap_jax.config.method import is_factory
from saap_jax.runtime.remote import exists, fetched, send, staged
from tests.buckets import use

ADDRESS = "gs://bucket/models/small"
PATTERNS = ["*.json", "*.safetensors"]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return use(monkeypatch)


@pytest.fixture
def model(tmp_path):
    """Return a directory of files, some in a directory within it."""
    place = tmp_path / "model"
    (place / "0" / "items").mkdir(parents=True)
    for name in ("config.json", "a.bin", "z.bin", "0/items/.zarray", "0/items/d"):
        (place / name).write_text(name * 1000)
    return place


def contents(place: Path) -> dict[str, bytes]:
    return {str(each.relative_to(place)): each.read_bytes() for each in place.rglob("*") if each.is_file()}


def read(place: Path):
    return place.read_bytes() if place.is_file() else contents(place)


def put(bucket, name, text, address=ADDRESS):
    bucket.pipe_file(f"{bucket._strip_protocol(address)}/{name}", text.encode())


@contextmanager
def dying(bucket, name):
    """Have the line die at objects of a name."""
    bucket.dies_at = name
    try:
        yield
    finally:
        bucket.dies_at = ""


def test_what_goes_up_comes_down(bucket, model):
    assert not exists(ADDRESS)
    send(model, ADDRESS)
    assert exists(ADDRESS)
    assert bucket.names(ADDRESS) == set(contents(model)), "nothing else is left there"
    bucket.written.clear()
    send(model, ADDRESS)
    assert not bucket.written, "it is there"
    here = fetched(f"{ADDRESS}/", PATTERNS)
    assert here.name == "small"
    assert contents(here) == contents(model)
    with pytest.raises(FileExistsError, match="exists already and is never overwritten"):
        send(next(model.glob("*.bin")).parent / "0", ADDRESS)


def test_a_state_is_fetched_once_and_a_change_is_seen(bucket, caplog):
    put(bucket, "model.safetensors", "weights")
    put(bucket, "config.json", "{}")
    put(bucket, "optimizer.bin", "large")
    put(bucket, "checkpoints/model.safetensors", "large")
    with caplog.at_level(logging.WARNING):
        first = fetched(ADDRESS, PATTERNS)
    assert contents(first) == {"model.safetensors": b"weights", "config.json": b"{}"}
    assert "2 files" in caplog.text
    bucket.read.clear()
    assert fetched(ADDRESS, PATTERNS) == first
    assert not bucket.read
    put(bucket, "model.safetensors", "changed")
    assert (fetched(ADDRESS, PATTERNS) / "model.safetensors").read_text() == "changed"
    assert (first / "model.safetensors").read_text() == "weights", "who still reads the old one keeps it"


def test_a_file_alone(bucket, tmp_path):
    file = tmp_path / "x.gguf"
    file.write_text("GGUF" * 1000)
    send(file, "gs://bucket/x.gguf")
    assert bucket.names("gs://bucket") == {"x.gguf"}
    here = fetched("gs://bucket/x.gguf", PATTERNS)
    assert (here.name, here.read_bytes()) == ("x.gguf", file.read_bytes())


@pytest.mark.parametrize("name", ["small", "x.gguf"])
@pytest.mark.parametrize("dies_at", ["a.bin", "0/items/d", "config.json"])
def test_what_dies_on_the_way_is_no_model_and_the_same_again_sends_it(name, dies_at, bucket, model, tmp_path):
    """Of five files: `config.json` is the last one."""
    place, address = model, f"gs://bucket/models/{name}"
    if "gguf" in name:
        place, dies_at = tmp_path / name, "x.gguf"
        place.write_text("GGUF" * 1000)
    bucket.written.clear()
    with pytest.raises(ValueError, match="the line went dead") as error, dying(bucket, dies_at):
        send(place, address)
    assert "\n" not in str(error.value)
    assert not exists(address)
    assert not {"config.json", "x.gguf", "small/config.json"} & bucket.names("gs://bucket/models"), "nor to others"
    send(place, address)
    assert read(fetched(address, PATTERNS)) == read(place)
    assert bucket.names(address if place.is_dir() else "gs://bucket/models") == ({*contents(place)} or {name})


def test_a_marked_address_is_no_model_and_is_sent_whole(bucket, model):
    """What a kill left of another model is gone."""
    put(bucket, "config.json", "{}")
    put(bucket, "left.bin", "left")
    assert exists(ADDRESS), "control"
    put(bucket, ".small.sending", "being sent", "gs://bucket/models")
    assert not exists(ADDRESS)
    send(model, ADDRESS)
    assert exists(ADDRESS)
    assert bucket.names(ADDRESS) == set(contents(model))


def test_what_dies_on_the_way_down_goes_on(bucket):
    put(bucket, "a.safetensors", "a" * 1000)
    put(bucket, "b.safetensors", "b" * 1000)
    with pytest.raises(ValueError, match="the line went dead"), dying(bucket, "b.safetensors"):
        fetched(ADDRESS, PATTERNS)
    here = fetched(ADDRESS, PATTERNS)
    assert contents(here) == {"a.safetensors": b"a" * 1000, "b.safetensors": b"b" * 1000}
    assert len(bucket.read) == 3, "the first one was not fetched again"


def test_an_output_is_staged_and_sent(bucket, tmp_path, monkeypatch):
    with staged(ADDRESS) as place:
        assert bucket.written, "that one may write there is known before any work"
        assert not exists(ADDRESS)
        place.mkdir()
        (place / "config.json").write_text("{}")
    assert bucket.names(ADDRESS) == {"config.json"}
    assert not place.exists()
    with pytest.raises(FileExistsError, match="never overwritten"), staged(ADDRESS):
        pytest.fail("it is there")
    with pytest.raises(ValueError, match="mine"), staged(f"{ADDRESS}-failed"):
        raise ValueError("mine")
    assert bucket.names(f"{ADDRESS}-failed") == set(), "after an error nothing is there"
    monkeypatch.setenv("HOME", str(tmp_path))
    with staged("~/here") as place:
        assert place == tmp_path / "here"
        assert not exists("~/here")
        place.mkdir()
    assert exists("~/here")


def test_what_was_made_is_kept_where_sending_dies(bucket):
    block = staged(ADDRESS)
    place = block.__enter__()
    place.mkdir()
    (place / "config.json").write_text("{}")
    bucket.dies_at = "config.json"
    with pytest.raises(ValueError, match="what was made is whole at") as error:
        block.__exit__(None, None, None)
    assert str(place) in str(error.value)
    assert contents(place) == {"config.json": b"{}"}
    bucket.dies_at = ""
    with staged(ADDRESS) as place:
        assert not place.exists(), "the same command makes it anew"
        place.mkdir()
        (place / "pruned.json").write_text("{}")
    assert bucket.names(ADDRESS) == {"pruned.json"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("Please install gcsfs"), "take the package gcsfs, which is not installed; run pip install gcsfs"),
        (PermissionError("403"), r"cannot be reached, or refuses \(403\)"),
        (type("E", (Exception,), {"__module__": "google.auth.exceptions"})("no\ncredentials"), r"\(no credentials\)"),
    ],
)
def test_errors_of_the_way_are_one_line(error, said, bucket, monkeypatch):
    def fails(path):
        raise error

    monkeypatch.setattr(bucket, "info", fails)
    for call in (lambda: fetched(ADDRESS, PATTERNS), lambda: exists(ADDRESS), lambda: send(Path(__file__), ADDRESS)):
        with pytest.raises(ValueError, match=said) as found:
            call()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("address", ["gs://bucket", "gs://", "http://x/y", "file:///x/y", "gs://bucket/../x"])
def test_an_address_that_is_none(address, bucket):
    with pytest.raises(ValueError, match="^[^ ]+ expected an address of gs://, s3://, az://"):
        fetched(address, PATTERNS)
    with pytest.raises(FileNotFoundError, match="found none that is whole there; check the address"):
        fetched(ADDRESS, PATTERNS)
    with pytest.raises(ValueError, match="out: expected a path of this machine, got the address gs://x/y"):
        check_local("out", "gs://x/y")
    assert not is_factory("gs://bucket/model:v1")
    assert is_factory("bucket/model.py:v1")
