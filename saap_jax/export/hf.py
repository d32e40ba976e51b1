"""Write a Hugging Face directory: plain, padded to equal widths, or of uneven layers, with code of its own.

Plain and padded directories are of the model's family.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from saap_jax.export.widths import added_parameters, nas_widths, unfit, uniform_widths
from saap_jax.llama.files.config import config_from_spec, fits_plain_config
from saap_jax.llama.files.layout import Tensor, as_stored, groups_of, model_tensors, unread
from saap_jax.llama.files.per_layer import BLOCKS, NAS_TYPE, blocks
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.files.write import write_json, write_tensors, write_tokenizer
from saap_jax.llama.model import Llama
from saap_jax.llama.spec import LlamaSpec

REMOTE = Path(__file__).parent / "remote"
"""Code that travels with models of uneven layers. It imports torch and transformers, and nothing of this library."""

Form = Literal["hf", "padded", "ragged", "nas"]

INSTEAD: dict[Form, str] = {
    "padded": "a plain model with zeros added",
    "ragged": "transformers with trust_remote_code",
    "nas": "vLLM",
}
"""Formats of layers that are not alike, and who reads them."""

RAGGED = f"choose --format ragged ({INSTEAD['ragged']})"

TRAVELS: dict[str, dict[str, Any]] = {
    "ragged": {
        "architectures": ["SaapLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_saap_llama.SaapLlamaConfig",
            "AutoModelForCausalLM": "modeling_saap_llama.SaapLlamaForCausalLM",
        },
    },
    "nas": {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": NAS_TYPE,
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
    },
}
"""Form -> the keys of its config that name the code that travels with it."""


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
    check_form(spec, form)
    layers = {"padded": uniform_widths, "nas": nas_widths}.get(form, lambda spec: spec.layers)(spec)
    widened = dataclasses.replace(spec, layers=layers)
    config = config_from_spec(widened, dtype.name, per_layer=form in TRAVELS) | TRAVELS.get(form, {})
    for name in {each.partition(".")[0] for each in config.get("auto_map", {}).values()}:
        shutil.copyfile(REMOTE / f"{name}.py", place / f"{name}.py")
    settings = _generation(spec, tokenizer)
    config |= {key: value for key, value in settings.items() if key == "pad_token_id"}
    tensors = as_stored(model_tensors(model, layers), groups_of(spec, config["model_type"]))
    if form == "nas":
        config |= {BLOCKS: blocks(layers), "qkv_bias": spec.input_biases}
        tensors = [tensor for tensor in tensors if tensor.name not in unread(widened)]
    zeros = []
    if config.get("attention_bias"):  # a plain LLaMA has biases of its other projections too
        inner = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        rows = {each.name: each.shape[0] for each in tensors if each.name.endswith(inner)}
        zeros = [Tensor(f"{name.removesuffix('weight')}bias", (size,), lambda size=size: np.zeros(size, np.float32))
                 for name, size in rows.items()]  # fmt: skip
    write_json(config, place / "config.json")
    write_tensors(tensors + zeros, place / "model.safetensors", dtype)
    if generation is not None:
        shutil.copyfile(generation, place / "generation_config.json")
    else:
        write_json(settings, place / "generation_config.json")
    if tokenizer is not None:
        write_tokenizer(tokenizer, place)
    return added_parameters(spec, layers) + sum(tensor.shape[0] for tensor in zeros)


def forms_of(spec: LlamaSpec) -> list[Form]:
    """List the forms that can hold a model: the plain one first, if it can."""
    fits: list[Form] = []
    for form in get_args(Form):
        try:
            check_form(spec, form)
            if form == "padded":
                uniform_widths(spec)
        except ValueError:
            continue
        fits.append(form)
    return fits


def check_form(spec: LlamaSpec, form: Form) -> None:
    """Raise `ValueError` unless a format can hold a model; the message says which one can.

    An expert of zeros would be routed to, so mixtures are not padded. The code that travels with a ragged model has
    layers that see positions alike, and no norms behind sub-blocks; vLLM's of `nas` no norms of heads, windows and
    output biases either. A plain family may have no output biases, and transformers refuses numbers of heads that do
    not divide the residual width.
    """
    constants, traits = spec.constants, spec.constants.traits
    if form != "hf" and traits.experts:
        alike = "choose --format hf, for layers that are alike (the allocation uniform)"
        raise unfit(form, "a model without experts", f"a {constants.family}", alike)
    if form == "nas" and (traits.head_norms or constants.sliding_window is not None or spec.output_biases):
        if spec.output_biases:
            got = "some"
        else:
            got = f"a {constants.family}"
        expected = "no norms of heads, windows or biases of output projections, which vLLM's DeciLM has not"
        raise unfit(form, expected, got, "choose --format padded")
    if form in TRAVELS:
        if constants.apart is not None or traits.post_norms:
            got = f"a {constants.family} with {'layers apart' if constants.apart is not None else 'such norms'}"
            expected = "layers that see positions alike, and no norms behind sub-blocks"
            raise unfit(form, expected, got, "choose --format padded or gguf")
        return
    if spec.output_biases and not traits.plain_biases:
        expected = f"no biases of output projections in family {constants.family}"
        raise unfit(form, expected, "those of the step bias", RAGGED)
    first = spec.layers[0]
    heads = first.kv_heads * first.q_per_kv
    if form == "padded" or (fits_plain_config(spec) and (spec.embed % heads == 0 or not traits.heads_divide)):
        return
    units = "experts" if traits.experts else "MLP channels"
    kinds = {"KV heads": "kv_heads", "query heads a KV head": "q_per_kv", units: "mlp"}
    if traits.experts:
        kinds |= {"channels an expert": "channels"}
    ranges = {kind: sorted({getattr(layer, name) for layer in spec.layers}) for kind, name in kinds.items()}
    got = ", ".join(f"{found[0]} to {found[-1]} {kind}" for kind, found in ranges.items() if len(found) > 1)
    if not got and heads and first.mlp:
        got = f"{heads} attention heads, which transformers refuses beside a hidden size of {spec.embed}"
    if traits.experts:
        expected = f"layers alike, with heads and at least {constants.experts_per_token} experts"
        raise unfit(form, expected, got or "fewer", "prune with the allocation uniform, all layers alike")
    fitting = [f"{other} ({what})" for other, what in INSTEAD.items() if _holds(spec, other)]
    choose = f"choose --format {', '.join(fitting)} or gguf (llama.cpp)"
    raise unfit(form, "layers of equal widths above zero", got or "layers without heads or channels", choose)


def _holds(spec: LlamaSpec, form: Form) -> bool:
    try:
        check_form(spec, form)
    except ValueError:
        return False
    return True


def _generation(spec: LlamaSpec, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Tell where a text begins and ends: as the model says, or else as its tokenizer does."""
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad")}
    ends = list(spec.constants.eos_tokens)
    if spec.constants.bos_token is not None:
        found["bos"] = spec.constants.bos_token
    if ends:
        found["eos"] = ends[0] if len(ends) == 1 else ends
    return {f"{role}_token_id": value for role, value in found.items() if value is not None}
