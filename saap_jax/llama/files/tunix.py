"""Tunix (google-tunix), a trainer for JAX: what configures its models, and its checkpoints.

Tunix reads Hugging Face directories of its families, given a `ModelConfig`; what it trained it keeps in Orbax
checkpoints, an item `model_params` a step. Names and layouts are those of its 0.1.7, `tunix/models/*/params*.py`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.llama.files.hf_layout import EMBEDDING, UNEMBEDDING, Checkpoint
from saap_jax.llama.files.orbax_items import spec_beside
from saap_jax.llama.spec import LlamaSpec

PARAMETERS = "model_params"
"""Name of the item of a checkpoint that holds the model."""

THETA = 1_000_000
"""The rotary base of `llama3` and `qwen3`, whatever their configuration says (as of 0.1.7)."""


class Known(NamedTuple):
    """A family of Tunix."""

    module: str
    """Below `tunix.models`."""
    model: str
    """Name of the class."""
    tied: str
    """Argument of `ModelConfig` that says whether words are embedded and predicted by one matrix; empty: they are."""
    loader: str = "params"
    """Module that reads safetensors."""


FAMILIES: Mapping[str, Known] = {
    "llama": Known("llama3", "Llama3", "weight_tying"),
    "mistral": Known("llama3", "Llama3", "weight_tying"),
    "qwen2": Known("qwen2", "Qwen2", "use_tied_embedding"),
    "qwen3": Known("qwen3", "Qwen3", "use_tied_embedding"),
    "gemma3_text": Known("gemma3", "Gemma3", "", "params_safetensors"),
}
"""Our family -> that of Tunix which computes it."""


def configuration(spec: LlamaSpec) -> dict[str, Any]:
    """Return what `tunix.json` says: module and class of Tunix, and the arguments of its `ModelConfig`.

    Raises:
        ValueError: a family that Tunix has none for, or layers of different widths.
    """
    family, first = spec.constants.family, spec.layers[0]
    if family not in FAMILIES:
        raise ValueError(f"format tunix: expected a family of {', '.join(FAMILIES)}, which Tunix has, got {family}")
    if not spec.uniform:
        raise ValueError("format tunix: expected layers of equal widths, which is all that Tunix knows, got others")
    if spec.output_biases:
        raise ValueError("format tunix: expected no biases of output projections, which Tunix has not")
    known, constants = FAMILIES[family], spec.constants
    arguments = {
        "num_layers": len(spec.layers),
        "embed_dim": spec.embed,
        "hidden_dim": first.mlp,
        "num_heads": first.kv_heads * first.q_per_kv,
        "head_dim": spec.head_dim,
        "num_kv_heads": first.kv_heads,
    }
    if known.module == "gemma3":
        apart = constants.apart
        arguments |= {"num_embed": spec.vocab, "global_base_frequency": _whole(constants.rope_theta)}
        if apart is not None:
            arguments |= {"sliding_window_size": apart.sliding_window, "local_base_frequency": _whole(apart.rope_theta)}
    else:
        arguments |= {"vocab_size": spec.vocab, "rope_theta": _whole(constants.rope_theta)}
        arguments |= {"norm_eps": constants.norm_eps, known.tied: spec.tied}
    about = {"module": f"tunix.models.{known.module}", "model": known.model, "loader": known.loader}
    return about | {"config": arguments}


def departures(spec: LlamaSpec) -> tuple[str, ...]:
    """Return what Tunix computes otherwise than the model, a sentence each; of a family that it has."""
    constants, module = spec.constants, FAMILIES[spec.constants.family].module
    said = []
    if module in ("llama3", "qwen3") and constants.rope_theta != THETA:
        said.append(
            f"Tunix turns heads of {module} by a rotary base of {THETA:,}, whatever its configuration says, and the "
            f"model has {constants.rope_theta:,.0f}: its logits are others there"
        )
    scalings = [constants.rope_scaling, None if constants.apart is None else constants.apart.rope_scaling]
    if any(scaling is not None for scaling in scalings):
        said.append(
            f"Tunix does not scale rotary frequencies of {module} from such a file: its logits are others there"
        )
    if constants.sliding_window is not None and module != "gemma3":
        said.append(
            f"Tunix has no sliding window in {module}: its logits are others beyond {constants.sliding_window:,} tokens"
        )
    if module == "gemma3":
        said += _of_gemma(spec)
    return tuple(said)


def _of_gemma(spec: LlamaSpec) -> list[str]:
    constants, apart = spec.constants, spec.constants.apart
    local = tuple(layer for layer in range(len(spec.layers)) if layer % 6 != 5)
    said = []
    if apart is None or apart.layers != local:
        said.append("Tunix has a window in all layers of Gemma but each sixth, and the model in others")
    if constants.norm_eps != 1e-6:
        said.append(f"Tunix adds 1e-6 in the norms of Gemma, and the model {constants.norm_eps:g}")
    if constants.query_scalar not in (None, spec.head_dim):
        said.append("Tunix divides the scores of Gemma by the root of the size of a head, and the model by another")
    return said


def _whole(value: float | None) -> int | float | None:
    return int(value) if value is not None and float(value).is_integer() else value


# --- checkpoints -----------------------------------------------------------------------------------


def open_tunix(parameters: Path, arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    """Open the parameters of a Tunix checkpoint: the arrays of its item, as `arrays_of` reads them.

    What no array tells, such as the rotary base, is read from the `config.json` of the model that was trained: beside
    the parameters, the step, or the steps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: arrays of other names.
    """
    spec, tensors = spec_beside(parameters), dict[str, np.ndarray]()
    for name, array in arrays.items():
        for stored, tensor in _stored(name, array, str(parameters)):
            tensors[stored] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(str(parameters), spec, shapes, tensors.__getitem__)


_Make = Callable[[np.ndarray], np.ndarray]

_WHOLE: Mapping[str, tuple[str, _Make]] = {
    "embedder/input_embedding": (EMBEDDING, lambda x: x),
    "final_norm/w": ("model.norm.weight", lambda x: x),
    "final_norm/scale": ("model.norm.weight", lambda x: x),
    "lm_head/w": (UNEMBEDDING, lambda x: x.T),
}


def _inputs_first(x: np.ndarray) -> np.ndarray:
    """Store `[inputs, heads, head_dim]` or `[inputs, outputs]` as `[outputs, inputs]`."""
    return x.reshape(len(x), -1).T


def _heads_first(x: np.ndarray) -> np.ndarray:
    """Store `[heads, head_dim, outputs]` as `[outputs, inputs]`."""
    return x.reshape(-1, x.shape[-1]).T


def _heads_of_gemma(x: np.ndarray) -> np.ndarray:
    """Store `[heads, inputs, head_dim]` as `[outputs, inputs]`."""
    return x.transpose(0, 2, 1).reshape(-1, x.shape[1])


_LAYER: Mapping[str, tuple[tuple[str, _Make], ...]] = {
    "input_layernorm/w": (("input_layernorm.weight", lambda x: x),),
    "post_attention_layernorm/w": (("post_attention_layernorm.weight", lambda x: x),),
    "attn/q_proj/w": (("self_attn.q_proj.weight", _inputs_first),),
    "attn/k_proj/w": (("self_attn.k_proj.weight", _inputs_first),),
    "attn/v_proj/w": (("self_attn.v_proj.weight", _inputs_first),),
    "attn/o_proj/w": (("self_attn.o_proj.weight", _heads_first),),
    "attn/q_bias": (("self_attn.q_proj.bias", np.ravel),),
    "attn/k_bias": (("self_attn.k_proj.bias", np.ravel),),
    "attn/v_bias": (("self_attn.v_proj.bias", np.ravel),),
    "attn/q_norm/w": (("self_attn.q_norm.weight", lambda x: x),),
    "attn/k_norm/w": (("self_attn.k_norm.weight", lambda x: x),),
    "mlp/gate_proj/kernel": (("mlp.gate_proj.weight", np.transpose),),
    "mlp/up_proj/kernel": (("mlp.up_proj.weight", np.transpose),),
    "mlp/down_proj/kernel": (("mlp.down_proj.weight", np.transpose),),
    "attn/q_einsum/w": (("self_attn.q_proj.weight", _heads_of_gemma),),
    "attn/kv_einsum/w": (
        ("self_attn.k_proj.weight", lambda x: _heads_of_gemma(x[0])),
        ("self_attn.v_proj.weight", lambda x: _heads_of_gemma(x[1])),
    ),
    "attn/attn_vec_einsum/w": (("self_attn.o_proj.weight", _heads_first),),
    "attn/_query_norm/scale": (("self_attn.q_norm.weight", lambda x: x),),
    "attn/_key_norm/scale": (("self_attn.k_norm.weight", lambda x: x),),
    "pre_attention_norm/scale": (("input_layernorm.weight", lambda x: x),),
    "post_attention_norm/scale": (("post_attention_layernorm.weight", lambda x: x),),
    "pre_ffw_norm/scale": (("pre_feedforward_layernorm.weight", lambda x: x),),
    "post_ffw_norm/scale": (("post_feedforward_layernorm.weight", lambda x: x),),
}
"""Array of a layer in Tunix -> the tensors of a Hugging Face layer that it is, each with how it is stored there."""


def _stored(name: str, array: np.ndarray, where: str) -> list[tuple[str, np.ndarray]]:
    """Return the Hugging Face tensors that an array of Tunix is."""
    if name in _WHOLE:
        stored, make = _WHOLE[name]
        return [(stored, make(array))]
    layer = re.fullmatch(r"layers/(\d{1,6})/(.+)", name)
    if layer is None or layer[2] not in _LAYER:
        raise ValueError(
            f"{where}: expected arrays of a model of Tunix's {', '.join(sorted({k.module for k in FAMILIES.values()}))}"
            f" with all its weights, got {name!r}; merge adapters (LoRA) into them before"
        )
    return [(f"model.layers.{layer[1]}.{stored}", make(array)) for stored, make in _LAYER[layer[2]]]
