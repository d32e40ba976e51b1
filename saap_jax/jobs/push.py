"""Put a model directory with its card into a repository of the Hugging Face hub, in one commit or not at all."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id

from saap_jax.config.use import PushConfig
from saap_jax.formats.json_files import read_object
from saap_jax.jobs.origins import origin_of
from saap_jax.llama.files import maxtext, tunix
from saap_jax.llama.files.load import one_line
from saap_jax.llama.files.orbax_items import item_of
from saap_jax.llama.files.source import CARD, loader_of
from saap_jax.report.card import card
from saap_jax.runs.origin import Origin
from saap_jax.runtime.files import write_atomically
from saap_jax.runtime.locks import held
from saap_jax.runtime.provenance import versions
from saap_jax.runtime.remote import check_local

Step = Callable[[str], contextlib.AbstractContextManager]
"""Shows a step of the work while it runs."""

_HIDDEN = ".*"
"""Names, of the directory itself, that are not sent: locks, and what killed processes left."""


class Pushed(NamedTuple):
    """What was sent."""

    address: str
    """Of the repository; empty where nothing was sent."""
    files: int
    bytes: int
    card: str
    """What became of the card, in words."""


def push_model(config: PushConfig, *, step: Step = contextlib.nullcontext) -> Pushed:
    """Write the card of a model directory, unless it has one, and send all of it to a repository.

    Raises:
        ValueError: no model directory, no token, a repository that holds something, or one that the hub refuses.
    """
    directory = check_local("directory", config.directory).expanduser()
    _check(config, directory)
    with held(directory, f"directory: {directory}"):
        with step("write the model card"):
            said = _write_card(directory, config.repository.rpartition("/")[2] or directory.resolve().name)
        sent = [path for path in directory.rglob("*") if path.is_file() and _is_sent(path.relative_to(directory))]
        size = sum(path.stat().st_size for path in sent)
        if not config.upload:
            return Pushed("", len(sent), size, said)
        with step(f"send {len(sent):,} files of {size:,} bytes"), _hub(config.repository):
            return Pushed(_send(config, directory), len(sent), size, said)


def _check(config: PushConfig, directory: Path) -> None:
    """Raise ValueError for what cannot be sent, before anything is written."""
    for name in ("directory", "repository"):
        if not getattr(config, name) and (config.upload or name == "directory"):
            raise ValueError(f"{name}: expected a name, got nothing; say saap push DIRECTORY REPOSITORY")
    if not any((directory / name).is_file() for name in ("config.json", "pruned.json")):
        raise ValueError(
            f"directory: expected a model directory, with config.json or pruned.json, got {directory}; "
            "saap prune, recover and export make some"
        )
    if not config.upload:
        return
    try:
        validate_repo_id(config.repository)
    except HFValidationError as error:
        raise ValueError(
            f"repository: expected ORGANISATION/NAME, got {config.repository!r} ({one_line(error)})"
        ) from None
    if not get_token():
        raise ValueError(
            "push: expected a token of the hub with write access, found none; run hf auth login, or set HF_TOKEN"
        )


def _write_card(directory: Path, name: str) -> str:
    """Write the card of a directory where there is none, or one that only another name makes differ; say what was done.

    Raises:
        ValueError: there is a card whose metadata cannot be read.
    """
    origin, path = _origin(directory), directory / CARD
    text = card(origin, name)
    if not path.exists():
        write_atomically(path, text.encode())
        return "written, of what is on record"
    whole = directory.resolve()
    if path.read_bytes() in [card(origin, known).encode() for known in (name, whole.name, whole.parent.name)]:
        write_atomically(path, text.encode())
        return "as the command that made the model wrote it"
    try:
        metadata_load(path)
    except Exception as error:  # of the encoding, or of YAML, whose errors the hub's library does not wrap
        raise ValueError(
            f"{path}: expected metadata in YAML between two lines of ---, got {one_line(error)}; correct it, or remove "
            "the file to have it made"
        ) from None
    return "your own"


def _origin(directory: Path) -> Origin:
    """Return how the model of a directory came about; of one that does not say, what loads it."""
    origin = origin_of(directory.resolve().name, directory)
    if origin["steps"]:
        return origin
    if (directory / "pruned.json").is_file():
        return {**origin, "loader": "traced"}
    if any(item_of(directory, name) for name in (maxtext.ITEMS, tunix.PARAMETERS)):  # steps that those trained
        return {**origin, "loader": "saap_jax"}
    return {**origin, "loader": loader_of(read_object(directory / "config.json"))}


def _send(config: PushConfig, directory: Path) -> str:
    """Send a directory in one commit; return the address of the repository."""
    api, repository = HfApi(), config.repository
    if "/" not in repository:
        repository = f"{api.whoami()['name']}/{repository}"
    if api.repo_exists(repository):
        there = sorted({*api.list_repo_files(repository)} - {".gitattributes"})
        if there and not config.replace:
            raise ValueError(
                f"repository: expected {repository} to be empty, or not there, found {len(there):,} files such as "
                f"{there[0]}; pass --replace, or choose another name"
            )
    else:
        api.create_repo(repository, private=config.private)
    api.upload_folder(
        repo_id=repository,
        folder_path=directory,
        ignore_patterns=[_HIDDEN],
        delete_patterns=["*"] if config.replace else None,
        commit_message=f"Put {repository.rpartition('/')[2]} here, by saap_jax {versions()['saap_jax']}",
    )
    return f"{api.endpoint}/{repository}"


def _is_sent(path: Path) -> bool:
    return not path.parts[0].startswith(".")


@contextlib.contextmanager
def _hub(repository: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line.

    Raises:
        ValueError: the hub refused, or cannot be reached.
    """
    try:
        yield
    except OfflineModeIsEnabled:
        reason = "cannot be reached: HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        reason = f"refused it ({one_line(error)})"
    except Exception as error:
        of_http = type(error).__module__.startswith(("httpx", "httpcore"))  # its name depends on the library's release
        if not (of_http or isinstance(error, OSError)):
            raise
        reason = f"cannot be reached ({one_line(error)})"
    else:
        return
    raise ValueError(f"repository: {repository}: the hub {reason}; nothing was put there, the same command tries again")
