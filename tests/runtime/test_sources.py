"""Python files of users: their digests are of what they import from beside them, and what runs is what was digested."""

import os
import sys
from pathlib import Path

import pytest

from saap_jax.estimation.registry import ESTIMATORS, from_file, register
from saap_jax.runtime.digests import code_digest
from saap_jax.runtime.sources import HOME, run_file, source_digest


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """Whatever a test imports is gone behind it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files, and return the first one."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / next(iter(files))


IMPORTS = {
    "plain": {"mine.py": "import helper", "helper.py": "A"},
    "of a part": {"mine.py": "from lib.helper import a", "lib/helper.py": "A"},
    "of a module of a package": {"mine.py": "from lib import helper", "lib/__init__.py": "", "lib/helper.py": "A"},
    "of a package": {"mine.py": "import lib.other", "lib/__init__.py": "A", "lib/other.py": ""},
    "within a function": {"mine.py": "def f():\n    if f:\n        import helper as h", "helper.py": "A"},
    "by another": {"mine.py": "import other", "other.py": "import helper", "helper.py": "import mine\nA"},
    "by a relative name": {"mine.py": "import lib", "lib/__init__.py": "from . import a", "lib/a.py": "A"},
    "from above": {"lib/on/mine.py": "from ..helper import a", "lib/on/__init__.py": "", "lib/__init__.py": "",
                   "lib/helper.py": "A"},
    "of its own package": {"lib/on/mine.py": "import lib.helper", "lib/on/__init__.py": "", "lib/__init__.py": "",
                           "lib/helper.py": "A"},
}  # fmt: skip


@pytest.mark.parametrize("kind", IMPORTS)
def test_a_digest_covers_imports_from_beside(tmp_path, kind):
    file = write(tmp_path, IMPORTS[kind])
    before = source_digest(file)
    write(tmp_path, {name: text.replace("A", "B") for name, text in IMPORTS[kind].items()})
    assert source_digest(file) != before
    write(tmp_path, IMPORTS[kind] | {"unused.py": "A"})
    assert source_digest(file) == before, "control: what it does not import"
    (moved := tmp_path.with_name(f"{tmp_path.name} moved")).mkdir()
    assert source_digest(write(moved, IMPORTS[kind])) == before, "control: in another folder"


def test_a_digest_leaves_out_what_is_installed(tmp_path):
    before = source_digest(write(tmp_path, {"site-packages/mine.py": "import other", "site-packages/other.py": "A"}))
    file = write(tmp_path, {"site-packages/mine.py": "import other", "site-packages/other.py": "B"})
    assert source_digest(file) == before
    (tmp_path / "mine.py").write_text("import saap_jax.types")
    (tmp_path / "saap_jax").symlink_to(HOME)
    assert source_digest(tmp_path / "mine.py") == source_digest(
        write(tmp_path / "alone", {"m.py": "import saap_jax.types"})
    )


FILES = {
    "mine.py": "from lib import middle\nTOP = 1\n\ndef made():\n    return middle.value() + TOP\n",
    "lib/__init__.py": "",
    "lib/middle.py": "from lib.helper import number\n\ndef value():\n    return number\n",
    "lib/helper.py": "number = 1\n",
}


def changed(file: Path, old: str, new: str) -> None:
    """Change a file within the same second, to as many letters."""
    stamps = file.stat()
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns + 1))


def test_a_changed_helper_is_imported_anew(tmp_path):
    """The module that imports it, too; what runs and its digest always change together."""
    file = write(tmp_path, FILES)
    seen = []
    for number in (1, 2, 3, 1):
        (file.parent / "lib/helper.py").write_text(f"number = {number}\n")
        made = from_file(str(file), "made")
        seen.append((made(), code_digest(made, str(file))))
        assert from_file(str(file), "made") is made, "control: nothing is run twice"
    assert [value for value, _ in seen] == [2, 3, 4, 2]
    assert len(dict(seen)) == len({digest for _, digest in seen}) == 3
    changed(file, "TOP = 1", "TOP = 5")
    middle = sys.modules["lib.middle"]
    assert from_file(str(file), "made")() == 6
    assert sys.modules["lib.middle"] is middle, "control: what has not changed stays"


def test_a_helper_that_was_imported_before_is_too(tmp_path, monkeypatch):
    file = write(tmp_path, FILES)
    monkeypatch.syspath_prepend(tmp_path)
    import lib.middle  # pyright: ignore[reportMissingImports]

    changed(tmp_path / "lib/helper.py", "1", "7")
    assert lib.middle.value() == 1
    assert run_file(file)["made"]() == 8


def test_helpers_of_two_folders_share_a_name(tmp_path):
    files = [write(tmp_path / number, {"mine.py": "import helper\n\ndef made():\n    return helper.number\n",
                                       "helper.py": f"number = {number}"}) for number in ("1", "2")]  # fmt: skip
    assert [from_file(str(each), "made")() for each in (*files, *files)] == [1, 2, 1, 2]


def test_code_in_memory_keeps_its_digest(tmp_path, monkeypatch):
    """Of what a module registered, which stays as it is whatever becomes of its file."""
    write(tmp_path, {"registering.py": "def kept():\n    return 1\n"})
    monkeypatch.syspath_prepend(tmp_path)
    import registering  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(ESTIMATORS, "kept", registering.kept)
    register("kept", registering.kept)
    before = code_digest(registering.kept)
    changed(tmp_path / "registering.py", "1", "2")
    assert code_digest(registering.kept) == before != source_digest(tmp_path / "registering.py")
    assert run_file(tmp_path / "registering.py")["kept"]() == 2


def test_a_class_of_a_file_that_is_run_has_a_digest(tmp_path):
    """As a step of a CONFIG.py is, which Python knows no file of."""
    file = write(tmp_path, {"config.py": "class Own:\n    def __call__(self):\n        return 1\n"})
    assert code_digest(run_file(file)["Own"]) == source_digest(file)
    assert code_digest(int) == code_digest(len) == code_digest(run_file) == "", "control"
