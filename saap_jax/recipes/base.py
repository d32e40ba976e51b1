"""What a recipe is: one method of one paper, said in the parts of this library."""

import dataclasses

GROUPED = "A KV head goes with all its query heads; the models of the paper have a KV head for each."
"""Where units differ from those of papers on models without grouped heads."""


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
    repair: bool = False
    """Whether it only repairs, and so follows a chain that chooses units."""

    def __post_init__(self) -> None:
        if bool(self.chain) == bool(self.missing):
            raise ValueError(f"recipe {self.title!r}: expected a chain, or why it cannot be run")


def refitted(recipe: Recipe, damping: float, ridge: str) -> Recipe:
    """Add the refit of a paper to a recipe that only chooses: of the sub-blocks that it prunes, as published.

    Each is fitted to what its old weights would write on what it reads from the pruned stream, and the ridge pulls
    towards these weights.

    Args:
        recipe: its chain ends before the repair.
        damping: the ridge, over the mean of the diagonal.
        ridge: what is known of the paper's, a sentence.
    """
    repair = f"least_squares(blend=0, tokens=equal, damping={damping}, ridge=mean)"
    deviations = (*recipe.deviations, ridge, "The mean of the diagonal is that of the coordinates that stay.")
    return dataclasses.replace(recipe, chain=f"{recipe.chain} > {repair}", deviations=deviations)
