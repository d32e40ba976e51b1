"""Locks: one process at a time, who holds it, and nothing left behind."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from saap_jax.llama.files.write import new_output
from saap_jax.runtime.files import held

HOLD = """
import sys, time
from pathlib import Path
from saap_jax.runtime.files import held
with held(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_holds_it_until_a_kill_releases_it(tmp_path):
    runs = tmp_path / "runs"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(runs / "one")], stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        start = time.monotonic()
        with pytest.raises(ValueError, match="the run is in use: process") as caught, held(runs / "one", "the run"):
            pytest.fail("two at once")
        assert time.monotonic() - start < 2
        for said in (f"process {other.pid} on {os.uname().nodename}, since 2", str(runs / ".one.lock")):
            assert said in str(caught.value)
        with held(runs / "two", "another run"):
            assert sorted(os.listdir(runs)) == [".one.lock", ".two.lock"]
        (runs / ".one.lock").write_bytes(b"process 1\x1b[31m\n\xff" + b"a" * 9999)
        with pytest.raises(ValueError, match=r"in use: process 1\[31m") as caught, held(runs / "one", "it"):
            pytest.fail("two at once")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 600
        other.kill()
    assert os.listdir(runs) == [".one.lock"]
    with held(runs / "one", "the run"):
        assert f"process {os.getpid()} " in (runs / ".one.lock").read_text()
    assert os.listdir(runs) == []


def test_nothing_is_left_behind(tmp_path):
    deep = tmp_path / "a" / "b" / "run"
    with held(deep, "it"):
        assert deep.parent.is_dir()
    assert os.listdir(tmp_path) == []
    with held(deep, "it"):
        (deep.parent / "made").write_text("x")
    assert os.listdir(deep.parent) == ["made"]


def test_a_thread_may_hold_it_twice_and_another_may_not(tmp_path):
    found: list[str] = []

    def try_it() -> None:
        try:
            with held(tmp_path / "one", "it"):
                found.append("two at once")
        except ValueError as error:
            found.append(str(error))

    with held(tmp_path / "one", "it"):
        with held(tmp_path / "one", "it"):
            pass
        (thread := threading.Thread(target=try_it)).start()
        thread.join()
    assert found[0].startswith(f"it is in use: process {os.getpid()} ")
    try_it()
    assert found[1:] == ["two at once"], "it is free again"


@pytest.mark.parametrize("suffix", [None, ".gguf"])
def test_two_outputs_of_one_name_do_not_mix(tmp_path, suffix):
    """The second is refused while the first writes; what a killed one left is removed, and a lock is no obstacle."""
    target = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left").write_text("of a killed process")
    (tmp_path / ".out.lock").write_text("process 1 on nowhere")
    refused: list[BaseException] = []

    def second() -> None:
        try:
            with new_output(target, "it", suffix=suffix):
                pass
        except ValueError as error:
            refused.append(error)

    with new_output(target, "it", suffix=suffix) as place:
        (thread := threading.Thread(target=second)).start()
        thread.join()
        (place if suffix else place / "file").write_text("x")
    assert "is in use" in str(refused[0])
    assert os.listdir(tmp_path) == ["out"]
    assert Path(target if suffix else target / "file").read_text() == "x"
