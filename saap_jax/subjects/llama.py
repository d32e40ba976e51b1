"""A LLaMA-family model as a subject: layers in segments, scans, meshes, batched gates."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig
from saap_jax.config.search import SearchConfig
from saap_jax.data import Windows, beginning, concatenated, evaluation_windows, load_scenarios, pairs, parse_scenario
from saap_jax.estimation import GRAM, observe
from saap_jax.estimation.ablation import Unit, ablate
from saap_jax.estimation.base import Curvature, Statistic, Statistics
from saap_jax.estimation.channels import observe_channels
from saap_jax.estimation.gram import Gram
from saap_jax.evaluation.candidates import candidate_losses
from saap_jax.evaluation.cost import forward_seconds, weight_bytes
from saap_jax.evaluation.perplexity import metric_name, window_losses
from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
from saap_jax.llama.narrow import narrowed, written_by
from saap_jax.llama.product import check_plain
from saap_jax.llama.segments import existing_tied, existing_units, masks, units_inside
from saap_jax.runs.records import Couplings
from saap_jax.runtime.digests import model_digest
from saap_jax.runtime.mesh import Layout, automatic, mesh_of
from saap_jax.structures import count_parameters, discover, prunable_parameters
from saap_jax.subjects.base import Progress, Subject, View, silent
from saap_jax.subjects.inside import VIEWS, SeenBy, check_further, nested_of
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.corrections import Correction
from saap_jax.surgery.counting import costs_left, kept_parameters
from saap_jax.surgery.cut import check_keep, cut
from saap_jax.surgery.divergence import Divergence
from saap_jax.surgery.scales import Scaled, scaled
from saap_jax.surgery.sequence import chosen_in_sequence
from saap_jax.trace.listing import coupling_record, traced_model
from saap_jax.types import (
    EXPERT_CHANNELS,
    RESIDUAL,
    STRUCTURES,
    TIED,
    Keep,
    Nested,
    Remat,
    Scores,
    WindowLosses,
)


@dataclasses.dataclass(frozen=True, eq=False)
class LlamaSubject(Subject):
    """A `Subject` of windows of tokens; groups are layers."""

    model: Llama
    tokenizer: Any = None
    """What `scenarios`, `texts` and `save` need, or a name by which it is loaded when it is first needed."""
    name: str = "model"
    layout: Layout | None = None
    """Where arrays lie; what is loaded back lies alike, as far as widths allow."""
    further: tuple[str, ...] = ()
    """Structures that are told apart beside attention and MLP: of `TIED`, or `RESIDUAL`."""
    channels: Literal["gate_fisher", "gate_taylor", "activation"] = "activation"
    """What scores the channels of the residual stream; see `estimation.channels`."""

    def __post_init__(self) -> None:
        check_further(self.further, self.model.constants)
        object.__setattr__(self, "model", automatic(self.model))

    def with_model(self, model: Llama) -> "LlamaSubject":
        """Return another model as a subject of the same name, tokenizer, layout and structures."""
        return dataclasses.replace(self, model=model)

    @functools.cached_property
    def words(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer

    @property
    def tolerance(self) -> float:
        """How far the figures of the masked and of the cut model may be apart, relative to them."""
        return 1e-3

    @functools.cached_property
    def existing(self) -> Keep:
        """Which units there are, `[layers, units]`; channels of the residual stream `[1, embed]`."""
        known = {**existing_tied(self.model.segments), RESIDUAL: np.ones((1, self.model.spec.embed), bool)}
        return existing_units(self.model.segments) | {
            name: units for name, units in known.items() if name in self.further
        }

    @functools.cached_property
    def costs(self) -> dict[str, np.ndarray]:
        """Parameters of a unit, `[layers]`."""
        check_plain(self.model, "pruning")
        return self.costs_left(existing_units(self.model.segments))

    def costs_left(self, keep: Keep) -> dict[str, np.ndarray]:
        """Return the parameters of a unit in a model that keeps only some query heads and channels, `[layers]`."""
        left = costs_left(self.model, keep)
        return {name: left[name] for name in self.existing}

    def searched(self, search: SearchConfig) -> SearchConfig:
        """Return the options of a search, of a mixture with as many experts a layer as a token is routed to, at least.

        With `depth` all of them go or none. Widths that suit a device are of channels, so experts have none.
        """
        if (least := self.model.constants.experts_per_token) is None:
            return search
        search = dataclasses.replace(search, device="any")
        if search.depth or search.min_keep.mlp >= least:
            return search
        return dataclasses.replace(search, min_keep=dataclasses.replace(search.min_keep, mlp=least))

    def nested(self, search: SearchConfig) -> dict[str, Nested]:
        """Return the structures that lie in others: channels of the stream in all, query heads in attention units,
        channels in experts.

        Raises:
            ValueError: a share of the budget for structures that this subject does not tell apart.
        """
        return nested_of(search, self.further, self.model.constants)

    @functools.cached_property
    def parameters(self) -> int:
        """All parameters; a tied unembedding counts once."""
        return count_parameters(self.model)

    @functools.cached_property
    def prunable(self) -> int:
        """Parameters of attention and MLP."""
        return prunable_parameters(discover(self.model))

    @functools.cached_property
    def weights(self) -> Llama:
        """The model."""
        return self.model

    def limits(self, search: SearchConfig) -> None:
        """Return None: `search` says it layer by layer."""
        search.check_layers()

    def removed(self, keep: Keep) -> int:
        """Count the parameters of attention and MLP that a cut removes."""
        return self.prunable - kept_parameters(self.model, keep).prunable

    def remaining(self, keep: Keep) -> int:
        """Count all parameters that a cut leaves."""
        return kept_parameters(self.model, keep).all

    def check_keep(self, keep: Keep) -> None:
        """Raise ValueError unless a keep-set is of this model."""
        check_keep(keep, self.model.segments)

    def check_estimators(self, names: Collection[str]) -> None:
        """Accept all: everything can be observed."""

    # --- text

    def scenarios(self, config: CalibrationConfig) -> dict[str, Windows]:
        """Draw the calibration windows of each scenario."""
        return scenarios_of(config, self.words)

    def texts(self, config: EvaluationConfig) -> dict[str, Windows]:
        """Cut the evaluation windows, by metric name."""
        return texts_of(config, self.words)

    def join(self, parts: Sequence[Windows]) -> Windows:
        """Put windows one behind the other."""
        return concatenated(parts)

    def rows(self, examples: Windows, chosen: slice | np.ndarray) -> Windows:
        """Return some windows."""
        return Windows(*(array[chosen] for array in examples))

    def count(self, examples: Windows) -> tuple[int, int]:
        """Return the number of windows and of tokens."""
        return len(examples.tokens), int(examples.mask.sum())

    def shape(self, examples: Windows, rows: int | None = None) -> list[int]:
        """Return `[windows, tokens]`."""
        return list(examples.tokens[:rows].shape)

    # --- observed, judged

    def observe(
        self,
        examples: Windows,
        needs: frozenset[Statistic],
        *,
        curvature: Curvature | None = None,
        keep: Keep | None = None,
        batch_size: int = 8,
        remat: Remat = "dots",
        progress: Progress = silent,
    ) -> Statistics:
        """Run the one pass; see `estimation.observe`."""
        gates = None if keep is None else masks(keep)
        parts = pairs(examples, batch_size)
        return observe(self.model, parts, needs, gates=gates, curvature=curvature, remat=remat, progress=progress)

    @functools.cached_property
    def views(self) -> dict[str, View]:
        """The models whose units are query heads, or channels of experts, if these are told apart."""
        return {
            name: View(dataclasses.replace(self, model=make(self.model), further=()), TIED[name][0], SeenBy(name))
            for name, make in VIEWS.items()
            if name in self.further
        }

    def apart(
        self,
        examples: Windows,
        *,
        keep: Keep | None = None,
        batch_size: int = 8,
        remat: Remat = "dots",
        progress: Progress = silent,
    ) -> Scores:
        """Return the scores of the channels of the residual stream, if these are told apart."""
        if RESIDUAL not in self.further:
            return {}
        gates, parts = None if keep is None else masks(keep), pairs(examples, batch_size)
        observed = observe_channels(self.model, parts, gates=gates, remat=remat, progress=progress)
        return {RESIDUAL: observed.scores[self.channels][None]}

    def losses(
        self,
        examples: Windows,
        keeps: Sequence[Keep],
        *,
        batch_size: int = 8,
        at_once: int = 8,
        done: Collection[int] = (),
        progress: Progress = silent,
    ) -> Iterator[dict[int, WindowLosses]]:
        """Evaluate keep-sets by masks; see `candidate_losses`."""
        parts = pairs(examples, batch_size)
        return candidate_losses(self.model, parts, keeps, done=done, at_once=at_once, progress=progress)

    def ablate(
        self,
        examples: Windows,
        units: Sequence[Unit],
        *,
        batch_size: int = 8,
        done: Mapping[Unit, float] | None = None,
        save: Callable[[list[tuple[Unit, float]]], None] | None = None,
        progress: Progress = silent,
    ) -> dict[Unit, float]:
        """Remove each unit by itself, in nats a token; see `estimation.ablation`."""
        parts, known = pairs(examples, batch_size), dict(done or {})
        plain = [unit for unit in units if unit.structure in STRUCTURES]
        found = ablate(self.model, parts, plain, done=known, save=save, progress=progress) if plain else {}
        for name, view in self.views.items():
            own = {unit._replace(structure=view.structure): unit for unit in units if unit.structure == name}

            def save_own(changes: list[tuple[Unit, float]], own: dict[Unit, Unit] = own) -> None:
                if save is not None:
                    save([(own[unit], change) for unit, change in changes])

            before = {other: known[unit] for other, unit in own.items() if unit in known}
            same: dict[str, Any] = {"batch_size": batch_size, "done": before, "save": save_own, "progress": progress}
            seen = view.subject.ablate(examples, [*own], **same) if own else {}
            found |= {own[unit]: change for unit, change in seen.items()}
        channels = [unit for unit in dict.fromkeys(units) if unit.structure == RESIDUAL]
        found |= {unit: known[unit] for unit in channels if unit in known}
        if missing := [unit for unit in channels if unit not in known]:
            found |= self._without_channels(examples, missing, batch_size, progress)
            if save is not None:
                save([(unit, found[unit]) for unit in missing])
        return {unit: found[unit] for unit in dict.fromkeys(units)}

    def _without_channels(
        self, examples: Windows, units: Sequence[Unit], batch_size: int, progress: Progress
    ) -> dict[Unit, float]:
        """Remove each channel of the residual stream by itself: a forward pass each, from the embedding on."""
        keeps = [self.existing, *({**self.existing, RESIDUAL: self.existing[RESIDUAL].copy()} for _ in units)]
        for keep, unit in zip(keeps[1:], units, strict=True):
            keep[RESIDUAL][unit.layer, unit.number] = False
        means: dict[int, float] = {}
        for group in self.losses(examples, keeps, batch_size=batch_size, progress=progress):
            means |= {number: losses.mean for number, losses in group.items()}
        return {unit: means[number] - means[0] for number, unit in enumerate(units, 1)}

    def check_compensation(self, config: CompensationConfig, microbatches: int) -> None:
        """Raise ValueError for too few microbatches to hold some out."""
        config.check_microbatches(microbatches)

    def uncompensated(self, method: str, keep: Keep | None = None) -> dict[str, str]:
        """Return experts and their channels: where the MLP is one, all is compensated by every method."""
        if method == "none" or not self.model.constants.traits.experts:
            return {}
        reasons = {}
        if keep is None or not keep["mlp"].all():
            reasons["mlp"] = "tokens of an expert that goes are routed to others, whose weights are left as they are"
        if EXPERT_CHANNELS in (self.further if keep is None else keep):
            inside = keep and units_inside(
                keep["mlp"], self.model.spec.layers, EXPERT_CHANNELS, keep[EXPERT_CHANNELS].shape
            )
            if keep is None or (inside & ~keep[EXPERT_CHANNELS]).any():
                reasons[EXPERT_CHANNELS] = "matrices of experts are left as they are"
        return reasons

    def moments(self, examples: Windows, batch_size: int) -> Gram | None:
        """Return the second moments of a text; not on a mesh, where every device would hold all of them, nor where
        channels of the stream may go, without which they are others, nor of experts, which are not corrected."""
        if mesh_of(self.model) is not None or RESIDUAL in self.further or self.model.constants.traits.experts:
            return None
        gram = observe(self.model, pairs(examples, batch_size), frozenset({GRAM}))
        return gram.of(GRAM)

    def compensated(
        self,
        keep: Keep,
        examples: Windows,
        config: CompensationConfig,
        *,
        batch_size: int = 8,
        moments: Gram | None = None,
        progress: Progress = silent,
    ) -> tuple["LlamaSubject", Sequence[Correction | Scaled]]:
        """Correct the output matrices, or add biases, then train scales; see `surgery.compensation` and `.scales`."""
        parts = pairs(examples, batch_size)
        model, corrections = self._corrected(keep, parts, config, moments, progress)
        if not config.scaled:
            return self.with_model(model), corrections
        model, done = scaled(model, self.model, keep, parts, config, progress=progress)
        return self.with_model(model), [*corrections, done]

    def _corrected(
        self, keep: Keep, parts: list[Any], config: CompensationConfig, moments: Gram | None, progress: Progress
    ) -> tuple[Llama, list[Correction]]:
        """Return the model after the correction in closed form, of the shapes of this one."""
        stream = keep.get(RESIDUAL)
        if stream is None or stream.all():
            made = compensate(self.model, keep, parts, config, gram=moments, progress=progress)
            return made.model, made.corrections
        others = {name: kept for name, kept in keep.items() if name != RESIDUAL}
        made = compensate(narrowed(self.model, stream[0]), others, parts, config, progress=progress)
        return written_by(self.model, made.model, stream[0]), made.corrections

    def in_sequence(
        self,
        keep: Keep,
        examples: Windows,
        rule: str,
        config: CompensationConfig,
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> Keep:
        """Choose units layer by layer; see `surgery.sequence`."""
        return chosen_in_sequence(self.model, keep, pairs(examples, batch_size), rule, config, progress=progress)

    def objective(self, examples: Windows, batch_size: int, language_loss: float = 0.0) -> Divergence:
        """Return the divergence from this model; see `surgery.divergence`."""
        if self.further:
            raise ValueError(
                f"search.learn, evolve and shape: expected attention and MLP alone, got {', '.join(self.existing)}"
            )
        return Divergence(self.model, pairs(examples, batch_size), language_loss)

    # --- cut

    def load(self, directory: str | Path) -> "CutLlama":
        """Read a directory back, in the type of the model."""
        layout = self.layout and self.layout.lenient()
        return CutLlama(load_model(directory, str(self.model.embedding.dtype), layout=layout), self.words)

    def cut(self, keep: Keep) -> "CutLlama":
        """Return the smaller model."""
        return CutLlama(cut(self.model, keep), self.words)

    def whole(self) -> "CutLlama":
        """Return the model itself."""
        return CutLlama(self.model, self.words)

    def seconds(self, models: Sequence[Any], examples: Windows, rows: int, *, repeats: int = 5) -> tuple[float, ...]:
        """Return each model's median seconds for a forward pass."""
        return forward_seconds([each.model for each in models], examples.tokens[:rows], repeats=repeats)

    # --- recorded

    def digests(self) -> dict[str, str]:
        """Return the digest of architecture and weights."""
        return {"model": model_digest(self.model)}

    def about(self) -> dict[str, Any]:
        """Return name and sizes, and whether the tokenizer puts a token in front of every text."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable,
            "begins": bool(beginning(self.words)),
            "layers": len(self.model.spec.layers),
            "units": {name: int(units.sum(axis=1).max()) for name, units in self.existing.items()},
        }

    def structures_record(self) -> None:
        """Return None: `attention` and `mlp` explain themselves."""

    def couplings(self) -> Couplings:
        """Return the structures as the model's program tells them."""
        return coupling_record(traced_model(self.model))


@dataclasses.dataclass(frozen=True, eq=False)
class CutLlama:
    """A smaller model."""

    model: Llama
    tokenizer: Any = None

    @property
    def parameters(self) -> int:
        """All parameters."""
        return count_parameters(self.model)

    @property
    def bytes(self) -> int:
        """Bytes of all parameters in memory."""
        return weight_bytes(self.model)

    @property
    def segments(self) -> int:
        """Stretches of equal layers."""
        return len(self.model.segments)

    def losses(self, examples: Windows, batch_size: int) -> WindowLosses:
        """Return the loss of each window."""
        return window_losses(self.model, pairs(examples, batch_size))

    def save(
        self,
        directory: str | Path,
        keep: Keep,
        about: Mapping[str, Any] = MappingProxyType({}),
        *,
        further: Mapping[str, dict[str, Any] | str] = MappingProxyType({}),
    ) -> None:
        """Write the model as a directory, with the tokenizer and what is kept; `about` are further files too."""
        save_model(self.model, directory, tokenizer=self.tokenizer, keep=keep, further={**about, **further})


def scenarios_of(config: CalibrationConfig, tokenizer: Any) -> dict[str, Windows]:
    """Draw the calibration windows of each scenario."""
    scenarios = [parse_scenario(text) for text in config.scenarios]
    return load_scenarios(scenarios, tokenizer, config.examples, config.length, config.seed, bos=config.bos)


def texts_of(config: EvaluationConfig, tokenizer: Any) -> dict[str, Windows]:
    """Cut the evaluation windows, by metric name, the calibration domain first."""
    return {
        metric_name(config.length, source): evaluation_windows(
            source, tokenizer, config.length, config.windows or None, bos=config.bos
        )
        for source in (config.in_domain, config.out_of_domain)
    }
