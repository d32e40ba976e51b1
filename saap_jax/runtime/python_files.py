"""A Python file of a user, run as `python FILE` runs it: modules beside it are found."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any


def run_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Run a file and return its names; its directory comes first among those that are searched for modules.

    It stays among them, as the last one, for what is imported when a function of the file is called.
    """
    place = str(Path(path).resolve().parent)
    sys.path.insert(0, place)
    try:
        return runpy.run_path(str(path))
    finally:
        if place in sys.path:  # a file may set its own
            sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)
