"""What a config says of positions, both ways: rotary base and scaling, and which layers have a sliding window."""

from collections.abc import Mapping, Sequence
from typing import Any

from saap_jax.llama.files.families import Family, all_but_each
from saap_jax.llama.files.values import Values, checked, number, some
from saap_jax.llama.spec import Apart, Constants, RopeScaling
from saap_jax.runtime.errors import shown

FULL, SLIDING = "full_attention", "sliding_attention"

_ORIGINAL = "original_max_position_embeddings"
_ROPE = {
    "default": {},
    "linear": {"factor": number("factor")},
    "llama3": {name: number("factor") for name in ("factor", "low_freq_factor", "high_freq_factor")}
    | {_ORIGINAL: number("positions")},
}
"""Rope type -> its settings."""


def sights_of(config: Values, family: Family, layers: int, *, per_layer: bool) -> dict[str, Any]:
    """Read how layers see positions: rotary base and scaling, window, and the layers apart from the rest."""
    scaled = per_layer or family.scaled
    theta, scaling, local = _rope(config, family, scaled)
    main: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    own: dict[str, Any] = dict(main) if local is None else {"rope_theta": local, "rope_scaling": None}
    window = config.get("sliding_window")
    if family.window_switch and not per_layer and not config.get("use_sliding_window"):
        window = None
    windowed = _local_layers(config, family, window, layers, per_layer)
    if windowed and window is None and not per_layer:
        raise ValueError(f"{config.where}: expected a sliding_window beside layer_types of {SLIDING}, got null")
    if window is not None and not per_layer and window >= config["max_position_embeddings"]:
        window = None  # as long as any text
    if not windowed or (own == main and window is None):
        return main
    own |= {"sliding_window": window}
    return own if len(windowed) == layers else main | {"apart": Apart(layers=windowed, **own)}


def sight_keys(constants: Constants, layers: int, *, per_layer: bool) -> dict[str, Any]:
    """Make the keys of a config that say how layers see positions.

    Rotary settings are written twice, as `rope_parameters` (transformers 5) and as `rope_theta` with `rope_scaling`: a
    reader that knows only one of the two would otherwise fall back to defaults without a word.
    """
    family, apart = constants.traits, constants.apart
    local = apart.layers if apart is not None else range(layers if constants.sliding_window is not None else 0)
    window = constants.sliding_window if apart is None else apart.sliding_window
    keys: dict[str, Any] = {}
    if per_layer:
        keys |= {"sliding_window": window} if window is not None else {}
        keys |= {"layer_types": layer_types(local, layers)} if apart is not None else {}
    elif family.windowed:
        if family.full_every and window is None:  # transformers wants a number
            window = constants.max_positions if local else family.defaults["sliding_window"]
        keys = {"sliding_window": window}
        if family.window_switch:
            keys = {"use_sliding_window": bool(local), **keys, "max_window_layers": 0 if local else layers}
        if family.window_by_layer and (family.full_every or 0 < len(local) < layers):
            keys |= {"layer_types": layer_types(local, layers)}
    scaling = _scaling_keys(constants.rope_scaling)
    main = {"rope_type": "default", **scaling, "rope_theta": constants.rope_theta}
    keys |= {"rope_parameters": main, "rope_theta": constants.rope_theta, "rope_scaling": scaling or None}
    if family.local_theta is None:
        return keys
    theta = constants.rope_theta if apart is None else apart.rope_theta
    if not per_layer:
        keys["rope_parameters"] = {FULL: main, SLIDING: {"rope_type": "default", "rope_theta": theta}}
    return keys | {"rope_local_base_freq": theta}


def layer_types(local: Sequence[int], layers: int) -> list[str]:
    """Make the `layer_types` of a config."""
    return [SLIDING if layer in local else FULL for layer in range(layers)]


def _local_layers(config: Values, family: Family, window: int | None, layers: int, per_layer: bool) -> tuple[int, ...]:
    """Read which layers have a local attention, also where it is as long as any text: their base may be another."""
    if (family.window_by_layer or per_layer) and (types := config.get("layer_types")) is not None:
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {FULL, SLIDING}:
            raise ValueError(
                f"{config.where}: expected layer_types to be {layers} of {FULL} and {SLIDING}, got {shown(types)}"
            )
        return tuple(layer for layer, kind in enumerate(types) if kind == SLIDING)
    if window is None:
        return ()
    if per_layer:
        return tuple(range(layers))
    if family.window_switch:
        return tuple(range(min(config["max_window_layers"], layers), layers))
    if family.full_every:
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", family.full_every))
        return all_but_each(every, layers)
    return tuple(range(layers))


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    keys = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        keys |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        keys |= {_ORIGINAL: scaling.original_max_positions}
    return keys


def _rope(config: Values, family: Family, scaled: bool) -> tuple[float, RopeScaling | None, float | None]:
    """Read base and scaling of the rotary embedding, and the base of local layers where the family has one."""
    if family.local_theta is None:
        return (*_one_rope(config, config.where, family, scaled), None)
    given, local = config.get("rope_parameters"), config.get("rope_local_base_freq")
    full: Mapping[str, Any] = config
    if given and set(given) <= {FULL, SLIDING}:
        of_local, full = given.get(SLIDING), dict(config) | {"rope_parameters": given.get(FULL)}
        if isinstance(of_local, dict):
            theta, other = _one_rope({"rope_parameters": of_local}, config.where, family, scaled)
            if other is not None or (local is not None and local != theta):
                raise ValueError(
                    f"{config.where}: expected rope_parameters of {SLIDING} with rope_type default and the base of "
                    f"rope_local_base_freq, got {shown(of_local)}"
                )
            local = theta if "rope_theta" in of_local else local
    return (*_one_rope(full, config.where, family, scaled), float(family.local_theta if local is None else local))


def _one_rope(given: Mapping[str, Any], where: str, family: Family, scaled: bool) -> tuple[float, RopeScaling | None]:
    """Read base and scaling of the rotary embedding, from `rope_parameters` or from the two older keys."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        settings = {name: value for name, value in (given.get(key) or {}).items() if value is not None}
        if settings:
            old = settings.pop("type", None)
            if settings.setdefault("rope_type", old or "default") != (old or settings["rope_type"]):
                raise ValueError(
                    f"{where}: {key} says both type {shown(old)} and rope_type {shown(settings['rope_type'])}"
                )
            found.append(settings)
    thetas = [settings.pop("rope_theta") for settings in found if "rope_theta" in settings]
    thetas += [given["rope_theta"]] if "rope_theta" in given else []
    if any(theta != thetas[0] for theta in thetas):
        raise ValueError(f"{where}: rope_theta is given more than once, as {', '.join(map(shown, thetas))}")
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError(f"{where}: rope_parameters and rope_scaling disagree: {shown(found[0])} and {shown(found[1])}")
    default = family.defaults.get("rope_theta", 10_000.0)
    theta = checked({"rope_theta": thetas[0] if thetas else default}, {"rope_theta": number("theta")}, where)
    settings = found[0] if found else {"rope_type": "default"}
    kind = settings.pop("rope_type")
    if not isinstance(kind, str) or kind not in _ROPE or not (scaled or kind == "default"):
        known = "default, linear or llama3" if scaled else "default"
        raise ValueError(f"{where}: rope type {shown(kind)} is not supported, expected {known}")
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor other than 1.0 is not supported")
    if settings.keys() != _ROPE[kind].keys():
        expected = ", ".join(sorted(_ROPE[kind])) or "no settings"
        raise ValueError(f"{where}: expected {expected} for rope type {kind!r}, got {some(sorted(settings))}")
    numbers: dict[str, Any] = {name: float(value) for name, value in checked(settings, _ROPE[kind], where).items()}
    if _ORIGINAL in numbers:
        numbers["original_max_positions"] = int(numbers.pop(_ORIGINAL))
    return float(theta["rope_theta"]), None if kind == "default" else RopeScaling(
        kind="linear" if kind == "linear" else "llama3", **numbers
    )
