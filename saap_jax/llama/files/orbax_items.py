"""Checkpoints that other programs keep with Orbax: a directory of steps, each with an item of parameters."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saap_jax.llama.files.hf_config import spec_from_config
from saap_jax.llama.spec import LlamaSpec
from saap_jax.runtime.errors import read_object


def item_of(directory: Path, name: str) -> Path | None:
    """Return where an item of a step is, or of the last step of a directory of steps; None if nowhere."""
    if (directory / name).is_dir():
        return directory / name
    steps = [each for each in directory.iterdir() if re.fullmatch(r"\d{1,9}", each.name)]
    places = [step / name for step in sorted(steps, key=lambda step: int(step.name), reverse=True)]
    return next((place for place in places if place.is_dir()), None)


def spec_beside(item: Path) -> LlamaSpec:
    """Return the spec that the `config.json` of the exported model says, which lies beside an item or beside the steps.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of a model that is known.
    """
    places = [item.parent / "config.json", item.parent.parent / "config.json"]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise FileNotFoundError(
            f"{item}: expected the config.json of the model that was trained in {places[0].parent} or "
            f"{places[1].parent}, found none; copy it there from the exported model"
        )
    return spec_from_config(read_object(config), str(config))


def arrays_of(item: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an item by path, such as `layers/0/attn/q_proj/w`, all in host memory.

    Raises:
        ValueError: Orbax cannot read it.
    """
    import orbax.checkpoint as ocp  # takes a second, which others need not wait for

    reader = ocp.PyTreeCheckpointer()
    try:
        place = item.absolute()  # of a relative one Orbax finds no metadata, and reads nothing
        tree: Any = reader.metadata(place)
        tree = getattr(getattr(tree, "item_metadata", tree), "tree", tree)
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=wanted))
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{item}: expected parameters that Orbax can read ({reason})") from None
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    return {name.removesuffix("/value"): array for name, array in named.items()}
