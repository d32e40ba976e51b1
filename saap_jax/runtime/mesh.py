"""Where every array of a job lies: a mesh, rules from logical axis names to mesh axes, shardings from metadata alone.

A parameter carries the names of its axes (`saap_jax.types`); a rule maps a name to the mesh axes that its elements are
spread over. Nothing else says where an array is: loading, scoring, evaluating, recovering and saving all ask here.

All axes are `Auto`: the compiler splits what no constraint names.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saap_jax.config.mesh import BATCH, EXPERT, MESH_AXES, WEIGHTS, MeshConfig, by_axis

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis -> mesh axes that its elements are spread over; none for an axis that every device holds whole."""

RULES: Rules = {
    "embed": (WEIGHTS,),
    "outputs": (WEIGHTS,),
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": (EXPERT, "tensor"),
} | dict.fromkeys(("channels", "layers", "q_per_kv", "head_dim", "inputs", "groups", "bytes", "rank"), ())
"""The rules that hold unless `MeshConfig.rules` says otherwise.

`tensor` splits heads, channels and vocabulary, so that a layer needs one sum over it after each sub-block; `fsdp`
splits the residual width of the weights, or the outputs of a quantised matrix or of an adapter, which are gathered
layer by layer, and the batch with them; `data` splits the batch alone. Experts are spread over `expert`, whose devices
are alike in all else, and within each part over `tensor`: one sum over both follows a mixture.
"""


class Layout(NamedTuple):
    """A mesh and the rules that place arrays on it."""

    mesh: Mesh
    rules: Rules
    uneven: str = "refuse"
    """What to do with an axis that its mesh axes do not divide: `refuse`, or `replicate` (each holds it whole)."""

    def lenient(self) -> "Layout":
        """Make the layout for a cut model, whose widths the mesh seldom divides: those axes are held whole."""
        return self._replace(uneven="replicate")

    @property
    def batch_shards(self) -> int:
        """Number of parts that a batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH)


# --- from a configuration ------------------------------------------------------------------------


def layout_of(config: MeshConfig, devices: Sequence[Any] | None = None) -> Layout:
    """Build the mesh of a configuration, over all devices of all processes unless some are given.

    An axis of the mesh lies along axes of the machine's torus, or along part of one where the sizes ask for that.

    Raises:
        ValueError: sizes that do not multiply to the number of devices, an unknown axis in a rule, or TPUs of several
            slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise ValueError(f"mesh: expected devices of one TPU slice, got {len(slices)} slices; start a job a slice")
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # explicit axes would refuse to contract two split dimensions
    mesh = Mesh(placed, tuple(by_axis(sizes)), axis_types=(AxisType.Auto,) * len(sizes))
    return Layout(mesh, rules_of(config.rules), config.uneven)


def layout_of_job(config: MeshConfig, **batch_sizes: int) -> Layout | None:
    """Lay out the arrays of a job; None where it has one device, and nothing is spread.

    Args:
        batch_sizes: sizes of the batches that will be split, by the name that an error gives them.

    Raises:
        ValueError: see `layout_of`; a batch that cannot be split; or several processes, and a mesh of one device.
    """
    if set(config.sizes) == {1}:
        if (processes := jax.process_count()) > 1:
            raise ValueError(
                f"mesh: expected the {jax.device_count()} devices of {processes} processes to be on it, got "
                "a mesh of one; give --mesh.data -1 (other examples on each) or --mesh.fsdp -1 (weights spread too)"
            )
        return None
    layout = layout_of(config)
    for name, size in batch_sizes.items():
        if size % layout.batch_shards:
            raise ValueError(
                f"{name}: expected a multiple of {layout.batch_shards}, the mesh axes that split a batch "
                f"({' x '.join(BATCH)}), got {size}"
            )
    return layout


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Size the mesh axes, the one of -1 filled up; that of `expert` where it is more than 1.

    >>> mesh_sizes(MeshConfig(data=1, fsdp=-1, tensor=2), 8), mesh_sizes(MeshConfig(fsdp=2, expert=-1), 8)
    ((1, 4, 2), (1, 2, 1, 4))
    """
    sizes = config.sizes
    given = math.prod(size for size in sizes if size != -1)
    if devices % given or (-1 not in sizes and given != devices):
        asked = " x ".join(f"{axis} {size}" for axis, size in by_axis(sizes).items())
        raise ValueError(
            f"mesh: expected {asked} to make {devices} devices, got {given}; set one axis to -1 for what is left"
        )
    filled = tuple(devices // given if size == -1 else size for size in sizes)
    if filled[len(MESH_AXES) :] == (1,):
        return filled[: len(MESH_AXES)]
    return filled


def rules_of(overrides: Sequence[str]) -> Rules:
    """Replace the rules that `overrides` names: `mlp=tensor`, `embed=data+fsdp`, `vocab=`.

    >>> rules_of(["vocab=", "embed=data+fsdp"])["embed"]
    ('data', 'fsdp')
    """
    rules = dict(RULES)
    known = (*MESH_AXES, EXPERT)
    for text in overrides:
        axis, equals, places = text.partition("=")
        parts = tuple(part for part in places.split("+") if part)
        if not equals or axis not in RULES or not set(parts) <= set(known) or len(set(parts)) < len(parts):
            raise ValueError(
                f"mesh.rules: expected AXIS=MESH_AXIS+…, with an axis of {', '.join(RULES)} and mesh axes of "
                f"{', '.join(known)}, each once, got {text!r}"
            )
        rules[axis] = parts
    return rules


def check_experts(sizes: Mapping[str, int], mixture: bool, model: str) -> None:
    """Raise ValueError if a mesh of these sizes by axis has one for experts, and `model` is no mixture of them."""
    if not mixture and (size := sizes.get(EXPERT, 1)) > 1:
        raise ValueError(
            f"mesh.expert: expected 1 for a model without experts, got {size} for {model}; spread it with mesh.fsdp or "
            "mesh.tensor"
        )


# --- places of arrays ----------------------------------------------------------------------------


def partition_spec(layout: Layout, axes: Sequence[str], shape: Sequence[int], name: str) -> PartitionSpec:
    """Split the array `name`: each of its logical axes along the mesh axes of its rule, those of size 1 left out.

    Raises:
        ValueError: an axis without a rule, two axes on one mesh axis, or one that is not divided by its mesh axes,
            unless the layout replicates those.
    """
    used: dict[str, str] = {}
    entries: list[Any] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in layout.rules:
            raise ValueError(f"{name}: no rule for axis {axis!r}; the rules know {', '.join(layout.rules)}")
        parts = tuple(part for part in layout.rules[axis] if layout.mesh.shape.get(part, 1) > 1)
        if twice := next((part for part in parts if part in used), None):
            raise ValueError(
                f"{name}: axes {used[twice]!r} and {axis!r} are both on mesh axis {twice!r}, which can split only "
                f"one of them; change a rule, such as mesh.rules={axis}="
            )
        used |= dict.fromkeys(parts, axis)
        if size % (split := math.prod(layout.mesh.shape[part] for part in parts)):
            if layout.uneven == "refuse":
                raise ValueError(
                    f"{name}: axis {axis!r} of size {size} is not divided by {' x '.join(parts)} = {split}; change the "
                    f"mesh, leave the axis whole with mesh.rules={axis}=, or set mesh.uneven=replicate"
                )
            parts = ()
        entries.append(parts[0] if len(parts) == 1 else parts or None)
    return PartitionSpec(*entries)


def shardings(tree: Any, layout: Layout) -> Any:
    """Make a tree like `tree`, a model or its statistics (concrete or abstract), with a sharding for each parameter.

    Raises:
        ValueError: see `partition_spec`; the message names the parameter.
    """

    def place(path: tuple, variable: nnx.Variable) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition_spec(layout, variable.axes, variable.shape, name)
        return variable.replace(NamedSharding(layout.mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def mesh_of(tree: Any) -> Mesh | None:
    """Find the mesh of the arrays of a model, or of a part of one; None of those on one device."""
    meshes = (leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _is_spread(leaf))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def _is_spread(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def batch_axes(sizes: Mapping[str, int], examples: int) -> tuple[str, ...]:
    """Name the axes, of a mesh of these sizes, that a batch is split over; none where they do not divide it."""
    parts = tuple(axis for axis in BATCH if sizes.get(axis, 1) > 1)
    if examples % math.prod(sizes[axis] for axis in parts):
        return ()
    return parts


def shard(batch: np.ndarray | jax.Array, model: Any, axis: int = 0) -> jax.Array:
    """Place the rows of a batch, which every process has, where the devices of the model want them.

    Of a model on one device: there. Of a sharded one: split over `BATCH`, or on every device where that does not divide
    the number of rows, the size of `axis`.
    """
    if (mesh := mesh_of(model)) is None:
        return jnp.asarray(batch)
    parts = batch_axes(mesh.shape, batch.shape[axis])
    where = NamedSharding(mesh, PartitionSpec(*[None] * axis, parts or None))
    return jax.make_array_from_callback(batch.shape, where, lambda part: batch[part])


def settled(tree: Any, mesh: Mesh | None) -> Any:
    """Place all arrays of a tree on the mesh: those that are spread stay, others go to every device.

    The others are on this host, and the same on every process.
    """
    if mesh is None:
        return tree
    place = NamedSharding(mesh, PartitionSpec())

    def one(value: Any) -> Any:
        if _is_spread(value):
            return value
        return jax.device_put(value if place.is_fully_addressable else np.asarray(value), place)

    return jax.tree.map(one, tree)


def laid_out(tree: Any, layout: Layout) -> Any:
    """Place the parameters of a tree by the layout; those that are spread already stay.

    The others are on this host, and the same on every process; each device takes its part.
    """

    def one(value: Any, place: NamedSharding) -> Any:
        if _is_spread(value):
            return value
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, place, lambda part: whole[part])

    return jax.tree.map(one, tree, shardings(tree, layout))


Places = tuple[NamedSharding, ...]
"""Where the arrays of a tree lie, in its order: a static argument of a step that changes them, see `held`."""


def places_of(tree: Any) -> Places:
    """List the places of the arrays of a tree that is spread over devices; none of one that is not."""
    if mesh_of(tree) is None:
        return ()
    return tuple(leaf.sharding for leaf in jax.tree.leaves(tree))


def held(tree: Any, places: Places) -> Any:
    """Keep, within a jitted step, what it makes of a tree where the tree lay (see `places_of`).

    So memory does not depend on what a compiler prefers, and the second step finds its input where the first one did.
    """
    if not places:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, places))


def refuse_explicit_axes(tree: Any) -> None:
    """Raise ValueError where an array lies on a mesh with `Explicit` axes, or one is in force: ours are `Auto`."""
    places = [jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None)
              for leaf in jax.tree.leaves(tree)]  # fmt: skip
    for place in places:
        if isinstance(place, NamedSharding) and AxisType.Explicit in place.mesh.axis_types:
            raise ValueError(
                f"mesh: expected Auto axes, got the Explicit ones {', '.join(place.mesh.axis_names)}; make it with "
                "jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
            )
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        raise ValueError("mesh: expected none with Explicit axes in force, got one; call outside of jax.set_mesh")
