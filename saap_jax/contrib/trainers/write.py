"""What trainers of JAX have to be told of a model: the configurations of MaxText and of Tunix (google-tunix).

MaxText distils from `files.orbax` checkpoints by a YAML file. Tunix reads Hugging Face directories of its families,
given a `ModelConfig`; names are those of its 0.1.7.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from saap_jax.contrib.trainers.read import BLOCKS, ITEMS
from saap_jax.llama.spec import LlamaSpec, RopeScaling

BASE = "post_train/distillation.yml"
"""The configuration of MaxText that ours begins with, below its `configs`."""

PUBLISHED = RopeScaling(kind="llama3", factor=8.0)
"""The rotary scaling of Llama 3.1, the one that MaxText has."""


def overrides(spec: LlamaSpec) -> dict[str, Any]:
    """Describe a model to MaxText: the `student_overrides` of its configuration.

    Raises:
        ValueError: a family that is not written, layers of different widths, or what its blocks do not compute.
    """
    constants, first, scaling = spec.constants, spec.layers[0], spec.constants.rope_scaling
    windows = constants.apart is not None or constants.sliding_window is not None
    for holds, expected, got in (
        (constants.family in BLOCKS, f"a family of {', '.join(BLOCKS)}", constants.family),
        (
            spec.uniform and first.kv_heads and first.mlp,
            "layers of equal widths above zero, one number each being all that MaxText takes",
            "others; choose --format padded or ragged, or search with uniform widths",
        ),
        (not spec.output_biases, "no biases of output projections, which its blocks have not", "some"),
        (not windows, "no windows, which its blocks have not", "some"),
        (float(constants.rope_theta).is_integer(), "a whole number as rotary base", f"{constants.rope_theta:g}"),
        (scaling in (None, PUBLISHED), "the rotary scaling of Llama 3.1, factor 8 from 8,192 positions", scaling),
    ):
        if not holds:
            raise ValueError(f"format maxtext: expected {expected}, got {got}")
    said: dict[str, Any] = {
        "model_name": "default",
        "decoder_block": BLOCKS[constants.family],
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
        said |= {"use_qk_norm": True}
    return said | ({} if scaling is None else {"rope_type": "llama3.1"})


class Side(NamedTuple):
    """A model of a distillation."""

    spec: LlamaSpec
    place: str
    """Path or address where its checkpoint will be."""


def settings_of(student: Side, teacher: Side | None, tokenizer: str | None) -> str:
    """Write a configuration of MaxText's distillation, YAML, which lacks its data and, perhaps, the teacher.

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


# --- Tunix -----------------------------------------------------------------------------------------

THETA = 1_000_000
"""The rotary base of `llama3` and `qwen3` in Tunix, whatever their configuration says."""


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


TUNIX: Mapping[str, Known] = {
    "llama": Known("llama3", "Llama3", "weight_tying"),
    "mistral": Known("llama3", "Llama3", "weight_tying"),
    "qwen2": Known("qwen2", "Qwen2", "use_tied_embedding"),
    "qwen3": Known("qwen3", "Qwen3", "use_tied_embedding"),
    "gemma3_text": Known("gemma3", "Gemma3", "", "params_safetensors"),
}
"""Our family -> that of Tunix which computes it."""


def configuration(spec: LlamaSpec) -> dict[str, Any]:
    """Make the content of `tunix.json`: module and class of Tunix, and the arguments of its `ModelConfig`.

    Raises:
        ValueError: a family that Tunix has none for, or layers of different widths.
    """
    constants, first, apart = spec.constants, spec.layers[0], spec.constants.apart
    for holds, expected, got in (
        (constants.family in TUNIX, f"a family of {', '.join(TUNIX)}, which Tunix has", constants.family),
        (spec.uniform, "layers of equal widths, which is all that Tunix knows", "others"),
        (not spec.output_biases, "no biases of output projections, which Tunix has not", "some"),
    ):
        if not holds:
            raise ValueError(f"format tunix: expected {expected}, got {got}")
    known = TUNIX[constants.family]
    arguments = {
        "num_layers": len(spec.layers),
        "embed_dim": spec.embed,
        "hidden_dim": first.mlp,
        "num_heads": first.kv_heads * first.q_per_kv,
        "head_dim": spec.head_dim,
        "num_kv_heads": first.kv_heads,
    }
    if known.module == "gemma3":
        arguments |= {"num_embed": spec.vocab, "global_base_frequency": _whole(constants.rope_theta)}
        if apart is not None:
            window = apart.sliding_window or constants.positions  # Tunix wants a number
            arguments |= {"sliding_window_size": window, "local_base_frequency": _whole(apart.rope_theta)}
    else:
        arguments |= {"vocab_size": spec.vocab, "rope_theta": _whole(constants.rope_theta)}
        arguments |= {"norm_eps": constants.norm_eps, known.tied: spec.tied}
    about = {"module": f"tunix.models.{known.module}", "model": known.model, "loader": known.loader}
    return about | {"config": arguments}


def _whole(value: float) -> int | float:
    if float(value).is_integer():
        return int(value)
    return value


def departures(spec: LlamaSpec) -> tuple[str, ...]:
    """List in sentences where Tunix differs from the model; of a family that it has."""
    constants, apart, module = spec.constants, spec.constants.apart, TUNIX[spec.constants.family].module
    gemma = module == "gemma3"
    window = (apart or constants).sliding_window
    local = tuple(layer for layer in range(len(spec.layers)) if layer % 6 != 5)
    scalings = [constants.rope_scaling, None if apart is None else apart.rope_scaling]
    theta = constants.rope_theta
    eps = constants.norm_eps
    said = (
        (
            module in ("llama3", "qwen3") and theta != THETA,
            f"Tunix turns heads of {module} by a rotary base of {THETA:,}, whatever its configuration says, and the "
            f"model has {theta:,.0f}: its logits are others there",
        ),
        (
            any(scaling is not None for scaling in scalings),
            f"Tunix does not scale rotary frequencies of {module} from such a file: its logits are others there",
        ),
        (
            window is not None and not gemma,
            f"Tunix has no sliding window in {module}: its logits are others beyond {window or 0:,} tokens",
        ),
        (
            gemma and (apart is None or apart.layers != local),
            "Tunix has a window in all layers of Gemma but each sixth, and the model in others",
        ),
        (gemma and not spec.tied, "Tunix predicts words of Gemma by their embeddings, and the model by another matrix"),
        (gemma and eps != 1e-6, f"Tunix adds 1e-6 in the norms of Gemma, and the model {eps:g}"),
        (
            gemma and constants.query_scalar not in (None, spec.head_dim),
            "Tunix divides the scores of Gemma by the root of the size of a head, and the model by another",
        ),
    )
    return tuple(sentence for holds, sentence in said if holds)
