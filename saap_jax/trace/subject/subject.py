"""A model of somebody else as a subject: a problem, traced; gates by interpretation, batches by `vmap`."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from saap_jax.config.method import CalibrationConfig, EvaluationConfig
from saap_jax.estimation.ablation import Unit
from saap_jax.estimation.base import Estimator
from saap_jax.runtime.decisions import finite
from saap_jax.runtime.digests import digest_of
from saap_jax.runtime.mesh import Layout
from saap_jax.structures.discovery import weight_bytes
from saap_jax.subjects.base import Progress, Size, Subject, rows_of, silent
from saap_jax.trace.problem import Examples, Problem, count_examples, made_problem
from saap_jax.trace.subject import compensation, saved
from saap_jax.trace.subject.observe import OBSERVED, members
from saap_jax.trace.subject.observe import observe as observed
from saap_jax.trace.subject.problem import (
    TracedProblem,
    batches,
    cut,
    loss_of_one,
    place_params,
    traced_problem,
)
from saap_jax.trace.subject.weights import TracedWeights
from saap_jax.trace.trace import by_name
from saap_jax.types import Gates, Keep, Limits, WindowLosses

WITHOUT_WEIGHTS = ("gate_", "random", "ablation", "activation_frequency")
"""How names of estimators begin that do not look at weights."""


@dataclasses.dataclass(frozen=True, eq=False)
class TracedSubject(TracedProblem, Subject):
    """A `Subject` of a problem's examples; groups are copies of a structure, as layers of a scan and experts are. What
    methods do is said there."""

    name: str = "problem"

    @functools.cached_property
    def costs(self) -> dict[str, np.ndarray]:
        # what two structures hold is counted in both
        return {each.name: np.full(each.copies, each.parameters_per_unit, np.int64) for each in self.structures}

    @functools.cached_property
    def weights(self) -> TracedWeights:
        return TracedWeights(self.structures, members(self), self.acting)

    def limits(self, within: Any) -> dict[str, Limits]:
        """Limit each structure; of experts, as many as are chosen remain."""
        within.check_traced()
        names = [structure.name for structure in self.structures]
        hints = {name: f"is left alone, as the model's own code {verdict}" for name, verdict in self.left_out.items()}
        said = {
            option: by_name(f"within.{option}", value, names, hints)
            for option in ("min_keep", "max_ratio", "multiple_of")
            if isinstance(value := getattr(within, option), Mapping)
        }
        within = dataclasses.replace(within, **said)
        limits = {each.name: within.layer(each.name) for each in self.structures}
        least = {each.name: max(limits[each.name].min_keep, each.least) for each in self.structures}
        return {name: each._replace(min_keep=least[name]) for name, each in limits.items()}

    def check_estimators(self, estimators: Mapping[str, Estimator]) -> None:
        paths = (member.path for structure in self.structures for member in structure.members)
        dtypes = {path: self.traced.dtypes[path] for path in paths}
        integers = [path for path, dtype in dtypes.items() if not jnp.issubdtype(dtype, jnp.floating)]
        for name, estimator in estimators.items():
            if missing := ", ".join(sorted(need.name for need in estimator.needs - OBSERVED)):
                raise ValueError(
                    f"estimator {name!r}: needs {missing}, which is not observed of a traced model; expected one of "
                    "weights, activations or gradients: random, magnitude, wanda, fluctuation, taylor_*, fisher, gate_*"
                )
            if integers and not name.startswith(WITHOUT_WEIGHTS):
                raise ValueError(
                    f"estimator {name!r}: looks at weights, expected them of floating point, got "
                    f"{dtypes[integers[0]]} in {integers[0]} (quantised?); use one of gate_*, random or ablation, or "
                    "dequantise the weights first"
                )

    # --- examples

    def scenarios(self, config: CalibrationConfig) -> dict[str, Examples]:
        """Draw the calibration examples of each scenario: all of them, or some drawn at random by the seed."""
        drawn = self._named("calibration.scenarios", config.scenarios, self.problem.scenarios, "calibration sets")
        for name, examples in drawn.items() if config.examples else ():
            if config.examples > (count := count_examples(examples)):
                raise ValueError(
                    f"calibration.examples: expected at most {count}, those of {name}, got {config.examples}; 0 takes "
                    "all of them"
                )
            rows = np.random.Generator(np.random.Philox(config.seed)).permutation(count)[: config.examples]
            drawn[name] = rows_of(examples, np.sort(rows))
        return drawn

    def texts(self, config: EvaluationConfig) -> dict[str, Examples]:
        """Choose the held-out examples by metric, `loss NAME`."""
        known = self.problem.held_out_sets
        first = config.in_domain or next(iter(known))
        second = config.out_of_domain or next((name for name in known if name != first), "")
        chosen: dict[str, Examples] = {}
        for field, name in (("in_domain", first), ("out_of_domain", second)):
            if name:
                chosen |= self._named(f"evaluation.{field}", [name], known, "held-out sets")
        return {f"loss {name}": rows_of(each, self._some(each, config)) for name, each in chosen.items()}

    def _some(self, examples: Examples, config: EvaluationConfig) -> Any:
        """Say which examples are evaluated: the first ones, or some drawn over all of them."""
        if config.drawn is None:
            return slice(config.windows or None)
        if config.windows > (count := count_examples(examples)):
            raise ValueError(f"evaluation.windows: expected at most {count} examples to draw, got {config.windows}")
        ends = np.arange(config.windows + 1) * count // config.windows
        return ends[:-1] + np.random.Generator(np.random.Philox(config.drawn)).integers(np.diff(ends))

    def _named(self, field: str, names: Collection[str], known: Mapping[str, Any], what: str) -> dict[str, Examples]:
        """Look up sets of examples, all where none is named."""
        if strange := [name for name in names if name not in known]:
            got = f"the {what} of {self.name}, got {strange[0]!r}"
            raise ValueError(f"{field}: expected some of {', '.join(known)}, {got}")
        return {name: known[name] for name in names or known}

    def size(self, examples: Examples) -> Size:
        count = count_examples(examples)
        return Size(rows=count, length=1, tokens=count)

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
        def make() -> Callable[..., Any]:
            one = jax.vmap(loss_of_one(self), (None, None, 0, 0))
            return jax.jit(jax.vmap(one, (0, None, None, None)))

        step = self.program("losses", make)
        count = count_examples(examples)
        numbers = range(len(keeps))
        groups = [list(numbers[start : start + at_once]) for start in range(0, len(keeps), at_once)]
        groups = [group for group in groups if not set(group) <= set(done)]
        parts = [batch for batch, _ in batches(examples, batch_size, self.layout)]
        steps = progress([(group, part) for group in groups for part in range(len(parts))])
        for group in groups:
            filled = group + group[-1:] * (at_once - len(group))
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
        known = dict(done or {})
        todo = [unit for unit in dict.fromkeys(units) if unit not in known]
        keeps = [self.existing]
        for unit in todo:
            kept = self.existing[unit.structure].copy()
            kept[unit.layer, unit.number] = False
            keeps.append(self.existing | {unit.structure: kept})
        dense = math.nan
        sizes: Any = {"batch_size": batch_size, "at_once": min(8, len(keeps))}
        for group in self.losses(examples, keeps, **sizes, progress=progress) if todo else ():
            means = {number: float(losses.means.mean()) for number, losses in group.items()}
            finite("losses of the model and without a unit", list(means.values()))
            dense = means.pop(0, dense)
            new = [(todo[number - 1], mean - dense) for number, mean in means.items()]
            known.update(new)
            if save is not None:
                save(new)
        return {unit: known[unit] for unit in dict.fromkeys(units)}

    # --- cut

    def load(self, directory: str | Path) -> "CutTraced":
        function, params = saved.load_pruned(directory, self.problem)
        return CutTraced(self, function, place_params(params, self.layout))

    def cut(self, keep: Keep) -> "CutTraced":
        if keep is self.existing:
            return CutTraced(self, self.problem.function, self.problem.params)
        return CutTraced(self, *cut(self, keep))

    # --- recorded

    def digests(self) -> dict[str, str]:
        problem = self.problem
        _, targets = problem.row(problem.first_set, 0)
        outputs = jax.eval_shape(problem.function, problem.params, *problem.example)
        units = [(saved.described(each), each.least) for each in self.structures]  # `norms` and `refused` choose them
        return {
            "parameters": digest_of(problem.params),
            "program": saved.program_digest(self.traced.program),
            "structures": hashlib.sha256(repr(units).encode()).hexdigest(),
            "loss": saved.program_digest(jax.make_jaxpr(problem.loss_of)(outputs, targets)),
        }

    def about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable,
            "layers": max(structure.copies for structure in self.structures),
            "units": {structure.name: structure.units for structure in self.structures},
        }

    @functools.cached_property
    def described(self) -> Sequence[dict[str, Any]]:  # type: ignore[override]
        return [saved.described(each) for each in self.structures]


@dataclasses.dataclass(frozen=True, eq=False)
class CutTraced:
    """The smaller model of a traced subject, or that model itself; see `subjects.base.Cut`."""

    subject: TracedSubject
    function: Callable[..., Any]
    """`function(params, *inputs)`."""
    params: Any

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def bytes(self) -> int:
        return weight_bytes(self.params)

    @property
    def segments(self) -> int:
        return 1  # the program is compiled as it is

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """The compiled program of the losses of a batch."""
        one = loss_of_one(self.subject, lambda gates, params, *inputs: self.function(params, *inputs))
        return jax.jit(jax.vmap(one, (None, None, 0, 0)))

    def losses(self, examples: Examples, batch_size: int) -> WindowLosses:
        parts = [self.step({}, self.params, *batch) for batch, _ in batches(examples, batch_size, self.subject.layout)]
        count = count_examples(examples)
        values = np.concatenate([np.asarray(part, np.float64) for part in parts])[:count]
        return WindowLosses(values, np.ones(count, int))

    def save(self, directory: str | Path, keep: Keep, *about: Any, **further: Any) -> None:
        saved.write_pruned(self, directory, keep, *about, **further)


def subject_of(
    problem: Problem, *, name: str = "problem", norms: bool = False, refused: bool = False, layout: Layout | None = None
) -> TracedSubject:
    """Trace a problem's function on one example, and place its arrays; see `traced_problem`."""
    fields = vars(traced_problem(problem, layout, norms=norms, refused=refused))
    return TracedSubject(**fields, name=name)


def open_problem(name: str, *, norms: bool, refused: bool, layout: Layout | None) -> TracedSubject:
    """Make the problem of a factory, and trace it."""
    return subject_of(made_problem(name), name=name, norms=norms, refused=refused, layout=layout)
