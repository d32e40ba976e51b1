"""Accidents: each makes of a whole file another one, or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    """Leave the size alone, as a file system does after a crash."""
    path.write_bytes(bytes(path.stat().st_size))


def missing(path: Path) -> None:
    path.unlink()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def not_utf8(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff\xfe" + content[20:])


def a_list(path: Path) -> None:
    path.write_text("[1, 2]\n")


def torn_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def doubled_key(path: Path) -> None:
    """Say the first key of an object twice."""
    content = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
    key = next(iter(content))
    path.write_text(path.read_text().replace("{", f"{{{json.dumps(key)}: {json.dumps(content[key])}, ", 1))


def appended(line: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        path.write_text(path.read_text() + line)

    harm.__name__ = f"with_{line.split()[0]}"
    return harm


def field(name: str, value: Any) -> Callable[[Path], None]:
    """Set a field of an object (a.b for one inside another; in each line of JSON lines) to a value of another type."""

    def harm(path: Path) -> None:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        objects = [json.loads(line) for line in lines]
        *outer, last = name.split(".")
        for each in objects:
            for key in outer:
                each = each[int(key) if isinstance(each, list) else key]
            each[last] = value
        path.write_text("".join(json.dumps(each) + "\n" for each in objects))

    harm.__name__ = f"{name}={json.dumps(value)}"
    return harm


def _arrays(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], name: str) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        if path.suffix == ".npz":
            with np.load(path) as file:
                np.savez(path, **change(dict(file)))  # type: ignore[arg-type]
        else:
            from safetensors import safe_open

            with safe_open(path, "numpy") as file:
                about = file.metadata()
            save_file(change(load_file(path)), path, about)

    harm.__name__ = name
    return harm


missing_array = _arrays(lambda each: dict(sorted(each.items())[1:]), "missing_array")
wrong_shape = _arrays(lambda each: {name: value[:-1] for name, value in each.items()}, "wrong_shape")
not_a_number = _arrays(lambda each: {name: value * np.float32("nan") for name, value in each.items()}, "not_a_number")
