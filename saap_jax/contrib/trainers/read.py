"""Checkpoints that trainers keep with Orbax: those of MaxText, read and written, and those of Tunix, read.

A checkpoint is a directory of steps, each with an item. MaxText's is `items`, a tree `params/params/…` whose layers are
stacked on the second axis; what its distillation keeps has the same tree without these two, in an item `model_params`,
as Tunix has it. Two of MaxText's decoder blocks are known: `llama2`, whose queries are stored over the root of a head's
size, and `qwen3`. With the rotary scaling of Llama 3.1 it turns neighbouring coordinates of a head, where ours are half
a head apart. Layouts are those of MaxText 0.2.5 (`checkpoint_conversion/utils/param_mapping.py`) and Tunix 0.1.7
(`tunix/models/*/params*.py`).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from saap_jax.errors import read_object, reading
from saap_jax.llama.files.config import spec_from_config
from saap_jax.llama.files.layout import EMBEDDING, UNEMBEDDING, Checkpoint, model_tensors
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import LlamaSpec
from saap_jax.runtime.gather import leaves_by_path

ITEMS = "items"
PARAMETERS = "model_params"
"""Names of the items that hold parameters: of MaxText, and of Tunix and MaxText's distillation."""

Arrays = Mapping[str, np.ndarray]


def open_orbax(directory: Path) -> Checkpoint | None:
    """Open the parameters of a step, or of the last one of a directory of steps; None where there are none.

    What no array tells, such as the rotary base, is read from the `config.json` of the model that was trained, beside
    the step or the steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: Orbax cannot read it, a family that is not read, or arrays of other names.
    """
    item = item_of(directory, PARAMETERS) or item_of(directory, ITEMS)
    if item is None:
        return None
    arrays = arrays_of(item)
    places = [item.parent / "config.json", item.parent.parent / "config.json"]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise FileNotFoundError(
            f"{item}: expected the config.json of the model that was trained in {places[0].parent} or "
            f"{places[1].parent}, found none; copy it there from the exported model"
        )
    spec = spec_from_config(read_object(config), str(config))
    bare = any(name.startswith(("decoder/", "token_embedder/")) for name in arrays)  # what a distillation keeps
    if bare or item.name == ITEMS:
        tensors = _of_maxtext(arrays, spec, item, bare)
    else:
        tensors = _of_tunix(arrays, item)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(str(item), spec, shapes, tensors.__getitem__)


def item_of(directory: Path, name: str) -> Path | None:
    """Find an item of a step, or of the last step of a directory of steps; None if there is none."""
    if (directory / name).is_dir():
        return directory / name
    steps = [each for each in directory.iterdir() if re.fullmatch(r"\d{1,9}", each.name)]
    places = [step / name for step in sorted(steps, key=lambda step: int(step.name), reverse=True)]
    return next((place for place in places if place.is_dir()), None)


def arrays_of(item: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an item by path, such as `layers/0/attn/q_proj/w`, all in host memory.

    Raises:
        ValueError: Orbax cannot read it.
    """
    import jax
    import orbax.checkpoint as ocp  # takes a second, which others need not wait for

    reader = ocp.PyTreeCheckpointer()
    with reading(item, "parameters that Orbax can read"):
        place = item.absolute()  # of a relative one Orbax finds no metadata, and reads nothing
        tree: Any = reader.metadata(place)
        tree = getattr(getattr(tree, "item_metadata", tree), "tree", tree)
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=wanted))
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(tree).items()}


# --- MaxText ---------------------------------------------------------------------------------------


BLOCKS: Mapping[str, str] = {"llama": "llama2", "mistral": "llama2", "qwen3": "qwen3"}
"""Our family -> the decoder block of MaxText that computes it."""

_WHOLE = {
    "token_embedder/embedding": EMBEDDING,
    "decoder/decoder_norm/scale": "model.norm.weight",
    "decoder/logits_dense/kernel": UNEMBEDDING,
}
_LAYER = {
    "pre_self_attention_layer_norm/scale": "input_layernorm",
    "post_self_attention_layer_norm/scale": "post_attention_layernorm",
    "self_attention/query/kernel": "self_attn.q_proj",
    "self_attention/key/kernel": "self_attn.k_proj",
    "self_attention/value/kernel": "self_attn.v_proj",
    "self_attention/out/kernel": "self_attn.o_proj",
    "self_attention/query_norm/scale": "self_attn.q_norm",
    "self_attention/key_norm/scale": "self_attn.k_norm",
    "mlp/wi_0/kernel": "mlp.gate_proj",
    "mlp/wi_1/kernel": "mlp.up_proj",
    "mlp/wo/kernel": "mlp.down_proj",
}
"""Array of a layer in MaxText -> the Hugging Face tensor that it is."""


def write_maxtext(model: Llama, place: Path, dtype: np.dtype) -> None:
    """Write a checkpoint, step 0, into a directory."""
    import jax
    import orbax.checkpoint as ocp

    tree = jax.tree.map(lambda array: array.astype(dtype), tree_of(model))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(ITEMS)) as writer:
        writer.save(place.absolute() / "0", args=ocp.args.Composite(**{ITEMS: ocp.args.PyTreeSave(tree)}))


def tree_of(model: Llama) -> dict[str, Any]:
    """Return the parameters of a model with equal layers as MaxText's tree, layers on the second axis."""
    tensors = {tensor.name: tensor.read for tensor in model_tensors(model)}
    arrays = {}
    for name, theirs in _WHOLE.items():
        if theirs in tensors:
            values = tensors[theirs]()
            arrays[name] = values.T if name.endswith("kernel") else values
    for name, theirs in _LAYER.items():
        of_layers = [f"model.layers.{layer}.{theirs}.weight" for layer in range(len(model.spec.layers))]
        if of_layers[0] in tensors:
            layers = [_kernel(name, tensors[each](), model.spec) for each in of_layers]
            arrays[f"decoder/layers/{name}"] = np.stack(layers, axis=1)
    nested = traverse_util.unflatten_dict({tuple(name.split("/")): array for name, array in arrays.items()})
    return {"params": {"params": nested}}


def _turned(name: str, spec: LlamaSpec) -> bool:
    """Say whether MaxText turns neighbouring coordinates of these heads."""
    return spec.constants.rope_scaling is not None and ("query/" in name or "key/" in name)


def _scaled(name: str, spec: LlamaSpec) -> bool:
    """Say whether MaxText stores these heads over the root of their size."""
    return BLOCKS[spec.constants.family] == "llama2" and "query/" in name


def _kernel(name: str, tensor: np.ndarray, spec: LlamaSpec) -> np.ndarray:
    """Return a Hugging Face tensor `[outputs, inputs]` as an array of a layer."""
    if tensor.ndim == 1:
        return tensor
    if name.endswith("out/kernel"):  # [heads, head_dim, embed]
        return tensor.T.reshape(-1, spec.head_dim, spec.embed)
    if name.startswith("mlp/"):
        return tensor.T
    heads = tensor.T.reshape(spec.embed, -1, spec.head_dim)
    heads = interleaved(heads) if _turned(name, spec) else heads
    if _scaled(name, spec):
        return heads * np.asarray(spec.head_dim**-0.5, heads.dtype)
    return heads


def tensor_of(name: str, layer: np.ndarray, spec: LlamaSpec) -> np.ndarray:
    """Undo `_kernel`."""
    if _turned(name, spec):
        layer = np.concatenate([layer[..., ::2], layer[..., 1::2]], axis=-1)
    if _scaled(name, spec):
        layer = layer.astype(np.float32) * np.float32(layer.shape[-1] ** 0.5)  # rounded once, where it is stored
    return _stored(layer, heads_first=name.endswith("out/kernel"))


def _stored(array: np.ndarray, heads_first: bool) -> np.ndarray:
    """Store a matrix as `[outputs, inputs]`; its inputs are the first axis, or all but the last one."""
    if array.ndim == 1:
        return array
    return array.reshape((-1, array.shape[-1]) if heads_first else (len(array), -1)).T


def interleaved(heads: np.ndarray) -> np.ndarray:
    """Return coordinates of heads, the last axis, in the order that turns neighbours together.

    >>> interleaved(np.arange(6)).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.stack(np.split(heads, 2, axis=-1), axis=-1).reshape(heads.shape)


def _of_maxtext(arrays: Arrays, spec: LlamaSpec, item: Path, bare: bool) -> dict[str, np.ndarray]:
    """Return the Hugging Face tensors of MaxText's arrays; layers may be stacked or apart."""
    if spec.constants.family not in BLOCKS:
        raise ValueError(f"{item}: expected a family of {', '.join(BLOCKS)}, got {spec.constants.family}")
    tensors = {}
    for name, array in arrays.items():
        if bare:
            inner = name
        else:
            inner = name.removeprefix("params/params/")
        if "rngs" in name.split("/"):  # the state of random numbers, which a training keeps too
            continue
        if inner == name and not bare:
            if name.split("/")[0] in ("opt_state", "step", "nnx_aux"):
                continue
            raise ValueError(f"{item}: expected arrays below params/params, as MaxText keeps them, got {name!r}")
        if inner in _WHOLE:
            tensors[_WHOLE[inner]] = array.T if inner.endswith("kernel") else array
            continue
        found = re.fullmatch(r"decoder/layers(?:_(\d{1,6}))?/(.+)", inner)
        if found is None or found[2] not in _LAYER:
            blocks = ", ".join(dict.fromkeys(BLOCKS.values()))
            raise ValueError(f"{item}: expected arrays of the blocks {blocks} of MaxText, got {inner!r}")
        if found[1] is None:
            layers = np.moveaxis(array, 1, 0)
        else:
            layers = array[None]
        for number, layer in enumerate(layers, int(found[1] or 0)):
            tensors[f"model.layers.{number}.{_LAYER[found[2]]}.weight"] = tensor_of(found[2], layer, spec)
    return tensors


# --- Tunix -----------------------------------------------------------------------------------------

_TUNIX = {
    "embedder/input_embedding": EMBEDDING,
    "final_norm/w": "model.norm.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/w": UNEMBEDDING,
    **{f"attn/{each}_proj/w": f"self_attn.{each}_proj.weight" for each in "qkvo"},
    **{f"attn/{each}_bias": f"self_attn.{each}_proj.bias" for each in "qkv"},
    **{f"attn/{each}_norm/w": f"self_attn.{each}_norm.weight" for each in "qk"},
    **{f"mlp/{each}_proj/kernel": f"mlp.{each}_proj.weight" for each in ("gate", "up", "down")},
    "input_layernorm/w": "input_layernorm.weight",
    "post_attention_layernorm/w": "post_attention_layernorm.weight",
    **{f"attn/{each}_einsum/w": f"self_attn.{each}_proj.weight" for each in "qkv"},
    "attn/attn_vec_einsum/w": "self_attn.o_proj.weight",
    "attn/_query_norm/scale": "self_attn.q_norm.weight",
    "attn/_key_norm/scale": "self_attn.k_norm.weight",
    "pre_attention_norm/scale": "input_layernorm.weight",
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "pre_ffw_norm/scale": "pre_feedforward_layernorm.weight",
    "post_ffw_norm/scale": "post_feedforward_layernorm.weight",
}
"""Array in Tunix (of a layer, within it) -> the Hugging Face tensor that it is."""


def _of_tunix(arrays: Arrays, item: Path) -> dict[str, np.ndarray]:
    """Return the Hugging Face tensors of Tunix's arrays."""
    tensors = {}
    apart = dict[str, np.ndarray]()
    for name, array in arrays.items():  # keys and values of Gemma are one array, and as many queries with them
        kinds = ""
        if found := re.search("(q?kv)_einsum/w$", name):
            kinds = found[1]
        apart |= {name.replace(f"{kinds}_", f"{each}_"): array[at] for at, each in enumerate(kinds)} or {name: array}
    for name, array in apart.items():
        layer = re.fullmatch(r"layers/(\d{1,6})/(.+)", name)
        known = _TUNIX.get(layer[2] if layer else name)
        if known is None:
            raise ValueError(
                f"{item}: expected arrays of a model of Tunix's gemma3, llama3, qwen2, qwen3 with all its weights, got "
                f"{name!r}; merge adapters (LoRA) into them before"
            )
        if re.search("[qkv]_einsum", name):  # [heads, inputs, head_dim]
            array = np.moveaxis(array, 0, 1)
        if known.endswith("bias"):
            array = array.ravel()
        if known == EMBEDDING:
            stored = array
        else:
            stored = _stored(array, heads_first="o_proj" in known)
        tensors[f"model.layers.{layer[1]}.{known}" if layer else known] = stored
    return tensors
