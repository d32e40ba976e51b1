"""Write a Hugging Face directory: plain, padded to equal widths, or with one width a layer and code of its own.

Plain and padded directories are of the model's family.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saap_jax.export.widths import added_parameters, uniform_widths
from saap_jax.llama.files.hf_config import config_from_spec, fits_plain_config
from saap_jax.llama.files.hf_groups import as_stored, groups_of
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.files.write import Tensor, model_tensors, write_json, write_tensors, write_tokenizer
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import LlamaSpec

REMOTE = Path(__file__).parent / "remote"
"""Code that travels with a ragged model. It imports torch and transformers, and nothing of this library."""

Form = Literal["hf", "padded", "ragged"]


def write_hf(
    model: Llama,
    place: Path,
    form: Form,
    dtype: np.dtype,
    *,
    tokenizer: Tokenizer | None = None,
    generation: Path | None = None,
) -> int:
    """Write config, weights, generation settings and tokenizer into an empty directory; return the parameters added.

    `generation` is the `generation_config.json` of the model's source, if it has one. Raises `ValueError` where a
    plain model of the family (`hf`, `padded`) cannot hold the model, naming what can.
    """
    spec = model.spec
    if form == "hf":
        check_plain(spec)
    elif form == "padded":
        check_no_experts(spec, form)
        check_biases(spec, form)
    else:
        check_code(spec)
    layers = uniform_widths(spec) if form == "padded" else spec.layers
    config = config_from_spec(dataclasses.replace(spec, layers=layers), dtype.name, per_layer=form == "ragged")
    if form == "ragged":
        config |= {
            "architectures": ["SaapLlamaForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_saap_llama.SaapLlamaConfig",
                "AutoModelForCausalLM": "modeling_saap_llama.SaapLlamaForCausalLM",
            },
        }
        for file in REMOTE.glob("*.py"):
            shutil.copyfile(file, place / file.name)
    settings = _generation(spec, tokenizer)
    config |= {key: value for key, value in settings.items() if key == "pad_token_id"}
    tensors = as_stored(model_tensors(model, layers), groups_of(spec, config["model_type"]))
    zeros = _zero_biases(tensors) if config.get("attention_bias") else []
    write_json(config, place / "config.json")
    write_tensors(tensors + zeros, place / "model.safetensors", dtype)
    if generation is not None:
        shutil.copyfile(generation, place / "generation_config.json")
    else:
        write_json(settings, place / "generation_config.json")
    if tokenizer is not None:
        write_tokenizer(tokenizer, place)
    return added_parameters(spec, layers) + sum(tensor.shape[0] for tensor in zeros)


def check_code(spec: LlamaSpec) -> None:
    """Raise ValueError for what the code that travels with a ragged model does not compute."""
    constants = spec.constants
    check_no_experts(spec, "ragged")
    if constants.apart is not None or constants.traits.post_norms:
        raise ValueError(
            "format ragged: its code has layers that see positions alike, and no norms behind sub-blocks, got a "
            f"{constants.family} with {'layers apart' if constants.apart is not None else 'such norms'}; choose "
            "--format padded or gguf"
        )


def check_plain(spec: LlamaSpec) -> None:
    """Raise `ValueError` unless a plain configuration of its family can hold a model."""
    check_biases(spec, "hf")
    first, traits = spec.layers[0], spec.constants.traits
    heads = first.kv_heads * first.q_per_kv
    if fits_plain_config(spec) and (spec.embed % heads == 0 or not traits.heads_divide):
        return
    units = "experts" if traits.experts else "MLP channels"
    kinds = {"KV heads": "kv_heads", "query heads a KV head": "q_per_kv", units: "mlp"}
    kinds |= {"channels an expert": "channels"} if traits.experts else {}
    ranges = {kind: sorted({getattr(layer, name) for layer in spec.layers}) for kind, name in kinds.items()}
    got = ", ".join(f"{found[0]} to {found[-1]} {kind}" for kind, found in ranges.items() if len(found) > 1)
    if not got and heads and first.mlp:
        got = f"{heads} attention heads, which transformers refuses beside a hidden size of {spec.embed}"
    if traits.experts:
        least = spec.constants.experts_per_token
        raise ValueError(
            f"format hf: expected layers alike, with heads and at least {least} experts, got "
            f"{got or 'fewer'}; prune with the allocation uniform, all layers alike"
        )
    raise ValueError(
        f"format hf: expected layers of equal widths above zero, got {got or 'layers without heads or channels'}; "
        "choose --format padded (a plain model with zeros added), ragged (transformers with trust_remote_code) or "
        "gguf (llama.cpp)"
    )


def check_no_experts(spec: LlamaSpec, form: str) -> None:
    """Raise `ValueError` for a mixture of experts: an expert of zeros would be routed to."""
    if spec.constants.traits.experts:
        raise ValueError(
            f"format {form}: expected a model without experts, got a {spec.constants.family}; choose --format hf, for "
            "layers that are alike (the allocation uniform)"
        )


def check_biases(spec: LlamaSpec, form: Form) -> None:
    """Raise `ValueError` where output projections have biases and a plain model of the family has none."""
    if spec.output_biases and not spec.constants.traits.plain_biases:
        raise ValueError(
            f"format {form}: expected no biases of output projections in family {spec.constants.family}, got those of "
            "the step bias; choose --format ragged (transformers with trust_remote_code)"
        )


def _generation(spec: LlamaSpec, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return where a text begins and ends: as the model says, or else as its tokenizer does."""
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}
    ends = list(spec.constants.eos_tokens)
    if spec.constants.bos_token is not None:
        found["bos"] = spec.constants.bos_token
    if ends:
        found["eos"] = ends[0] if len(ends) == 1 else ends
    return {f"{role}_token_id": value for role, value in found.items() if value is not None}


def _zero_biases(tensors: list[Tensor]) -> list[Tensor]:
    """Return the biases that a plain LLaMA with biases has beside those of the output projections."""
    inner = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    zeros = []
    for tensor in tensors:
        if tensor.name.endswith(inner):
            rows = tensor.shape[0]
            name = tensor.name.removesuffix("weight") + "bias"
            zeros.append(Tensor(name, (rows,), lambda rows=rows: np.zeros(rows, np.float32)))
    return zeros
