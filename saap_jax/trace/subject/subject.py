"""A model of somebody else as a subject: a problem, traced; gates by interpretation, batches by `vmap`."""

import dataclasses
import functools
import hashlib
import math
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.config.method import CalibrationConfig, EvaluationConfig
from saap_jax.estimation.ablation import Unit
from saap_jax.estimation.base import Estimator
from saap_jax.runs.records import Couplings
from saap_jax.runtime.digests import digest_of
from saap_jax.runtime.mesh import Layout, taken_in
from saap_jax.structures.weights import TracedWeights, traced_costs
from saap_jax.subjects.base import Progress, Subject, silent
from saap_jax.trace.cut import smaller
from saap_jax.trace.listing import coupling_record
from saap_jax.trace.problem import Examples, Problem, count_examples
from saap_jax.trace.subject import compensation, saved
from saap_jax.trace.subject.observe import OBSERVED, members
from saap_jax.trace.subject.observe import observe as observed
from saap_jax.trace.subject.problem import (
    TracedProblem,
    batches,
    check_layout,
    cut,
    example_losses,
    loss_of_one,
    place_params,
    structures_of,
)
from saap_jax.trace.trace import by_name
from saap_jax.types import Gates, Keep, Limits, WindowLosses

WITHOUT_WEIGHTS = ("gate_", "random", "ablation", "activation_frequency")
"""How names of estimators begin that do not look at weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class TracedSubject(TracedProblem, Subject):
    """A `Subject` of a problem's examples; groups are copies of a structure, as layers of a scan and experts are."""

    name: str = "problem"

    @functools.cached_property
    def costs(self) -> dict[str, np.ndarray]:
        """Parameters of a unit, `[copies]`; what two structures hold is counted in both."""
        return traced_costs(self.structures)

    @functools.cached_property
    def weights(self) -> TracedWeights:
        """The parameters of floating point that hold units."""
        return TracedWeights(self.structures, members(self), self.acting)

    def limits(self, within: Any) -> dict[str, Limits]:
        """Limit each structure; of experts, as many as are chosen remain."""
        within.check_traced()
        names = [structure.name for structure in self.structures]
        hints = {name: f"is left alone, as the model's own code {verdict}" for name, verdict in self.left_out.items()}

        def said(option: str) -> dict[str, Any]:
            value = getattr(within, option)
            known = isinstance(value, Mapping)
            return by_name(f"within.{option}", value, names, hints) if known else dict.fromkeys(names, value)

        least, most, multiple = said("min_keep"), said("max_ratio"), said("multiple_of")
        return {
            name: Limits(max(least.get(name, 1), each.least), most.get(name, 1.0), multiple.get(name, 1))
            for name, each in zip(names, self.structures, strict=True)
        }

    def check_estimators(self, estimators: Mapping[str, Estimator]) -> None:
        """Raise ValueError for one that looks at what is not observed, or at weights where some are integers."""
        for name, estimator in estimators.items():
            if missing := ", ".join(sorted(need.name for need in estimator.needs - OBSERVED)):
                raise ValueError(
                    f"estimator {name!r}: needs {missing}, which is not observed of a traced model; expected one of "
                    "weights, activations or gradients: random, magnitude, wanda, fluctuation, taylor_*, fisher, gate_*"
                )
            paths = (member.path for structure in self.structures for member in structure.members)
            dtypes = ((path, self.traced.dtypes[path]) for path in paths if not name.startswith(WITHOUT_WEIGHTS))
            for path, dtype in dtypes:
                if jnp.issubdtype(dtype, jnp.floating):
                    continue
                raise ValueError(
                    f"estimator {name!r}: looks at weights, expected them of floating point, got {dtype} in {path} "
                    "(quantised?); use one of gate_*, random or ablation, or dequantise the weights first"
                )

    # --- examples

    def scenarios(self, config: CalibrationConfig) -> dict[str, Examples]:
        """Draw the calibration examples of each scenario: all of them, or some drawn at random by the seed."""
        known = self.problem.scenarios
        chosen = config.scenarios or tuple(known)
        drawn = {}
        for name in chosen:
            if name not in known:
                raise ValueError(
                    f"calibration.scenarios: expected some of {', '.join(known)}, the calibration sets of "
                    f"{self.name}, got {name!r}"
                )
            count = count_examples(known[name])
            if config.examples > count:
                raise ValueError(
                    f"calibration.examples: expected at most {count}, those of {name}, got {config.examples}; 0 takes "
                    "all of them"
                )
            drawn[name] = known[name]
            if config.examples:
                rows = np.random.Generator(np.random.Philox(config.seed)).permutation(count)[: config.examples]
                drawn[name] = self.rows(known[name], np.sort(rows))
        return drawn

    def texts(self, config: EvaluationConfig) -> dict[str, Examples]:
        """Choose the held-out examples by metric, `loss NAME`."""
        known = self.problem.held_out_sets
        first = config.in_domain or next(iter(known))
        second = config.out_of_domain or next((name for name in known if name != first), "")
        for field, name in (("in_domain", first), ("out_of_domain", second)):
            if name and name not in known:
                raise ValueError(
                    f"evaluation.{field}: expected one of {', '.join(known)}, the held-out sets of {self.name}, got "
                    f"{name!r}"
                )
        names = [name for name in (first, second) if name]
        return {f"loss {name}": self.rows(known[name], slice(config.windows or None)) for name in names}

    def join(self, parts: Sequence[Examples]) -> Examples:
        """Put examples one behind the other."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts) if len(parts) > 1 else parts[0]

    def rows(self, examples: Examples, chosen: slice | np.ndarray) -> Examples:
        """Take some examples."""
        return jax.tree.map(lambda leaf: leaf[chosen], examples)

    def count(self, examples: Examples) -> tuple[int, int]:
        """Count examples, twice: each counts as a token."""
        rows = count_examples(examples)
        return rows, rows

    def shape(self, examples: Examples, rows: int | None = None) -> list[int]:
        """Tell `[examples, 1]`."""
        count = count_examples(examples)
        return [count if rows is None else min(rows, count), 1]

    # --- observed, judged

    observe: ClassVar[Any] = observed
    repaired: ClassVar[Any] = compensation.repaired
    check_repair: ClassVar[Any] = compensation.check_repair
    unrepaired: ClassVar[Any] = compensation.unrepaired

    def losses(
        self,
        examples: Examples,
        keeps: Sequence[Keep],
        *,
        batch_size: int = 8,
        at_once: int = 8,
        done: Collection[int] = (),
        progress: Progress = silent,
    ) -> Iterator[dict[int, WindowLosses]]:
        """Evaluate keep-sets by masks, `at_once` in one batch of one compiled program."""

        def make() -> Callable[..., Any]:
            one = jax.vmap(loss_of_one(self), (None, None, 0, 0))
            return jax.jit(jax.vmap(one, (0, None, None, None)))

        step, count, size = self.program("losses", make), count_examples(examples), min(at_once, len(keeps))
        numbers = range(len(keeps))
        groups = [list(numbers[start : start + size]) for start in range(0, len(keeps), size)]
        groups = [group for group in groups if not set(group) <= set(done)]
        parts = [batch for batch, _ in batches(examples, batch_size, self.layout)]
        steps = progress([(group, part) for group in groups for part in range(len(parts))])
        for group in groups:
            filled = group + group[-1:] * (size - len(group))
            gates: Gates = {
                name: jnp.asarray(np.stack([keeps[number][name] for number in filled]), jnp.float32)
                for name in self.existing
            }
            found = [
                np.asarray(step(gates, self.problem.params, *part), np.float64)
                for part, _ in zip(parts, steps, strict=False)
            ]
            rows = np.concatenate(found, axis=1)[:, :count]
            yield {number: WindowLosses(rows[place], np.ones(count, int)) for place, number in enumerate(group)}
        next(iter(steps), None)  # so that they are shown to be done

    def ablate(
        self,
        examples: Examples,
        units: Sequence[Unit],
        *,
        batch_size: int = 8,
        done: Mapping[Unit, float] | None = None,
        save: Callable[[list[tuple[Unit, float]]], None] | None = None,
        progress: Progress = silent,
    ) -> dict[Unit, float]:
        """Remove each unit by itself: L(g_u = 0) - L(g = 1), with L the mean loss over the examples."""
        known = dict(done or {})
        todo = [unit for unit in dict.fromkeys(units) if unit not in known]
        keeps = [self.existing]
        for unit in todo:
            kept = self.existing[unit.structure].copy()
            kept[unit.layer, unit.number] = False
            keeps.append(self.existing | {unit.structure: kept})
        dense = math.nan
        groups = self.losses(examples, keeps, batch_size=batch_size, progress=progress) if todo else ()
        for group in groups:
            means = {number: float(losses.means.mean()) for number, losses in group.items()}
            if not np.isfinite(list(means.values())).all():
                raise ValueError(
                    "ablation: expected finite losses, got others; check the parameters, the examples and the loss"
                )
            dense = means.pop(0, dense)
            new = [(todo[number - 1], mean - dense) for number, mean in means.items()]
            known.update(new)
            if save is not None:
                save(new)
        return {unit: known[unit] for unit in dict.fromkeys(units)}

    # --- cut

    def load(self, directory: str | Path) -> "CutTraced":
        """Read a directory back."""
        keep, function, params = saved.loaded(directory, self.problem)
        return CutTraced(self, keep, function, place_params(params, self.layout))

    def cut(self, keep: Keep) -> "CutTraced":
        """Cut the model."""
        return CutTraced(self, keep, *cut(self, keep))

    def whole(self) -> "CutTraced":
        """Take the model itself as a cut one."""
        return CutTraced(self, None, self.problem.function, self.problem.params)

    def seconds(self, models: Sequence[Any], examples: Examples, rows: int, *, repeats: int = 5) -> tuple[float, ...]:
        """Time each model: median seconds for the outputs of some examples; the models take turns."""
        inputs = self.problem.inputs(self.rows(examples, slice(rows))[0])
        runs = [functools.partial(jax.jit(each.function), each.params) for each in models]
        times: list[list[float]] = [[] for _ in runs]
        for run in runs:
            jax.block_until_ready(run(*inputs))
        for _ in range(repeats):
            for run, seconds in zip(runs, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(run(*inputs))
                seconds.append(time.perf_counter() - start)
        return tuple(statistics.median(seconds) for seconds in times)

    # --- recorded

    def digests(self) -> dict[str, str]:
        """Digest the parameters, and of the traced programs of the model and of its loss."""
        problem = self.problem
        _, targets = problem.row(problem.first_set, 0)
        outputs = jax.eval_shape(problem.function, problem.params, *problem.example)
        return {
            "parameters": digest_of(problem.params),
            "program": _program_digest(self.traced.program),
            "loss": _program_digest(jax.make_jaxpr(problem.loss_of)(outputs, targets)),
        }

    def about(self) -> dict[str, Any]:
        """Record name and sizes."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable,
            "layers": max(structure.copies for structure in self.structures),
            "units": {structure.name: structure.units for structure in self.structures},
        }

    def structures_record(self) -> list[dict[str, Any]]:
        """Describe the structures by plain values."""
        return [saved.described(each) for each in self.structures]

    def couplings(self) -> Couplings:
        """Record the structures of the traced program."""
        return coupling_record(self.traced)


@dataclasses.dataclass(frozen=True, eq=False)
class CutTraced:
    """The smaller model of a traced subject, or with `keep` None the model itself."""

    subject: TracedSubject
    keep: Keep | None
    function: Callable[..., Any]
    """`function(params, *inputs)`."""
    params: Any

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    @property
    def segments(self) -> int:
        """One: the program is compiled as it is."""
        return 1

    def losses(self, examples: Examples, batch_size: int) -> WindowLosses:
        """Compute the loss of each example."""
        subject, run = self.subject, None
        if self.keep is not None:
            program = smaller(subject.traced, subject.by_copies(self.keep))
            run = lambda gates, params, *inputs: program(params, *inputs)  # noqa: E731
        gates = subject.ones if run is None else {}
        values = example_losses(subject, gates, self.params, examples, batch_size, run)
        return WindowLosses(values, np.ones(len(values), int))

    def save(
        self, directory: str | Path, keep: Keep, about: Mapping[str, Any] = MappingProxyType({}), **further: Any
    ) -> None:
        """Write the smaller parameters and what is kept as a directory; see `saved.write_pruned`."""
        saved.write_pruned(self, directory, keep, about, **further)


@taken_in
def subject_of(
    problem: Problem, *, name: str = "problem", norms: bool = False, refused: bool = False, layout: Layout | None = None
) -> TracedSubject:
    """Trace a problem's function on one example, and place its arrays; see `structures_of`."""
    check_layout(layout)
    problem = problem.without_explicit_axes()
    traced, structures, left_out = structures_of(problem, norms=norms, refused=refused)
    problem = dataclasses.replace(problem, params=place_params(problem.params, layout))
    return TracedSubject(problem, traced, structures, left_out, name=name, layout=layout)


def _program_digest(program: Any) -> str:
    """Digest a closed jaxpr, its text and the arrays that it holds."""
    held = [value if hasattr(value, "dtype") else np.asarray(value) for value in program.consts]
    held = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in held]
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr))
    return hashlib.sha256(f"{text};{digest_of(held)}".encode()).hexdigest()
