"""A second implementation of what the program reads and computes, of numpy and plain Python: what the number should be.

Nothing of `saap_jax` is used. A file that is no such file, or whose meaning is in doubt, is a `ValueError`.
"""

import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

Tensors = dict[str, np.ndarray]


class AnotherError(Exception):
    """A file says something that no model here computes: it has to be refused."""


class NotComputedError(Exception):
    """What the figure should be is not computed here."""


TOLERANCE = 2e-4
"""Of a figure in float32 against one in float64, relative."""


class Network(NamedTuple):
    """A plain LLaMA: Hugging Face's names and layout of tensors."""

    tensors: Tensors
    layers: tuple[tuple[int, int, int], ...]
    """(key/value heads, query heads of each, channels) of each layer."""
    embed: int
    head_dim: int
    eps: float
    theta: float
    positions: int
    tied: bool


# --- JSON --------------------------------------------------------------------------------------------


def read_json(text: str | bytes) -> Any:
    """Read JSON as the standard has it: no key twice, no NaN, no nesting that a reader cannot follow."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) < len(found):
            raise ValueError("a key is there twice")
        return dict(found)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_integer(value: Any, least: int = 1) -> bool:
    """Say whether a value is a whole number that a size can be."""
    return type(value) is int and least <= value < 2**31


def integer(value: Any, least: int = 1) -> int:
    """Return a size, or raise."""
    if not is_integer(value, least):
        raise ValueError(f"{value!r} is no size")
    return value


def number(value: Any) -> float:
    """Return a positive number, or raise."""
    if type(value) not in (int, float) or not 0 < value < 1e300:
        raise ValueError(f"{value!r} is no positive number")
    return float(value)


# --- a directory of Hugging Face ---------------------------------------------------------------------


def read_safetensors(content: bytes) -> tuple[Tensors, dict[str, str]]:
    """Read tensors and metadata; the data follow each other without gap or overlap, to the end of the file."""
    if len(content) < 8:
        raise ValueError("no header")
    (size,) = struct.unpack("<Q", content[:8])
    if size > len(content) - 8:
        raise ValueError("the header is longer than the file")
    header, data = read_json(content[8 : 8 + size].decode()), content[8 + size :]
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata are no texts")
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        if set(entry) != {"dtype", "shape", "data_offsets"} or not isinstance(entry["shape"], list):
            raise ValueError(f"{name}: no tensor")
        dtype = {"F32": "<f4", "F64": "<f8", "F16": "<f2"}.get(entry["dtype"])
        shape = [integer(each, 0) for each in entry["shape"]]
        first, last = _offsets(entry)
        if dtype is None or first != end or last - first != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"{name}: type, shape and offsets disagree")
        tensors[name], end = np.frombuffer(data[first:last], dtype).reshape(shape).astype(np.float64), last
    if end != len(data):
        raise ValueError("data that belong to no tensor")
    return tensors, metadata


def _offsets(entry: Any) -> tuple[int, int]:
    found = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(found, list) or len(found) != 2:
        raise ValueError("no offsets")
    return integer(found[0], 0), integer(found[1], 0)


def read_tensors(directory: Path) -> Tensors:
    """Read the tensors of a directory, in one file or in those of an index."""
    if (directory / "model.safetensors").exists():
        return read_safetensors((directory / "model.safetensors").read_bytes())[0]
    index = read_json((directory / "model.safetensors.index.json").read_bytes())
    places = index["weight_map"] if isinstance(index, dict) and "weight_map" in index else None
    if not isinstance(places, dict) or not all(isinstance(each, str) for each in places.values()):
        raise ValueError("no index")
    tensors: Tensors = {}
    for shard in set(places.values()):
        if "/" in shard or "\0" in shard or not (directory / shard).is_file():
            raise ValueError("a shard is missing")
        found = read_safetensors((directory / shard).read_bytes())[0]
        if found.keys() & tensors.keys():
            raise ValueError("a tensor is there twice")
        if {name for name, place in places.items() if place == shard} - found.keys():
            raise ValueError("a tensor is elsewhere than the index says")
        tensors |= found
    return tensors


def read_config(config: Any, tensors: Tensors) -> Network:
    """Make a network of a `config.json`; what is said in two places has to be said alike."""
    if not isinstance(config, dict) or config.get("model_type") not in ("llama", "saap_llama", "mistral"):
        raise ValueError("no LLaMA")
    if config.get("hidden_act") not in (None, "silu") or config.get("quantization_config") is not None:
        raise ValueError("another computation")
    if any(config.get(key) not in (None, False) for key in ("attention_bias", "mlp_bias", "output_biases")):
        raise ValueError("biases")
    embed, count = integer(config.get("hidden_size")), integer(config.get("num_hidden_layers"))
    layers = _layers(config, count)
    head_dim = config.get("head_dim")
    if head_dim is None:
        heads = layers[0][0] * layers[0][1]
        if embed % heads:
            raise ValueError("heads do not divide the width")
        head_dim = embed // heads
    if config.get("sliding_window") is not None or config.get("saap_quantization") is not None:
        raise ValueError("not computed here")
    return checked(
        Network(
            tensors,
            layers,
            embed,
            integer(head_dim),
            number(config.get("rms_norm_eps", 1e-6)),
            _theta(config),
            integer(config.get("max_position_embeddings", 2048)),
            _flag(config.get("tie_word_embeddings")),
        ),
        integer(config.get("vocab_size")),
    )


def _layers(config: dict[str, Any], count: int) -> tuple[tuple[int, int, int], ...]:
    if count > 1000:
        raise ValueError("more layers than anybody has")
    if config["model_type"] != "saap_llama":
        heads = integer(config.get("num_attention_heads"))
        kv_heads = config.get("num_key_value_heads")
        kv_heads = heads if kv_heads is None else integer(kv_heads)
        if heads % kv_heads:
            raise ValueError("heads are no multiple")
        return ((kv_heads, heads // kv_heads, integer(config.get("intermediate_size"))),) * count
    keys = ("num_key_value_heads", "query_heads_per_kv_head", "intermediate_size", "num_attention_heads")
    if not all(isinstance(config.get(key), list) and len(config[key]) == count for key in keys):
        raise ValueError("no number a layer")
    rows = [tuple(integer(each, 0) for each in row) for row in zip(*(config[key] for key in keys), strict=True)]
    if any(row[0] * row[1] != row[3] for row in rows):
        raise ValueError("heads are no multiple")
    return tuple(row[:3] for row in rows)


def _theta(config: dict[str, Any]) -> float:
    found = [config["rope_theta"]] if config.get("rope_theta") is not None else []
    for key in ("rope_parameters", "rope_scaling"):
        settings = {} if config.get(key) is None else config[key]
        if not isinstance(settings, dict):
            raise ValueError("rotary settings")
        settings = {name: value for name, value in settings.items() if value is not None}
        found += [settings.pop("rope_theta")] if "rope_theta" in settings else []
        kinds = {settings.pop(name) for name in ("type", "rope_type") if isinstance(settings.get(name), str)}
        if not kinds <= {"default"} or settings:
            raise ValueError("rotary settings")
    if any(each != found[0] for each in found):
        raise ValueError("two bases")
    return number(found[0]) if found else 10_000.0


def _flag(value: Any) -> bool:
    if value not in (None, True, False) or type(value) not in (type(None), bool):
        raise ValueError("no flag")
    return bool(value)


def checked(network: Network, vocab: int) -> Network:
    """Return a network whose tensors are those that its sizes call for; raise for another."""
    embed, head_dim = network.embed, network.head_dim
    expected = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)}
    expected |= {} if network.tied else {"lm_head.weight": (vocab, embed)}
    for number_, (kv_heads, group, mlp) in enumerate(network.layers):
        layer, heads = f"model.layers.{number_}", kv_heads * group
        expected |= {
            f"{layer}.input_layernorm.weight": (embed,),
            f"{layer}.post_attention_layernorm.weight": (embed,),
            f"{layer}.self_attn.q_proj.weight": (heads * head_dim, embed),
            f"{layer}.self_attn.k_proj.weight": (kv_heads * head_dim, embed),
            f"{layer}.self_attn.v_proj.weight": (kv_heads * head_dim, embed),
            f"{layer}.self_attn.o_proj.weight": (embed, heads * head_dim),
            f"{layer}.mlp.gate_proj.weight": (mlp, embed),
            f"{layer}.mlp.up_proj.weight": (mlp, embed),
            f"{layer}.mlp.down_proj.weight": (embed, mlp),
        }
    found = {name: tensor.shape for name, tensor in network.tensors.items()}
    if network.tied and "lm_head.weight" in found and "lm_head.weight" not in expected:
        if not np.array_equal(network.tensors["lm_head.weight"], network.tensors["model.embed_tokens.weight"]):
            raise ValueError("tied and not tied")
        del found["lm_head.weight"]
    if found != expected:
        raise ValueError("other tensors")
    if head_dim % 2 or not all(np.isfinite(tensor).all() for tensor in network.tensors.values()):
        raise ValueError("no network")
    return network


def parameters(network: Network) -> int:
    """Count the parameters."""
    held = (tensor.size for name, tensor in network.tensors.items() if not (network.tied and name == "lm_head.weight"))
    return sum(held)


# --- what it computes --------------------------------------------------------------------------------


def logits(network: Network, tokens: Sequence[int]) -> np.ndarray:
    """Return the logits of each token, float64 [seq, vocab]."""
    w, eps, count = network.tensors, network.eps, len(tokens)
    if count > network.positions:
        raise ValueError("longer than the model's positions")
    if count and not 0 <= min(tokens) <= max(tokens) < len(w["model.embed_tokens.weight"]):
        raise ValueError("a token that the model does not have")
    x = w["model.embed_tokens.weight"][list(tokens)]
    half = network.head_dim // 2
    angle = np.outer(np.arange(count), network.theta ** (-np.arange(half) / half))
    turn = np.exp(1j * np.concatenate([angle, angle], axis=1))
    hidden = np.triu(np.ones((count, count), bool), 1)

    def rotated(heads: np.ndarray) -> np.ndarray:
        first, second = heads[..., :half], heads[..., half:]
        return heads * turn.real + np.concatenate([-second, first], axis=-1) * turn.imag

    for number_, (kv_heads, group, _) in enumerate(network.layers):
        layer = f"model.layers.{number_}"
        normed = _norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        query, key, value = (
            (normed @ w[f"{layer}.self_attn.{name}_proj.weight"].T).reshape(count, -1, network.head_dim).swapaxes(0, 1)
            for name in "qkv"
        )
        query, key, value = rotated(query), np.repeat(rotated(key), group, 0), np.repeat(value, group, 0)
        scores = query @ key.swapaxes(1, 2) / math.sqrt(network.head_dim)
        mixed = _softmax(np.where(hidden, -np.inf, scores)) @ value if kv_heads else np.zeros((0, count, 0))
        joined = mixed.swapaxes(0, 1).reshape(count, -1)
        x = x + joined @ w[f"{layer}.self_attn.o_proj.weight"].T
        normed = _norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = (normed @ w[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if network.tied else "lm_head.weight"]
    return _norm(x, w["model.norm.weight"], eps) @ head.T


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * scale


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_likelihoods(network: Network, tokens: Sequence[int]) -> np.ndarray:
    """Return the log-probability of each token but the first, given those before it."""
    found = logits(network, tokens)[:-1]
    top = found.max(axis=1)
    whole = top + np.log(np.exp(found - top[:, None]).sum(axis=1))
    return found[np.arange(len(found)), list(tokens[1:])] - whole


def perplexity(network: Network, tokens: Sequence[int], length: int, limit: int) -> float:
    """Return exp(mean loss) of the first `limit` windows of a text (0: all), one after the other."""
    count = len(tokens) // length
    count = min(count, limit) if limit else count
    if count == 0:
        raise ValueError("a text shorter than a window")
    windows = [tokens[start * length : (start + 1) * length] for start in range(count)]
    return math.exp(-np.concatenate([log_likelihoods(network, window) for window in windows]).mean())


def continuation(network: Network, tokens: Sequence[int], count: int, ends: Sequence[int]) -> list[int]:
    """Return the most probable tokens, one after the other, up to an end."""
    written = list(tokens)
    for _ in range(count):
        written.append(int(logits(network, written)[-1].argmax()))
        if written[-1] in ends:
            break
    return written[len(tokens) :]


# --- tokenizers --------------------------------------------------------------------------------------


def read_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json` by the library that defines it; texts are never cut or filled up."""
    content = (directory / "tokenizer.json").read_text(encoding="utf-8")
    read_json(content)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:
        raise ValueError(f"no tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def plain_tokens(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text in which special ones are spelled like other words."""
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:
        raise ValueError(f"no tokens ({error})") from None
    finally:
        tokenizer.encode_special_tokens = False


# --- GGUF --------------------------------------------------------------------------------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf(NamedTuple):
    """The content of a GGUF file, and where each of its numbers lies."""

    values: dict[str, Any]
    tensors: Tensors
    """In the order of numpy: rows first."""
    places: list[tuple[str, int, int]]
    """(what it is, offset, bytes) of counts, lengths, types, dimensions and offsets."""


def read_gguf(content: bytes) -> Gguf:
    """Read a GGUF file of version 3 with float32 tensors, which do not overlap."""
    places: list[tuple[str, int, int]] = []
    position = 0

    def take(what: str, form: str) -> Any:
        nonlocal position
        size = struct.calcsize("<" + form)
        if position + size > len(content):
            raise ValueError("the file ends early")
        places.append((what, position, size))
        (value,) = struct.unpack_from("<" + form, content, position)
        position += size
        return value

    def text(what: str) -> str:
        nonlocal position
        size = take(f"length of {what}", "Q")
        if position + size > len(content):
            raise ValueError("the file ends early")
        value = content[position : position + size].decode()
        position += size
        return value

    def value_of(what: str, kind: int) -> Any:
        if kind == 8:
            return text(what)
        if kind == 9:
            inner, count = take(f"type of items of {what}", "I"), take(f"items of {what}", "Q")
            if inner == 9 or count > len(content):
                raise ValueError("no array")
            return [value_of(what, inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError("no type")
        return take(what, _SCALARS[kind])

    if content[:4] != b"GGUF":
        raise ValueError("no GGUF")
    position = 4
    if take("version", "I") != 3:
        raise ValueError("another version")
    tensor_count, value_count = take("tensors", "Q"), take("values", "Q")
    if max(tensor_count, value_count) > len(content):
        raise ValueError("more than the file can hold")
    values: dict[str, Any] = {}
    for _ in range(value_count):
        key = text("key")
        if key in values:
            raise ValueError("a key is there twice")
        values[key] = value_of(key, take(f"type of {key}", "I"))
    infos = {}
    for _ in range(tensor_count):
        name = text("name")
        rank = take(f"rank of {name}", "I")
        if name in infos or rank > 4:
            raise ValueError("no tensor")
        shape = [take(f"dimension of {name}", "Q") for _ in range(rank)]
        infos[name] = (shape, take(f"type of {name}", "I"), take(f"offset of {name}", "Q"))
    alignment = integer(values.get("general.alignment", 32))
    if alignment & (alignment - 1):
        raise ValueError("no alignment")
    start = -(-position // alignment) * alignment
    tensors, ends = {}, []
    for name, (shape, kind, offset) in infos.items():
        size = 4 * math.prod(shape)
        if kind != 0 or offset % alignment or start + offset + size > len(content):
            raise ValueError("data elsewhere")
        ends.append((offset, offset + size))
        data = content[start + offset : start + offset + size]
        tensors[name] = np.frombuffer(data, "<f4").reshape(shape[::-1]).astype(np.float64)
    ends.sort()
    if any(before[1] > after[0] for before, after in itertools.pairwise(ends)):
        raise ValueError("tensors overlap")
    return Gguf(values, tensors, places)


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def gguf_network(found: Gguf) -> Network:
    """Make a network of a GGUF file of architecture `llama`."""
    values = found.values
    if values.get("general.architecture") != "llama":
        raise ValueError("no LLaMA")

    def size(key: str, default: int | None = None) -> int:
        return integer(values.get(f"llama.{key}", default))

    heads = size("attention.head_count")
    kv_heads, embed = size("attention.head_count_kv", heads), size("embedding_length")
    head_dim = size("attention.key_length", embed // heads)
    if {size("attention.value_length", head_dim), size("rope.dimension_count", head_dim)} != {head_dim}:
        raise ValueError("heads of several sizes")
    if heads % kv_heads or size("block_count") > 1000:
        raise ValueError("heads are no multiple")
    tensors = {}
    for name, tensor in found.tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
        if match is None or match[2] not in _NAMES:
            raise ValueError("an unknown tensor")
        if match[2] in ("attn_q", "attn_k"):  # pairs side by side -> halves of each head
            shape = tensor.shape
            tensor = tensor.reshape(-1, head_dim // 2, 2, shape[-1]).swapaxes(1, 2).reshape(shape)
        tensors[(f"model.layers.{match[1]}." if match[1] else "") + f"{_NAMES[match[2]]}.weight"] = tensor
    network = Network(
        tensors,
        ((kv_heads, heads // kv_heads, size("feed_forward_length")),) * size("block_count"),
        embed,
        head_dim,
        number(values.get("llama.attention.layer_norm_rms_epsilon")),
        number(values.get("llama.rope.freq_base", 10_000.0)),
        size("context_length"),
        "lm_head.weight" not in tensors,
    )
    vocab = len(tensors.get("model.embed_tokens.weight", ()))
    if values.get("llama.vocab_size", vocab) != vocab:
        raise ValueError("two sizes of the vocabulary")
    return checked(network, vocab)


def gguf_tokens(found: Gguf, text: str) -> list[int]:
    """Return the tokens of a text by a file's byte-level BPE, with words split as GPT-2 does."""
    values = found.values
    if (values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")) != ("gpt2", "gpt-2"):
        raise ValueError("another tokenizer")
    tokens, merges = values.get("tokenizer.ggml.tokens"), values.get("tokenizer.ggml.merges", [])
    kinds = values.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(merges, list) or not isinstance(kinds, list):
        raise ValueError("no tokens")
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else () for merge in merges]
    if len(ids) < len(tokens) or len(kinds) != len(tokens) or any(len(pair) != 2 for pair in pairs):
        raise ValueError("no vocabulary")
    if len(set(pairs)) < len(pairs):
        raise ValueError("a merge is there twice")
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    if any(a not in ids or b not in ids or a + b not in ids for a, b in pairs):
        raise ValueError("a merge of unknown tokens")
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    found_ids = []
    for word, _ in words:
        parts = list(word)
        while True:
            known = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
            if not known:
                break
            place = min(known)[1]
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        if any(part not in ids for part in parts):
            raise ValueError("a byte without a token")
        found_ids += [ids[part] for part in parts]
    return found_ids


# --- text --------------------------------------------------------------------------------------------


def decoded(content: bytes) -> str:
    """Return text: UTF-8, a byte order mark left out, lines ended by one character."""
    return content.decode("utf-8-sig").replace("\r\n", "\n")


def json_lines(content: bytes) -> list[dict[str, Any]]:
    """Read an object a line."""
    found = [read_json(line) for line in decoded(content).split("\n") if line.strip()]
    if not found or not all(isinstance(each, dict) for each in found):
        raise ValueError("no object")
    return found


def meaning(function: Callable[[], Network]) -> Network:
    """Return the network that a function makes of what is on file; `AnotherError` where that is none."""
    try:
        return function()
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise AnotherError(str(error)) from None


def differing(found: Any, expected: Any, path: str = "") -> str:
    """Return where two figures differ, or nothing."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            return f"{path}: {list(found)}, expected {list(expected)}"
        each = [(f"{path}/{key}", found[key], expected[key]) for key in expected]
    elif isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            return f"{path}: {len(found)} values, expected {len(expected)}"
        each = [(f"{path}/{i}", *pair) for i, pair in enumerate(zip(found, expected, strict=True))]
    elif isinstance(expected, float) and isinstance(found, int | float):
        same = math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=1e-6) or found == expected
        return "" if same else f"{path}: {found}, expected {expected}"
    else:
        return "" if found == expected else f"{path}: {found!r}, expected {expected!r}"
    return next(filter(None, (differing(one, other, where) for where, one, other in each)), "")
