"""Read TOML strictly and in bounded memory: whatever a file holds, plain values or one ValueError."""

import tomllib
from pathlib import Path
from typing import Any

LIMIT, LINE = 2**16, 2**12
"""Bytes of a file and of a line: those that somebody wrote by hand have fewer. The parser keeps all beginnings of a key
with dots, of which a long line may have millions.
"""


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """Return the table of a TOML file; `name` says in messages what the file is.

    Raises:
        ValueError: it, or a line of it, is too long, it is no TOML, no UTF-8, or nested deeper than Python can follow.
    """
    with open(path, "rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"{name} {path}: expected TOML of at most {LIMIT:,} bytes, got a larger file")
    if any(len(line) > LINE for line in data.split(b"\n")):
        raise ValueError(f"{name} {path}: expected TOML in lines of at most {LINE:,} bytes, got a longer one")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except RecursionError:
        reason = "values nested too deeply"
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{name} {path}: expected TOML, got {reason}; correct the file")
