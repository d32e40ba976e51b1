"""A LLaMA-family model as a subject: layers in segments, scans, meshes, batched gates."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig
from saap_jax.data.windows import (
    Windows,
    beginning,
    evaluation_windows,
    load_scenarios,
    pairs,
    parse_scenario,
    window_articles,
)
from saap_jax.estimation.ablation import Unit, ablate
from saap_jax.estimation.base import Batch, Curvature, Statistic, Statistics
from saap_jax.estimation.observe import observe
from saap_jax.evaluation.perplexity import candidate_losses, metric_name, window_losses
from saap_jax.llama.files.write import save_model
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import existing_units, masks
from saap_jax.runtime.digests import model_digest
from saap_jax.runtime.mesh import Layout, refuse_explicit_axes
from saap_jax.runtime.progress import OBSERVING, Passes
from saap_jax.structures.discovery import count_parameters, discover, prunable_parameters, weight_bytes
from saap_jax.structures.weights import LlamaWeights
from saap_jax.subjects.base import HasSubject, LanguageModel, Size, Subject, tolerance_of
from saap_jax.surgery.compensation import compensate
from saap_jax.surgery.corrections import Correction, Repair, Walk
from saap_jax.surgery.cut import cut
from saap_jax.surgery.divergence import Divergence, folded, row_divergences
from saap_jax.surgery.sequence import chosen_in_sequence
from saap_jax.types import STRUCTURES, Keep, Scores, WindowLosses
from saap_jax.wings import wing

WRITTEN = 128
"""Rows that are written at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class LlamaSubject(LanguageModel):
    """A `LanguageModel` of windows of tokens; groups are layers. What methods do is said there."""

    model: Llama
    tokenizer: Any = None
    """What `scenarios`, `texts` and `save` need, or a name by which it is loaded when it is first needed."""
    name: str = "model"
    layout: Layout | None = None
    """Where arrays lie; what is loaded back lies alike, as far as widths allow."""

    def __post_init__(self) -> None:
        refuse_explicit_axes(self.model)

    def with_model(self, model: Llama) -> "LlamaSubject":
        """Return another model as a subject of the same name, tokenizer and layout."""
        return dataclasses.replace(self, model=model)

    @functools.cached_property
    def words(self) -> Any:
        """The tokenizer."""
        if isinstance(self.tokenizer, str):
            return wing("load_tokenizer")(self.tokenizer)
        return self.tokenizer

    def check_tokenizer(self) -> None:
        """Load the tokenizer, which raises ValueError where there is none."""
        _ = self.words

    @functools.cached_property
    def tolerance(self) -> float:
        return tolerance_of(self.model.embedding.dtype)

    @functools.cached_property
    def existing(self) -> Keep:
        return existing_units(self.model.segments)

    @functools.cached_property
    def costs(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(s.parameters_per_unit, np.int64) for name, s in discover(self.model).items()}

    @functools.cached_property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @functools.cached_property
    def prunable(self) -> int:
        return prunable_parameters(discover(self.model))

    @functools.cached_property
    def weights(self) -> LlamaWeights:
        return LlamaWeights(self.model)

    def limits(self, within: Any) -> Any:
        """Limit a mixture to as many experts a layer as a token is routed to, at least.

        With `depth` all of them go or none.
        """
        within.check_structures(STRUCTURES)
        if (least := self.model.constants.experts_per_token) is None:
            return within
        kept = {name: within.layer(name).min_keep for name in STRUCTURES}
        if within.depth or kept["mlp"] >= least:
            return within
        return dataclasses.replace(within, min_keep=kept | {"mlp": least})

    def removed(self, keep: Keep) -> int:
        return self.prunable - sum(int((keep[name].sum(axis=1) * cost).sum()) for name, cost in self.costs.items())

    # --- text

    def scenarios(self, config: CalibrationConfig) -> dict[str, Windows]:
        return scenarios_of(config, self.words)

    def texts(self, config: EvaluationConfig) -> dict[str, Windows]:
        return texts_of(config, self.words)

    def articles(self, config: EvaluationConfig) -> dict[str, list[int]]:
        return texts_of(config, self.words, window_articles)

    def size(self, examples: Windows) -> Size:
        return Size(*examples.tokens.shape, tokens=int(examples.mask.sum()))

    # --- observed, judged

    def _parts(self, examples: Windows, batch_size: int) -> Sequence[Batch]:
        """Cut windows that were checked into microbatches."""
        return pairs(examples, batch_size, self.model.embedding.shape[0])

    def observe(
        self,
        examples: Windows,
        needs: frozenset[Statistic],
        passes: Passes = Passes(),
        *,
        curvature: Curvature | None = None,
        keep: Keep | None = None,
    ) -> Statistics:
        gates = None if keep is None else masks(keep)
        parts = self._parts(examples, passes.batch_size)
        options: Any = {"remat": passes.remat, "progress": passes.progress(OBSERVING)}
        return observe(self.model, parts, needs, gates=gates, curvature=curvature, **options)

    def losses(
        self, examples: Windows, keeps: Sequence[Keep], *, batch_size: int = 8, **options: Any
    ) -> Iterator[dict[int, WindowLosses]]:
        return candidate_losses(self.model, self._parts(examples, batch_size), keeps, **options)

    def ablate(
        self, examples: Windows, units: Sequence[Unit], *, batch_size: int = 8, **options: Any
    ) -> dict[Unit, float]:
        return ablate(self.model, self._parts(examples, batch_size), units, **options)

    def unrepaired(self, repair: Repair, keep: Keep | None = None) -> dict[str, str]:
        kept = keep is not None and np.array_equal(keep["mlp"], self.existing["mlp"])
        if kept or not self.model.constants.traits.experts:
            return {}
        return {"mlp": "tokens of an expert that goes are routed to others, whose weights are left as they are"}

    def repaired(
        self, keep: Keep, examples: Windows, repair: Repair, *, dense: Any, batch_size: int = 8, **options: Any
    ) -> tuple["LlamaSubject", Sequence[Correction]]:
        parts = self._parts(examples, batch_size)
        other = self._other(dense)
        model, corrections = compensate(self.model, keep, parts, repair, dense=other, **options)
        return self.with_model(model), corrections

    def objective(
        self, examples: Windows, batch_size: int, dense: Any, language_loss: float = 0.0, first: int = 0
    ) -> Divergence:
        return Divergence(self.model, self._parts(examples, batch_size), language_loss, dense.model, first)

    def blanked(self, examples: Windows, rows: np.ndarray) -> Windows:
        return examples._replace(mask=examples.mask & ~rows[:, None])

    def continued(self, examples: Windows, rows: int, prompt: int, *, temperature: float, seed: int) -> Windows:
        length = examples.tokens.shape[1]
        prompt = min(prompt, length // 2)
        if not len(begun := examples.tokens[examples.mask.all(axis=1), :prompt]) or not prompt:
            raise ValueError("expected whole windows of two tokens or more to go on from, got none")
        prompts = [begun[row % len(begun)].tolist() for row in range(rows)]
        writer = wing("writer")
        sampling = writer.Sampling(temperature=temperature, seed=seed, stop_tokens=())
        written = writer.generate(
            self.model, prompts, max_new_tokens=length - prompt, sampling=sampling, batch_size=WRITTEN
        )
        tokens = np.array([first + rest for first, rest in zip(prompts, written, strict=True)], np.int32)
        return Windows(tokens, np.ones(tokens.shape, bool))

    def divergences(self, examples: Windows, keep: Keep, pruned: Any, *, batch_size: int = 8) -> np.ndarray:
        rows = len(examples.tokens)
        whole = Windows(*(np.pad(each, ((0, -rows % batch_size), (0, 0))) for each in examples))  # as meshes divide
        return row_divergences(pruned.model, keep, self._parts(whole, batch_size), self.model)[:rows]

    def layerwise(
        self, keep: Keep, examples: Windows, rule: str, walk: Walk, *, dense: Any, batch_size: int = 8, **options: Any
    ) -> tuple[Keep, tuple["LlamaSubject", Sequence[Correction]] | None]:
        parts = self._parts(examples, batch_size)
        other = self._other(dense)
        chosen, made = chosen_in_sequence(self.model, keep, parts, rule, walk, dense=other, **options)
        return chosen, None if made is None else (self.with_model(made.model), made.corrections)

    def folded(self, scales: Scores) -> "LlamaSubject":
        factors: dict[str, Any] = dict(scales)
        return self.with_model(folded(self.model, factors))

    def _other(self, dense: Any) -> Llama | None:
        """Return the unpruned model where it is not this one."""
        if dense.model is self.model:
            return None
        return dense.model

    # --- cut

    def load(self, directory: str | Path) -> "CutLlama":
        layout = self.layout and self.layout.lenient()
        return CutLlama(wing("load_model")(directory, str(self.model.embedding.dtype), layout=layout), self.words)

    def cut(self, keep: Keep) -> "CutLlama":
        if keep is self.existing:
            return CutLlama(self.model, self.words)
        return CutLlama(cut(self.model, keep), self.words)

    # --- recorded

    def digests(self) -> dict[str, str]:
        return {"model": model_digest(self.model)}

    def about(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "prunable_parameters": self.prunable,
            "begins": bool(beginning(self.words)),
            "layers": len(self.model.spec.layers),
            "units": {name: int(units.sum(axis=1).max()) for name, units in self.existing.items()},
        }


@dataclasses.dataclass(frozen=True, eq=False)
class CutLlama:
    """A smaller model; see `subjects.base.Cut`."""

    model: Llama
    tokenizer: Any = None

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @property
    def bytes(self) -> int:
        return weight_bytes(self.model)

    @property
    def segments(self) -> int:
        return len(self.model.segments)

    def losses(self, examples: Windows, batch_size: int) -> WindowLosses:
        return window_losses(self.model, pairs(examples, batch_size, self.model.embedding.shape[0]))

    def save(
        self,
        directory: str | Path,
        keep: Keep,
        about: Mapping[str, Any] = MappingProxyType({}),
        *,
        further: Mapping[str, dict[str, Any] | str] = MappingProxyType({}),
    ) -> None:
        save_model(self.model, directory, tokenizer=self.tokenizer, keep=keep, further={**about, **further})


def scenarios_of(config: CalibrationConfig, tokenizer: Any) -> dict[str, Windows]:
    """Draw the calibration windows of each scenario."""
    scenarios = [parse_scenario(text) for text in config.scenarios]
    return load_scenarios(scenarios, tokenizer, config.examples, config.length, config.seed, bos=config.bos)


def texts_of(config: EvaluationConfig, tokenizer: Any, cut: Callable[..., Any] = evaluation_windows) -> dict[str, Any]:
    """Cut the evaluation windows, or tell the articles of each, by metric name, the calibration domain first."""
    how: Any = {"limit": config.windows or None, "bos": config.bos, "drawn": config.drawn}
    return {
        metric_name(config.length, source): cut(source, tokenizer, config.length, **how)
        for source in (config.in_domain, config.out_of_domain)
    }


# --- from a name, a model or a problem ------------------------------------------------------------


def open_subject(
    config: ModelConfig,
    *,
    layout: Layout | None = None,
    lengths: Mapping[str, int] | None = None,
) -> Subject:
    """Load the model that a configuration names, or make the problem of its factory and trace it.

    Args:
        lengths: of the windows that it will read, as `load_model` takes them.

    Raises:
        ValueError: a name that is none, or a model or problem that cannot be pruned.
    """
    if config.traced:
        return wing("open_problem")(config.name, norms=config.norms, refused=config.refused, layout=layout)
    model = wing("load_model")(config.name, config.dtype, layout=layout, lengths=dict(lengths or {}))
    return LlamaSubject(model, config.name, config.name, layout)


def subject_of(model: Any) -> Subject:
    """Return a model of ours or a problem as a subject; a subject as it is.

    Raises:
        ValueError: something else.
    """
    if isinstance(model, Llama):
        return LlamaSubject(model)
    if isinstance(model, Subject):
        return model
    if not isinstance(model, HasSubject):
        raise ValueError(f"model: expected one of saap_jax.load_model, or a Problem, got {type(model).__name__}")
    return model.as_subject()
