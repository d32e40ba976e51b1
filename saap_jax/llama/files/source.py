"""What the files of a model say of where it comes from: its repository on the hub, and its licence."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.repocard import metadata_load

from saap_jax.llama.files.gguf_file import open_gguf_file
from saap_jax.llama.files.hf_config import PER_LAYER_TYPE
from saap_jax.llama.files.packaged import REPOSITORIES

CARD = "README.md"
"""The model card of a directory."""

_HUB = "https://huggingface.co/"
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LONGEST = 2**20
"""Bytes of a card that is read."""


def source_of(name: str, place: Path) -> dict[str, str]:
    """Return what is known of a model: its `name` here, and as far as its files say it `repository` (of the hub),
    `license` (an identifier of the hub), `license_name` and `license_link`.

    The licence is that of the card of a directory, or of the metadata of a GGUF file.

    Args:
        place: of its files, where `load.resolve` finds them.

    Raises:
        ValueError: a damaged GGUF file.
    """
    said = _of_gguf(place) if place.is_file() else card_metadata(place)
    repository = _repository(name, said)
    found = {"name": name} | ({"repository": repository} if repository else {})
    for key in ("license", "license_name", "license_link"):
        if isinstance(value := said.get(key), str) and value.strip():
            found[key] = value.strip()
    if "license" in found and not _LICENCE.fullmatch(found["license"].lower()):
        found |= {"license": "other", "license_name": found["license"]}
    if not found.get("license_link", "https://").startswith("https://"):  # a file beside the card
        link = found.pop("license_link")
        found |= {"license_link": f"{_HUB}{repository}/blob/main/{link}"} if repository else {}
    return found


def card_metadata(directory: Path) -> dict[str, Any]:
    """Return the metadata of a directory's card, empty where there is none or it cannot be read."""
    card = directory / CARD
    try:
        return (metadata_load(card) or {}) if card.stat().st_size <= _LONGEST else {}
    except Exception:  # of the file, of its encoding, of YAML: a card that cannot be read says nothing
        return {}


def loader_of(config: Mapping[str, Any]) -> Literal["transformers", "remote_code", "saap_jax"]:
    """Return what loads the model of a `config.json`: transformers, it with the code beside the model, or we alone.

    >>> loader_of({"model_type": "llama"}), loader_of({"model_type": "saap_llama"})
    ('transformers', 'saap_jax')
    """
    if "auto_map" in config:
        return "remote_code"
    return "saap_jax" if config.get("model_type") == PER_LAYER_TYPE else "transformers"


def _repository(name: str, said: Mapping[str, Any]) -> str | None:
    """Return the repository of a model by its name, or as its GGUF file says it."""
    if name in REPOSITORIES:
        return REPOSITORIES[name]
    if _REPOSITORY.fullmatch(name) and not Path(name).expanduser().exists():
        return name  # what is no path is a name of the hub, see `resolve`
    found = str(said.get("repository") or "").removeprefix(_HUB).strip("/")
    return found if _REPOSITORY.fullmatch(found) else None


def _of_gguf(file: Path) -> dict[str, Any]:
    """Return repository and licence as the metadata of a GGUF file say them."""
    fields = open_gguf_file(file).fields
    keys = {
        "license": ("general.license",),
        "license_name": ("general.license.name",),
        "license_link": ("general.license.link",),
        "repository": ("general.source.huggingface.repository", "general.repo_url"),
    }
    return {name: next((fields[key] for key in each if key in fields), None) for name, each in keys.items()}
