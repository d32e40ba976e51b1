"""Rules for operations that take or place parts of arrays: slices, joins, gathers, scatters, convolutions, windows."""

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from saap_jax.trace.jaxpr import shape_of
from saap_jax.trace.rules import Layout, Notes, Rule, unknown


def concatenate(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`concatenate`: the joined axis is the sum of its parts, the others are equated."""
    joined = eqn.params["dimension"]
    out = list(ins[0])
    for layout in ins[1:]:
        out = [a if axis == joined else notes.equate(a, b) for axis, (a, b) in enumerate(zip(out, layout, strict=True))]
    out[joined] = notes.axes.total([layout[joined] for layout in ins])
    return [tuple(out)]


def stack(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`stack`: a new axis that numbers the arrays."""
    out = list(ins[0])
    axis = eqn.params["axis"]
    for layout in ins[1:]:
        out = list(map(notes.equate, out, layout))
    return [(*out[:axis], notes.axes.pinned(len(ins), "split", "stack"), *out[axis:])]


def unstack(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`unstack`: each index of an axis becomes an array."""
    axis = eqn.params["axis"]
    notes.axes.pin(ins[0][axis], "split", "unstack")
    return [(*ins[0][:axis], *ins[0][axis + 1 :])] * len(eqn.outvars)


def tile(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`tile`: the repetitions are the major factor of the axis."""
    out = []
    for node, size in zip(ins[0], shape_of(eqn.outvars[0]), strict=True):
        held = notes.axes.size(node)
        if held == size:
            out.append(node)
        elif held <= 1:
            out.append(notes.lost(node, size, "repeat", "tile"))
        else:
            out.append(notes.axes.product([notes.axes.pinned(size // held, "repeat", "tile"), node]))
    return [tuple(out)]


def split(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`split`: an axis is cut into neighbouring parts; parts of equal size stay so, or the code would cut elsewhere."""
    axis = eqn.params["axis"]
    sizes = [int(size) for size in eqn.params["sizes"]]
    parts = _cut(notes, ins[0][axis], sizes, "split")
    if len(set(sizes)) == 1:
        parts = [notes.equate(parts[0], part) for part in parts]
    return [(*ins[0][:axis], part, *ins[0][axis + 1 :]) for part in parts]


def slice_(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`slice`: a stretch of an axis, or every n-th index of the whole of it."""
    starts, limits = (map(int, eqn.params[key]) for key in ("start_indices", "limit_indices"))
    strides = map(int, eqn.params["strides"] or (1,) * len(ins[0]))
    out = []
    taken = []
    for node, start, limit, stride in zip(ins[0], starts, limits, strides, strict=True):
        size = notes.axes.size(node)
        before = notes.axes.atom(start)
        part = node
        if (start, limit, stride) == (0, size, 1):
            out.append(node)
        elif stride == 1:
            before, part, _ = _cut(notes, node, [start, limit - start, size - limit], "slice")
            out.append(part)
        elif (
            start < stride
            and size % stride == 0
            and limit > size - stride + start
            and (pair := notes.axes.factor_at(node, size // stride))
        ):
            notes.axes.pin(pair[1], "split", "slice")
            out.append(pair[0])
        else:
            part = notes.axes.atom(limit - start)
            out.append(notes.lost(node, -(-(limit - start) // stride), "split", "slice"))
        taken.append((before, part, node))
    notes.slices[notes.axes.site.path] = taken
    return [tuple(out)]


def _cut(notes: Notes, node: int, sizes: Sequence[int], detail: str) -> list[int]:
    """Cut an axis into parts of the given sizes; parts of blocks are pinned."""
    parts = []
    rest = node
    for i, size in enumerate(sizes):
        left = notes.axes.size(rest)
        if size == 0:
            parts.append(notes.axes.atom(0))
        elif size == left:
            parts.append(rest)
            parts += [notes.axes.atom(0) for _ in sizes[i + 1 :]]
            break
        else:
            sides = notes.axes.split_at(rest, size)
            if sides is None:
                notes.axes.pin(node, "split", detail)
                return [notes.axes.pinned(size, "split", detail) for size in sizes]
            parts.append(sides[0])
            rest = sides[1]
    notes.splits.append((tuple(parts), notes.axes.site))
    return parts


def pad(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`pad`: what is added at the ends keeps its size; interior and negative padding pin the axis."""
    out = []
    for node, (low, high, interior), size in zip(
        ins[0], eqn.params["padding_config"], shape_of(eqn.outvars[0]), strict=True
    ):
        if (low, high, interior) == (0, 0, 0):
            out.append(node)
        elif interior == 0 and low >= 0 and high >= 0:
            ends = [notes.axes.atom(int(low)), notes.axes.atom(int(high))]
            for end in ends:
                notes.axes.pin(end, "constant", "pad")
            out.append(notes.axes.total([ends[0], node, ends[1]]))
        else:
            out.append(notes.lost(node, size, "split", "pad"))
    return [tuple(out)]


def _taken(notes: Notes, node: int, size: int, eqn: JaxprEqn) -> int:
    """Pass an axis that is taken whole; one of which a part is taken is read by position."""
    if notes.axes.size(node) == size:
        return node
    return notes.lost(node, int(size), "lookup", eqn.primitive.name)


def _written(notes: Notes, node: int, update: int, eqn: JaxprEqn) -> int:
    """Equate an axis that is written whole; another is written by position."""
    if notes.axes.size(node) == notes.axes.size(update):
        return notes.equate(node, update)
    for each in (node, update):
        notes.axes.pin(each, "lookup", eqn.primitive.name)
    return node


def gather(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`gather`: axes that are taken whole pass, indexed ones are read by position, batch axes go with the indices."""
    numbers = eqn.params["dimension_numbers"]
    (operand, indices) = ins
    batch = list(indices[:-1])
    for axis, position in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        batch[position] = notes.equate(batch[position], operand[axis])
    window = []
    for axis, (node, size) in enumerate(zip(operand, map(int, eqn.params["slice_sizes"]), strict=True)):
        if axis in numbers.operand_batching_dims:
            continue
        one = axis in numbers.start_index_map and size == 1
        notes.shifts += [(node, row) for row in batch if one]
        if one:
            taken = notes.lost(node, 1, "lookup", "gather")
        else:
            taken = _taken(notes, node, size, eqn)
        if axis not in numbers.collapsed_slice_dims:
            window.append(taken)
    offset = set(numbers.offset_dims)
    rows = iter(batch)
    columns = iter(window)
    return [tuple(next(columns if axis in offset else rows) for axis in range(len(batch) + len(window)))]


def scatter(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`scatter` and its kin: axes that are written whole are equated, indexed ones and their indices go by position."""
    numbers = eqn.params["dimension_numbers"]
    operand = list(ins[0])
    indices = ins[1][:-1]
    updates = ins[2]
    columns = iter([updates[axis] for axis in numbers.update_window_dims])
    rows = [node for axis, node in enumerate(updates) if axis not in numbers.update_window_dims]
    rows = list(map(notes.equate, rows, indices))
    for position, row in enumerate(rows):
        if position not in numbers.scatter_indices_batching_dims:  # no gate undoes what a unit writes
            notes.axes.pin(row, "lookup", eqn.primitive.name)
    for axis, position in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        operand[axis] = notes.equate(operand[axis], rows[position])
    for axis in range(len(operand)):
        if axis in numbers.inserted_window_dims:
            notes.axes.pin(operand[axis], "lookup", eqn.primitive.name)
            notes.shifts += [(operand[axis], row) for row in rows]
        elif axis not in numbers.operand_batching_dims:
            operand[axis] = _written(notes, operand[axis], next(columns), eqn)
    return [tuple(operand)]


def convolution(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """`conv_general_dilated`: features contract, or pass group by group; windows pin the spatial axes."""
    numbers = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1:
        return unknown(notes, eqn, ins)
    left, right = ins
    (batch, features, *spatial) = numbers.lhs_spec
    (outs, inputs, *kernel) = numbers.rhs_spec
    out: dict[int, int] = dict(zip(numbers.out_spec[:2], (left[batch], right[outs]), strict=True))
    if groups == 1:
        notes.contract(notes.equate(left[features], right[inputs]), (features, inputs), ins)
    elif groups == shape_of(eqn.outvars[0])[numbers.out_spec[1]] == notes.axes.size(left[features]):
        out[numbers.out_spec[1]] = notes.equate(left[features], right[outs])
        notes.axes.pin(right[inputs], "window", "one channel a group")
    else:
        for node in (left[features], right[outs], right[inputs]):
            notes.axes.pin(node, "window", "channels in groups")
    sizes = shape_of(eqn.outvars[0])
    plain = zip(eqn.params["window_strides"], eqn.params["padding"], eqn.params["lhs_dilation"], strict=True)
    for position, axis, window, how in zip(numbers.out_spec[2:], spatial, kernel, plain, strict=True):
        notes.axes.pin(right[window], "window", "conv_general_dilated")
        if notes.axes.size(right[window]) == 1 and how == (1, (0, 0), 1):
            out[position] = left[axis]
        else:
            out[position] = notes.lost(left[axis], sizes[position], "window", "conv_general_dilated")
    return [tuple(out[axis] for axis in range(len(sizes)))]


def reduce_window(notes: Notes, eqn: JaxprEqn, ins: Sequence[Layout]) -> list[Layout]:
    """Pooling: axes that the window does not span pass, the others keep their size."""
    kinds = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    out = []
    spans = zip(*(eqn.params[kind] or (1,) * len(ins[0]) for kind in kinds), strict=True)
    for node, size, (width, stride, padding, *dilation) in zip(ins[0], shape_of(eqn.outvars[0]), spans, strict=True):
        plain = (width, stride, tuple(padding), dilation) == (1, 1, (0, 0), [1, 1])
        out.append(node if plain else notes.lost(node, size, "window", eqn.primitive.name))
    return [tuple(out)]


PART_RULES: dict[str, Rule] = {
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "split": split,
    "slice": slice_,
    "pad": pad,
    "dynamic_slice": lambda notes, eqn, ins: [
        tuple(_taken(notes, node, size, eqn) for node, size in zip(ins[0], eqn.params["slice_sizes"], strict=True))
    ],
    "dynamic_update_slice": lambda notes, eqn, ins: [
        tuple(_written(notes, node, update, eqn) for node, update in zip(ins[0], ins[1], strict=True))
    ],
    "gather": gather,
    **dict.fromkeys((f"scatter{mark}{how}" for how in ("add", "sub", "mul", "min", "max") for mark in "-_"), scatter),
    "scatter": scatter,
    "conv_general_dilated": convolution,
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), reduce_window),
}
