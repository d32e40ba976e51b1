"""What a LLaMA-family model is: constants that no array shows, and the sizes of each layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from saap_jax.errors import shown
from saap_jax.llama.files.families import FAMILIES, Family
from saap_jax.runtime import words


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rescaling of the rotary frequencies for contexts longer than the original one.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides only wavelengths longer than
    `original_max_positions / low_freq_factor`, keeps those shorter than `original_max_positions / high_freq_factor`
    and interpolates between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling: expected 'linear' or 'llama3', got {self.kind!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope scaling: expected factor >= 1, got {self.factor}")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope scaling: expected low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Apart:
    """Layers that see positions otherwise than the rest of a model."""

    layers: tuple[int, ...]
    """Their numbers, ascending."""
    sliding_window: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers apart: expected numbers of layers, ascending, got {list(self.layers)}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window: expected at least 1 position, got {self.sliding_window}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
    """Hyper-parameters that no parameter's shape tells: the only thing that a model stores beside its arrays."""

    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()
    family: str = "llama"
    """Of `files.families.FAMILIES`."""
    sliding_window: int | None = None
    """Positions that a token sees, its own among them; None for all before it."""
    query_scalar: int | None = None
    """Scores are divided by its square root; None for the size of a head."""
    apart: Apart | None = None
    """Layers of which all this is otherwise; None where layers are alike."""
    experts_per_token: int | None = None
    """Of a mixture: experts that a token is routed to; None where the MLP is one."""
    route_scale: Literal["kept", "sum_to_one"] = "sum_to_one"
    """Weights of the experts of a token: their probabilities among all experts, or these divided by their sum."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window: expected at least 1 position, got {self.sliding_window}")
        if self.sliding_window is not None and not self.traits.windowed:
            raise ValueError(f"sliding_window: expected none in family {self.family!r}, got {self.sliding_window}")
        if (self.experts_per_token is not None) != self.traits.experts or (self.experts_per_token or 1) < 1:
            expected = "at least 1" if self.traits.experts else "none"
            raise ValueError(
                f"experts_per_token: expected {expected} in family {self.family!r}, got {self.experts_per_token}"
            )

    @property
    def positions(self) -> int:
        """Positions that the rotary embedding is made for, those that its scaling adds among them.

        >>> Constants(max_positions=4096, rope_scaling=RopeScaling(kind="linear", factor=2.0)).positions
        8192
        >>> scaling = RopeScaling(kind="llama3", factor=32.0, original_max_positions=8192)
        >>> Constants(max_positions=131072, rope_scaling=scaling).positions  # which has been counted already
        131072
        """
        if (scaling := self.rope_scaling) is None:
            return self.max_positions
        if scaling.kind == "linear":
            before = self.max_positions
        else:
            before = scaling.original_max_positions
        if self.max_positions > before:
            return self.max_positions
        return int(before * scaling.factor)

    @property
    def traits(self) -> Family:
        """What the family has beside LLaMA."""
        return FAMILIES[self.family]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Sizes of one decoder layer; `kv_heads` and `mlp` may be 0 (the sub-block is then skipped)."""

    kv_heads: int
    q_per_kv: int
    mlp: int
    """Channels of the MLP; of a mixture, its experts."""
    channels: int | None = None
    """Of a mixture: channels of each expert."""

    def __post_init__(self) -> None:
        if self.kv_heads < 0 or self.mlp < 0 or self.q_per_kv < 1 or (self.channels or 1) < 1:
            raise ValueError(
                f"layer widths: expected kv_heads >= 0, mlp >= 0, q_per_kv >= 1 and channels >= 1, got {self}"
            )

    @property
    def mlp_channels(self) -> int:
        """Channels of the MLP, those of all experts together."""
        return self.mlp * (self.channels or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaSpec:
    """Everything needed to allocate a model; derived from a model's arrays by `Llama.spec`."""

    vocab: int
    embed: int
    head_dim: int
    layers: tuple[LayerWidths, ...]
    tied: bool
    output_biases: bool = False
    """True when the attention output and the MLP down projection add a bias, as `bias` compensation needs."""
    constants: Constants = Constants()

    def __post_init__(self) -> None:
        if min(self.vocab, self.embed, self.head_dim, len(self.layers)) < 1:
            raise ValueError(
                "model spec: expected vocab, embed, head_dim and the number of layers to be at least 1, "
                f"got {self.vocab}, {self.embed}, {self.head_dim} and {len(self.layers)}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model spec: rotary embedding needs an even head_dim, got {self.head_dim}")
        if any((layer.channels is None) == self.constants.traits.experts for layer in self.layers):
            if self.constants.traits.experts:
                expected = "the channels of an expert"
            else:
                expected = "no channels of experts"
            raise ValueError(f"model spec: expected {expected} in each layer of family {self.constants.family!r}")

    @property
    def input_biases(self) -> bool:
        """True when query, key and value add a bias."""
        return self.constants.traits.input_biases

    @property
    def uniform(self) -> bool:
        """True when all layers have the same widths, as in every dense model."""
        return len(set(self.layers)) == 1

    @property
    def segments(self) -> tuple[tuple[LayerWidths, int], ...]:
        """(widths, length) of each maximal stretch of neighbouring layers of equal widths."""
        segments: list[tuple[LayerWidths, int]] = []
        for widths in self.layers:
            if segments and segments[-1][0] == widths:
                segments[-1] = (widths, segments[-1][1] + 1)
            else:
                segments.append((widths, 1))
        return tuple(segments)


def check_length(constants: Constants, length: int, option: str) -> None:
    """Raise ValueError if rows of `length` tokens are longer than a model's positions; `option` is what sets them."""
    if length > constants.positions:
        raise ValueError(
            f"{option}: expected at most {constants.positions:,} tokens, the positions of the model, got {length:,}; "
            f"give a smaller {option}"
        )


# --- values of files -----------------------------------------------------------------------------------

BOUNDS: dict[str, tuple[float, float]] = {
    "vocabulary": (1, 2**24),
    "token": (-(2**24), 2**24 - 1),
    "width": (1, 2**20),
    "channels": (1, 2**24),
    "heads": (1, 2**16),
    "head size": (2, 2**16),
    "layers": (1, 2**14),
    "positions": (1, 2**30),
    "count": (0, 2**30),
    "epsilon": (1e-15, 0.1),
    "theta": (2.0, 1e12),
    "factor": (1e-6, 1e6),
}
"""Smallest and largest value of a quantity in a file that is believed: far beyond every published model."""

TYPES = {"true or false": bool, "an object": dict, "a text": str, "an integer": int, "a number": float}
"""What values are that are no quantity."""


class Values(dict[str, Any]):
    """Values by key; `where` names the file, and a missing key is refused like one of another kind."""

    def __init__(self, values: Mapping[str, Any], kinds: Mapping[str, str], where: str, prefix: str = "") -> None:
        super().__init__(values)
        self.kinds = kinds
        self.where = where
        self.prefix = prefix

    def __missing__(self, key: str) -> Any:
        raise self.unlike(key, None)

    def unlike(self, key: str, got: Any) -> ValueError:
        """Make the error of a value that is of another kind."""
        name, star, _ = self.kinds.get(key, "a text").partition("*")
        if name in BOUNDS:
            least, most = BOUNDS[name]
            said, form = ("a number", "g") if isinstance(most, float) else ("a whole number", ",")
            name = f"{said} from {least:{form}} to {most:{form}}"
        said = f"{name}, or a list" if star else name
        return ValueError(f"{self.where}: expected {self.prefix}{key} to be {said}, got {shown(got)}")


def checked(given: Mapping[str, Any], kinds: Mapping[str, str], where: str, prefix: str = "") -> Values:
    """Choose the values that are not null, those in the table of the kind that it says.

    Args:
        kinds: one of `BOUNDS` or `TYPES`, with `*` behind it where a list of them may stand.

    Raises:
        ValueError: a value of another kind, or a number that is beyond what is believed.
    """
    values = Values({key: value for key, value in given.items() if value is not None}, kinds, where, prefix)
    for key, kind in ((key, kind) for key, kind in kinds.items() if key in values):
        many = isinstance(values[key], list) and kind.endswith("*")
        each = values[key] if many else [values[key]]
        name = kind.removesuffix("*")
        if name in TYPES:
            fits = all(type(one) is TYPES[name] for one in each)
        else:
            least, most = BOUNDS[name]
            types = (int, float) if isinstance(most, float) else (int,)
            fits = all(type(one) in types and (min(least, 0) if many else least) <= one <= most for one in each)
        if not fits:
            raise values.unlike(key, values[key])
    return values


def per_layer(value: Any, layers: int, key: str, where: str) -> list[int]:
    """Return a number a layer, of a list or of one number for all of them."""
    if isinstance(value, list) and len(value) != layers:
        raise ValueError(f"{where}: expected {key} to be {layers} numbers, one a layer, got {shown(value)}")
    if isinstance(value, list):
        return value
    return [value] * layers


def some(names: list[str]) -> str:
    """Name the first three, and how many more there are; what cannot be printed, or is long, as text in quotes."""
    return words.some([name if name.isprintable() and len(name) <= 100 else shown(name) for name in names])
