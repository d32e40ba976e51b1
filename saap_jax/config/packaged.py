"""Files of the user, or those that come with the package by their name: configurations, and limits of `saap ab`."""

import difflib
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def packaged(suffix: str = ".py") -> dict[str, Path]:
    """List the packaged files of a suffix by name: their path below `configs/`, without the suffix.

    >>> "quickstart" in packaged(), "gates/default" in packaged(".toml")
    (True, True)
    """
    paths = sorted(CONFIGS.rglob(f"*{suffix}"))
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in paths}


def find_file(word: str, what: str, suffix: str = ".py") -> Path:
    """Find the file at a path, or else the packaged one of that name; `what` begins the message.

    Raises:
        FileNotFoundError: neither is there; the line lists the names that there are.
    """
    if Path(word).is_file():
        return Path(word)
    known = packaged(suffix)
    if word not in known:
        near = difflib.get_close_matches(word.removesuffix(suffix), known, 1)
        raise FileNotFoundError(
            f"{what}, found none at {word}; check the path, or name one of the package: {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return known[word]
