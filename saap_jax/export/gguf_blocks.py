"""Group-quantised matrices as blocks of GGUF: 4 bits in groups of 32 are Q4_1, integer for integer.

A block of Q4_1 is 20 bytes: d and m as float16, then 16 bytes of which byte k has integer k in its low and integer
k + 16 in its high half; a weight is d·q + m. That is what a `Quantized` matrix holds (α = d, the offset = m) but for
the type of d and m: each is off by at most 2⁻¹¹ of itself, so a weight by at most 2⁻¹¹ (15·α + |m|).
"""

from collections.abc import Sequence

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from saap_jax.llama.files.hf_layout import QUANTIZED
from saap_jax.llama.files.write import Tensor, model_tensors
from saap_jax.llama.model import Llama, param
from saap_jax.llama.product import Weight
from saap_jax.llama.quantized import Quantized, quantization_of, with_matrices
from saap_jax.llama.spec import LayerWidths

BITS, GROUP = 4, gguf.GGML_QUANT_SIZES[Type.Q4_1][0]

_FLOAT16 = np.finfo(np.float16)


def check_blocks(model: Llama) -> bool:
    """Say whether a model has matrices to be written as blocks; `ValueError` if they do not fit, naming what does."""
    if (quantization := quantization_of(model)) is None:
        return False
    if (quantization.bits, quantization.group_size) != (BITS, GROUP):
        raise ValueError(
            f"format gguf: expected matrices of {BITS} bits in groups of {GROUP} (blocks of Q4_1), got "
            f"{quantization.bits} bits in groups of {quantization.group_size}; choose --dequantize, with --dtype q8_0 "
            "or float16 to stay small, or recover the model with those"
        )
    return True


def gguf_tensors(model: Llama, layers: Sequence[LayerWidths]) -> list[Tensor]:
    """Return what `model_tensors` does, but of a quantised matrix one tensor, whose `read` gives rows of blocks.

    Its shape is that of the matrix, `[outputs, inputs]`; its dtype is uint8.
    """

    def without_empty(matrix: Weight) -> Weight:  # an empty sub-block is widened by zeros, and has no integers
        empty = isinstance(matrix, Quantized) and 0 in matrix.shape
        return param(matrix.axes, matrix.dense()) if empty else matrix

    tensors: list[Tensor] = []
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in model_tensors(with_matrices(model, without_empty), layers):
        name, _, kind = tensor.name.rpartition(".")
        if kind in QUANTIZED.values():
            parts.setdefault(name, {})[kind] = tensor
        else:
            tensors.append(tensor)
    return tensors + [
        _blocks(f"{name}.weight", *(each[kind] for kind in QUANTIZED.values())) for name, each in parts.items()
    ]


def _blocks(name: str, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    outputs, groups = scale.shape

    def read() -> np.ndarray:
        blocks = np.empty((outputs, groups, 20), np.uint8)
        for place, numbers in ((slice(0, 2), scale.read()), (slice(2, 4), offset.read())):
            if numbers.size and np.abs(numbers).max() > _FLOAT16.max:
                raise ValueError(
                    f"{name}: has a scale or offset of {np.abs(numbers).max():.3g}, beyond float16; choose --dequantize"
                )
            halves = np.ascontiguousarray(numbers, np.float32).astype("<f2")
            blocks[..., place] = halves.view(np.uint8).reshape(outputs, groups, 2)
        blocks[..., 4:] = packed.read().reshape(outputs, groups, 16)
        return blocks.reshape(outputs, groups * 20)

    return Tensor(name, (outputs, groups * GROUP), read, np.dtype(np.uint8))
