"""What a recipe is: one method of one paper, said in the parts of this library."""

import dataclasses

CORRECTED = (
    "The damping of the correction is chosen on windows that are held out, and it is towards the unpruned model's "
    "stream, so that layers make up for those before them."
)
"""Where ours differs from papers that correct by least squares."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of a paper, and how it was measured: only figures of one protocol compare."""

    model: str
    ratio: float
    """Share removed, of the paper's own denominator."""
    metric: str
    """With the window length where it is a perplexity: `WikiText-2 ppl@128`."""
    value: float
    dense: float | None = None
    """The same of the unpruned model."""
    about: str = ""
    """What else belongs to it, such as fine-tuning."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method as published, as far as it can be said here (`deviations` name the rest), or one of ours."""

    title: str
    """The method, and which of its variants."""
    paper: str = ""
    """`arXiv:NUMBER`; empty of what is no paper's."""
    chain: str = ""
    """Its steps, see `saap_jax.steps.chain`."""
    calibration: str
    """The text that the paper calibrates on. A comparison gives every recipe its own text instead."""
    deviations: tuple[str, ...] = ()
    """Where this differs from the paper or its code, each a sentence."""
    published: tuple[Published, ...] = ()
    missing: str = ""
    """Why it cannot be run here; empty where it can."""

    def __post_init__(self) -> None:
        if bool(self.chain) == bool(self.missing):
            raise ValueError(f"recipe {self.title!r}: expected a chain, or why it cannot be run")
