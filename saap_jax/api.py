"""The calls of a Python session in the method's order: no files, no command line. Read this file first.

load model and text -> observe and score -> select -> mask and evaluate -> repair and cut -> save; or all of it by a
chain of steps, `run_chain`.
"""

from collections.abc import Iterable, Mapping

from saap_jax.data.windows import Windows, pairs
from saap_jax.estimation.base import Estimator
from saap_jax.evaluation.perplexity import window_losses
from saap_jax.llama.model import Llama
from saap_jax.llama.segments import masks
from saap_jax.runtime.mesh import refuse_explicit_axes
from saap_jax.runtime.progress import Passes, Track, quiet
from saap_jax.steps.allocation.allocation import Selection, selection_of
from saap_jax.steps.base import Context, State, TextSize
from saap_jax.steps.chain import Chain, parse, steps_of
from saap_jax.steps.limits import Within
from saap_jax.steps.run import Runner
from saap_jax.steps.score import calibrate as calibration
from saap_jax.steps.score.calibrate import Calibrated
from saap_jax.steps.score.score import Score
from saap_jax.subjects.base import Examples, HasSubject, Subject
from saap_jax.subjects.llama import subject_of
from saap_jax.types import Keep, Scores

Model = Llama | HasSubject | Subject
"""One of our models, a `Problem` about somebody else's, or the subject that was made of either."""


def score_units(
    model: Model,
    windows: Examples | Mapping[str, Examples],
    estimators: Iterable[str | Estimator] | Mapping[str, Estimator],
    *,
    stability: bool = False,
    keep: Keep | None = None,
    batch_size: int = 8,
    track: Track = quiet,
) -> Calibrated:
    """Score every unit by every estimator, from one pass over the calibration windows.

    Args:
        model: one of ours, or a problem.
        windows: the calibration text, or that of each scenario by name; of a problem, examples.
        estimators: scores as chains begin with them (`wanda`, `a+b`, `fused(a, b)`, `FILE.py:FACTORY`), or `Estimator`
            objects, which are named after their formula or by a mapping.
        stability: measure how stable importance is over examples, which `stable` needs; one pass more.
        keep: score the model with all other units masked.

    Returns:
        Scores, larger = more important: `scores(NAME)` is `{structure: [layers, units]}`; hand it to `select_units`.

    >>> scored = score_units(model, windows, ["wanda", "gate_fisher"])
    >>> scored.scores("wanda")["mlp"].shape
    (2, 16)

    Raises:
        ValueError: an unknown estimator, one that is named twice, or one that looks at what the model does not have.
    """
    subject = subject_of(model)
    plan = {}
    named = [(str(name), each) for name, each in estimators.items()] if isinstance(estimators, Mapping) else [
        (getattr(each.score, "__name__", "estimator") if isinstance(each, Estimator) else each, each)
        for each in estimators
    ]  # fmt: skip
    for name, each in named:
        if name in plan:
            hint = "give objects as {name: estimator}"
            raise ValueError(f"estimators: expected each name once, got {name!r} twice; {hint}")
        if isinstance(each, Estimator):
            plan[name] = Score(name, each)
            continue
        step, *others = steps_of(each)
        if others or not isinstance(step, Score):
            raise ValueError(f"estimators: expected a score, got {each!r}")
        step.check(subject, TextSize(0, 1))
        plan[name] = step
    if not plan:
        raise ValueError("estimators: expected at least one, got none")
    if isinstance(windows, Mapping):
        scenarios = windows
    else:
        scenarios = {"calibration": windows}
    passes = Passes(batch_size, track=track)
    return calibration.calibrate(subject, scenarios, plan, passes, stability=plan if stability else (), keep=keep)


def select_units(
    model: Model,
    scores: Scores | Calibrated,
    ratio: float,
    method: str = "uniform",
    *,
    gone: Keep | None = None,
    estimator: str | None = None,
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the model's prunable parameters goes.

    Args:
        scores: of one estimator, or all that `score_units` returned.
        method: the steps of a chain behind its score, such as `within(protect=(0.1,)) > global`: limits, what turns
            scores, an allocation.
        gone: units that are removed already.
        estimator: which of several to go by.

    >>> chosen = select_units(model, score_units(model, windows, ["magnitude"]), ratio=0.5)
    >>> chosen.keep["mlp"].sum(axis=1).tolist()
    [8, 8]

    Raises:
        ValueError: a ratio that cannot be met, a step that reads text, or several estimators and none named.
    """
    subject = subject_of(model)
    steps = steps_of(method)
    if gone is None:
        keep = subject.existing
    else:
        keep = {name: units & ~gone[name] for name, units in subject.existing.items()}
    state = State(subject, keep, Within())
    if isinstance(scores, Calibrated):
        scored = scores
    else:
        scored = Calibrated({"": {estimator or "": scores}}, {}, {})
    names = scored.estimators
    if estimator is None and len(names) > 1:
        raise ValueError(f"estimator: expected one of {', '.join(names)}, got none; name one")
    if (name := estimator or names[0]) not in names:
        raise ValueError(f"estimator: expected one of {', '.join(names)}, got {name!r}")
    state = state._replace(scored=scored, label=name, scores=scored.scores(name))
    for at, step in enumerate(steps):
        reads_text = step.kind in ("refinement", "repair", "text") or isinstance(step, Score)
        if reads_text or step.runs_prefix or step.inner:
            raise ValueError(f"method: expected steps that read no text, got {step.written}; call run_chain")
        on = Context(dense=subject, scenarios={}, ratio=ratio, final=ratio, following=tuple(steps[at + 1 :]))
        state = step(state, on)
    if not any(step.kind == "allocation" for step in steps):
        raise ValueError(f"method: expected an allocation, such as uniform, got {method!r}")
    return selection_of(subject, state.keep, ratio)


def run_chain(
    model: Model,
    method: str | Chain,
    windows: Examples | Mapping[str, Examples],
    ratio: float,
    *,
    batch_size: int = 8,
    track: Track = quiet,
) -> State:
    """Prune a model by a chain of steps, to a share of its prunable parameters; see `steps.chain`.

    Returns:
        What the chain has come to: `keep`, and `subject`, the model as repaired, whose `cut(keep)` is the smaller one.

    >>> run_chain(model, "wanda > uniform", windows, ratio=0.5).keep["mlp"].sum(axis=1).tolist()
    [8, 8]

    Raises:
        ValueError: a ratio that cannot be met, or a step that cannot follow what stands before it.
    """
    chain = parse(method) if isinstance(method, str) else method
    if isinstance(windows, Mapping):
        scenarios = windows
    else:
        scenarios = {"calibration": windows}
    runner = Runner(subject_of(model), scenarios, [chain], Passes(batch_size, track=track))
    runner.check(chain, [ratio])
    return runner.run(chain, ratio)


def perplexity(model: Llama, windows: Windows, keep: Keep | None = None, *, batch_size: int = 8) -> float:
    """Compute exp(mean next-token loss) over the windows; with `keep`, of the model with all other units masked.

    >>> perplexity(model, windows) > 1
    True
    """
    refuse_explicit_axes(model)
    batches = pairs(windows, batch_size, model.embedding.shape[0])
    return window_losses(model, batches, None if keep is None else masks(keep)).perplexity
