"""MaxText: how it lays out a model's parameters in an Orbax checkpoint, and what configures it.

A step of a checkpoint holds an item `items`, a tree `params/params/…` whose layers are stacked on the second axis; what
its distillation keeps has the same tree without these two, in an item `model_params`, as Tunix has it. Two
of its decoder blocks are written and read: `llama2`, whose queries are stored over the root of a head's size, and
`qwen3`. With the rotary scaling of Llama 3.1 it turns neighbouring coordinates of a head, where ours are half a head
apart. Layouts are those of MaxText 0.2.5, `layers/attentions.py` and `checkpoint_conversion/utils/param_mapping.py`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from saap_jax.llama.files.hf_layout import EMBEDDING, UNEMBEDDING, Checkpoint
from saap_jax.llama.files.orbax_items import spec_beside
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import LlamaSpec

ITEMS = "items"
"""Name of the item of a step that holds the parameters."""


class Block(NamedTuple):
    """A decoder block of MaxText."""

    name: str
    scaled: bool
    """Queries are stored over the root of a head's size."""


BLOCKS: Mapping[str, Block] = {
    "llama": Block("llama2", True),
    "mistral": Block("llama2", True),
    "qwen3": Block("qwen3", False),
}
"""Our family -> the block that computes it."""


def overrides(spec: LlamaSpec) -> dict[str, Any]:
    """Return what MaxText's configuration has to say of a model: its `student_overrides`.

    Raises:
        ValueError: a family that is not written, layers of different widths, or what its blocks do not compute.
    """
    constants, first = spec.constants, spec.layers[0]
    if constants.family not in BLOCKS:
        raise ValueError(f"format maxtext: expected a family of {', '.join(BLOCKS)}, got {constants.family}")
    if not (spec.uniform and first.kv_heads and first.mlp):
        raise ValueError(
            "format maxtext: expected layers of equal widths above zero, one number each being all that MaxText takes, "
            "got others; choose --format padded or ragged, or search with uniform widths"
        )
    if spec.output_biases or constants.apart is not None or constants.sliding_window is not None:
        what = "biases of output projections" if spec.output_biases else "windows"
        raise ValueError(f"format maxtext: expected no {what}, which its block {BLOCKS[constants.family].name} has not")
    if not float(constants.rope_theta).is_integer():
        raise ValueError(f"format maxtext: expected a whole number as rotary base, got {constants.rope_theta:g}")
    said: dict[str, Any] = {
        "model_name": "default",
        "decoder_block": BLOCKS[constants.family].name,
        "base_emb_dim": spec.embed,
        "base_num_query_heads": first.kv_heads * first.q_per_kv,
        "base_num_kv_heads": first.kv_heads,
        "base_mlp_dim": first.mlp,
        "base_num_decoder_layers": len(spec.layers),
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "mlp_activations": ["silu", "linear"],
        "normalization_layer_epsilon": constants.norm_eps,
        "rope_max_timescale": int(constants.rope_theta),
        "logits_via_embedding": spec.tied,
        "normalize_embedding_logits": False,
        "enable_dropout": False,
    }
    if constants.family == "qwen3":
        said["use_qk_norm"] = True
    if (scaling := constants.rope_scaling) is not None:
        if scaling.kind != "llama3":
            raise ValueError(f"format maxtext: expected rotary scaling of Llama 3.1 or none, got {scaling.kind}")
        published = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
        if published != (8.0, 1.0, 4.0, 8192):
            raise ValueError(
                "format maxtext: expected the rotary scaling of Llama 3.1 (factor 8 from 8,192 positions, 1 and 4), "
                f"the one that MaxText has, got {', '.join(f'{each:g}' for each in published)}"
            )
        said["rope_type"] = "llama3.1"
    return said


# --- written ---------------------------------------------------------------------------------------


def tree_of(model: Llama) -> dict[str, Any]:
    """Return the parameters of a model with equal layers as MaxText's tree, layers on the second axis."""
    block, turned, (segment,) = BLOCKS[model.constants.family], _interleaves(model.spec), model.segments
    attention, mlp = segment.attention, segment.mlp
    query, output = (np.asarray(each[...]) for each in (attention.query, attention.output))
    layers, embed, kv_heads, q_per_kv, size = query.shape
    query = query.reshape(layers, embed, kv_heads * q_per_kv, size)
    key, value = np.asarray(attention.key[...]), np.asarray(attention.value[...])
    query, key = (interleaved(query), interleaved(key)) if turned else (query, key)
    query = query * np.asarray(size**-0.5, query.dtype) if block.scaled else query
    inside: dict[str, Any] = {
        "query": {"kernel": _second(query)},
        "key": {"kernel": _second(key)},
        "value": {"kernel": _second(value)},
        "out": {"kernel": _second(output.reshape(layers, -1, size, embed))},
    }
    if attention.query_norm is not None and attention.key_norm is not None:
        inside["query_norm"] = {"scale": _second(attention.query_norm[...])}
        inside["key_norm"] = {"scale": _second(attention.key_norm[...])}
    decoder: dict[str, Any] = {
        "decoder_norm": {"scale": np.asarray(model.norm[...])},
        "layers": {
            "self_attention": inside,
            "mlp": {
                name: {"kernel": _second(parameter[...])}
                for name, parameter in (("wi_0", mlp.gate), ("wi_1", mlp.up), ("wo", mlp.down))
            },
            "pre_self_attention_layer_norm": {"scale": _second(segment.attention_norm[...])},
            "post_self_attention_layer_norm": {"scale": _second(segment.mlp_norm[...])},
        },
    }
    if model.unembedding is not None:
        decoder["logits_dense"] = {"kernel": np.asarray(model.unembedding[...])}
    words = {"embedding": np.asarray(model.embedding[...])}
    return {"params": {"params": {"token_embedder": words, "decoder": decoder}}}


BASE = "post_train/distillation.yml"
"""The configuration of MaxText that ours begins with, below its `configs`."""


class Side(NamedTuple):
    """A model of a distillation."""

    spec: LlamaSpec
    place: str
    """Path or address where its checkpoint will be."""


def settings_of(student: Side, teacher: Side | None, tokenizer: str | None) -> str:
    """Return a configuration of MaxText's distillation, YAML, that lacks its data and, perhaps, the teacher.

    Features of layers are compared by the number of the layer, so they can be where both have as many.

    Args:
        tokenizer: directory of the tokenizer of both, if they have one there.
    """
    said: dict[str, Any] = {"base_config": BASE}
    for name, side in (("student_overrides", student), ("teacher_overrides", teacher)):
        if side is not None:
            said[name] = overrides(side.spec) | {"load_parameters_path": f"{side.place}/0/{ITEMS}"}
    if teacher is None or len(teacher.spec.layers) == len(student.spec.layers):
        said["distill_layer_indices"] = [*range(len(student.spec.layers))]
    if tokenizer is not None:
        said |= {"tokenizer_path": tokenizer, "tokenizer_type": "huggingface"}
    lines = []
    for key, value in said.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {json.dumps(each)}" for name, each in value.items())]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join([*lines, ""])


def write_maxtext(model: Llama, place: Path, dtype: np.dtype) -> None:
    """Write a checkpoint, step 0, into a directory."""
    import orbax.checkpoint as ocp

    tree = jax.tree.map(lambda array: array.astype(dtype), tree_of(model))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(ITEMS)) as writer:
        writer.save(place.absolute() / "0", args=ocp.args.Composite(**{ITEMS: ocp.args.PyTreeSave(tree)}))


def _interleaves(spec: LlamaSpec) -> bool:
    """Say whether MaxText turns neighbouring coordinates of a model's heads."""
    return spec.constants.rope_scaling is not None


def interleaved(heads: np.ndarray) -> np.ndarray:
    """Return coordinates of heads, the last axis, in the order that turns neighbours together.

    >>> interleaved(np.arange(6)).tolist(), halved(interleaved(np.arange(6))).tolist()
    ([0, 3, 1, 4, 2, 5], [0, 1, 2, 3, 4, 5])
    """
    return np.stack(np.split(heads, 2, axis=-1), axis=-1).reshape(heads.shape)


def halved(heads: np.ndarray) -> np.ndarray:
    """Undo `interleaved`."""
    return np.concatenate([heads[..., ::2], heads[..., 1::2]], axis=-1)


def _second(array: Any) -> np.ndarray:
    """Put the layers on the second axis."""
    return np.moveaxis(np.asarray(array), 0, 1)


# --- read ------------------------------------------------------------------------------------------


def is_of_maxtext(arrays: Mapping[str, np.ndarray]) -> bool:
    """Say whether an item `model_params` is of MaxText's distillation, and not of Tunix's own models."""
    return any(name.startswith(("decoder/", "token_embedder/")) for name in arrays)


def open_maxtext(items: Path, arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    """Open the parameters of a MaxText checkpoint: the arrays of its item, as `arrays_of` reads them.

    What no array tells is read from the `config.json` of the exported model, beside the step or the steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a family that is not read, or arrays of other names.
    """
    spec = spec_beside(items)
    if spec.constants.family not in BLOCKS:
        raise ValueError(f"{items}: expected a family of {', '.join(BLOCKS)}, got {spec.constants.family}")
    block, tensors = BLOCKS[spec.constants.family], {}
    bare = is_of_maxtext(arrays)
    for name, array in arrays.items():
        inner = name if bare else name.removeprefix("params/params/")
        if "rngs" in name.split("/"):  # the state of random numbers, which a training keeps too
            continue
        if inner == name and not bare:
            if name.split("/")[0] in ("opt_state", "step", "nnx_aux"):
                continue
            raise ValueError(f"{items}: expected arrays below params/params, as MaxText keeps them, got {name!r}")
        tensors |= _stored(inner, array, block, _interleaves(spec), str(items))
    return Checkpoint(str(items), spec, {name: each.shape for name, each in tensors.items()}, tensors.__getitem__)


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


def _stored(name: str, array: np.ndarray, block: Block, turned: bool, where: str) -> dict[str, np.ndarray]:
    """Return the Hugging Face tensors that an array is: of layers one each, which may be stacked or apart."""
    if name in _WHOLE:
        return {_WHOLE[name]: array.T if name.endswith("kernel") else array}
    found = re.fullmatch(r"decoder/layers(?:_(\d{1,6}))?/(.+)", name)
    if found is None or found[2] not in _LAYER:
        raise ValueError(
            f"{where}: expected arrays of the blocks {', '.join(sorted({each.name for each in BLOCKS.values()}))} of "
            f"MaxText, got {name!r}"
        )
    each = np.moveaxis(array, 1, 0) if found[1] is None else array[None]
    first = 0 if found[1] is None else int(found[1])
    return {
        f"model.layers.{first + number}.{_LAYER[found[2]]}.weight": _tensor(found[2], layer, block, turned)
        for number, layer in enumerate(each)
    }


def _tensor(name: str, layer: np.ndarray, block: Block, turned: bool) -> np.ndarray:
    """Return an array of a layer as Hugging Face stores it: `[outputs, inputs]`."""
    if layer.ndim == 1:
        return layer
    if name.endswith("out/kernel"):  # [heads, head_dim, embed]
        return layer.reshape(-1, layer.shape[-1]).T
    if turned and ("query/" in name or "key/" in name):
        layer = halved(layer)
    if block.scaled and "query/" in name:
        layer = layer.astype(np.float32) * np.float32(layer.shape[-1] ** 0.5)  # rounded once, where it is stored
    return layer.reshape(len(layer), -1).T
