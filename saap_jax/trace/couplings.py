"""What a followed program says of each atom: where it is contracted, why it is pinned, what it may vary along."""

import dataclasses

from saap_jax.trace.axes import ONE, Pin
from saap_jax.trace.program import Follower


@dataclasses.dataclass
class Coupling:
    """An atom that lies in parameters, and what concerns it."""

    atom: int
    holders: list[str] = dataclasses.field(default_factory=list)
    """Paths of the parameters in which it lies."""
    pins: list[Pin] = dataclasses.field(default_factory=list)
    contractions: list[int] = dataclasses.field(default_factory=list)
    """Indices of the contractions over the atom."""
    reductions: list[int] = dataclasses.field(default_factory=list)
    companions: frozenset[int] = frozenset()
    """Atoms that stand beside this one wherever it occurs: its units may be chosen anew at each of their indices."""
    role: str = "channels"
    """What its units are to a reader; see `_name_roles`."""


def collect(follower: Follower, layouts: dict[str, tuple[int, ...]]) -> list[Coupling]:
    """Return the couplings of a followed program, in the order in which the parameters name their atoms."""
    notes, axes = follower.notes, follower.notes.axes
    found: dict[int, Coupling] = {}
    for path, layout in layouts.items():
        for atom in dict.fromkeys(atom for node in layout for atom in axes.atoms(node)):
            if axes.size(atom) and atom != ONE:
                found.setdefault(atom, Coupling(atom)).holders.append(path)
    _pin_uneven_splits(follower)
    for pin in notes.axes.pins:
        for atom in set(axes.atoms(pin.node)) & found.keys():
            found[atom].pins.append(pin)
    for records, name in ((notes.contractions, "contractions"), (notes.reductions, "reductions")):
        for index, record in enumerate(records):
            for atom in set(axes.atoms(record.node)) & found.keys():
                getattr(found[atom], name).append(index)
    for coupling in found.values():
        if not (coupling.pins or coupling.contractions or coupling.reductions):
            coupling.pins.append(Pin(coupling.atom, "unused", "", None))
    _find_companions(follower, layouts, found)
    _name_roles(follower, found)
    return list(found.values())


def _pin_uneven_splits(follower: Follower) -> None:
    """Pin atoms that a cut axis holds unevenly: after removing a unit, the code would cut at other places."""
    axes = follower.notes.axes
    for cut, site in follower.notes.splits:
        axes.site = site
        parts = [part for part in cut if axes.size(part)]
        sizes = [axes.size(part) for part in parts]
        for atom in {atom for part in parts for atom in axes.atoms(part)}:
            lost = [axes.drop(part, atom) for part in parts]
            if any(gone * sizes[0] != lost[0] * size for gone, size in zip(lost, sizes, strict=True)):
                axes.pin(atom, "split", "unevenly")


def _name_roles(follower: Follower, found: dict[int, Coupling]) -> None:
    """Say what units are, for readers: heads, query heads, widths of heads, experts, a stream, or channels.

    Heads are what two activations have in common in a product (query and key); what is contracted there, or stands
    beside heads where it is contracted, is a head's width. Experts are what a `top_k` or `argmax` chooses from, or what
    a product has in common of an activation and a parameter. Query heads are left over where a head's width is
    contracted. A stream is a sum of activations that several layers read, or averaged by a norm.
    """
    axes, notes = follower.notes.axes, follower.notes
    roles: dict[int, set[str]] = {}
    for node, role in notes.paired:
        for atom in axes.atoms(node):
            roles.setdefault(atom, set()).add(role)
    choices = [record for record in notes.reductions if record.operation in ("top_k", "argmax", "argmin")]
    experts = {atom for record in choices for atom in axes.atoms(record.node)}
    experts |= {atom for atom, held in roles.items() if "experts" in held}
    heads = {atom for atom, held in roles.items() if "heads" in held and atom in found} - experts
    widths = {atom for atom, held in roles.items() if "head width" in held and atom in found}
    projections = {path for atom in heads for path in found[atom].holders}
    if heads:  # of the places of a sequence and widths, those that are projected as the heads are
        widths = {atom for atom in widths if projections & set(found[atom].holders)}
    queries: set[int] = set()
    for contracted, free in notes.scores:
        if {atom for node in contracted for atom in axes.atoms(node)} & widths:
            queries |= {atom for node in free for atom in axes.atoms(node)}
    added = {atom for node in notes.added for atom in axes.atoms(node)}
    for atom, coupling in found.items():
        contractions = [notes.contractions[i] for i in coupling.contractions]
        beside = [{each for node in record.layout for each in axes.atoms(node)} for record in contractions]
        if atom in experts:
            coupling.role = "experts"
        elif atom in heads:
            coupling.role = "heads"
        elif atom in queries - widths:
            coupling.role = "query heads"
        elif atom in widths or (beside and all(atoms & heads for atoms in beside)):
            coupling.role = "head width"
        elif coupling.reductions or (atom in added and len({record.site.path for record in contractions}) > 1):
            coupling.role = "stream"


def _find_companions(follower: Follower, layouts: dict[str, tuple[int, ...]], found: dict[int, Coupling]) -> None:
    """Intersect the atoms that share a layout, or surround it as a loop's axis, over all layouts of the program.

    Along an atom whose indices meet each other (it is reordered, or two axes of one array) no unit is chosen anew.
    """
    axes = follower.notes.axes
    moved = {atom for node in follower.notes.moved for atom in axes.atoms(node)}
    beside: dict[int, frozenset[int]] = {}
    resolved: dict[tuple[frozenset[int], frozenset[int]], None] = {}
    for seen in follower.seen:
        atoms = [atom for node in seen.layout for atom in axes.atoms(node)]
        if len(set(atoms)) < len(atoms):  # values at one of its indices meet those at another
            moved |= {atom for atom in atoms if atoms.count(atom) > 1}
        roots = frozenset(map(axes.find, seen.layout))
        resolved[roots, roots | frozenset(map(axes.find, seen.loops))] = None
    for roots, around in resolved:
        for atom in {atom for root in roots for atom in axes.atoms(root)} & found.keys():
            others = around - {atom}
            beside[atom] = beside[atom] & others if atom in beside else others
    for atom, others in beside.items():
        whole = {other for other in others if other in found and other not in moved}
        for path in found[atom].holders:
            whole &= {axes.find(node) for node in layouts[path]}
        found[atom].companions = frozenset() if found[atom].pins else frozenset(whole)
    for atom, coupling in found.items():  # two axes that go together everywhere: units of neither are chosen along both
        mutual = {other for other in coupling.companions if atom in found[other].companions}
        for other in mutual:
            found[other].companions -= {atom}
        coupling.companions -= mutual
