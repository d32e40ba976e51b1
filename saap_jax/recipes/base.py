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

    def __post_init__(self) -> None:
        if bool(self.chain) == bool(self.missing):
            raise ValueError(f"recipe {self.title!r}: expected a chain, or why it cannot be run")


def refitted(name: str, recipe: Recipe, damping: float, ridge: str) -> dict[str, Recipe]:
    """Make two rows of a method that refits the sub-blocks that it prunes: as published, and with our repair.

    As published, each is fitted to what its old weights would write on what it reads from the pruned stream, and the
    ridge pulls towards these weights.

    Args:
        recipe: its chain ends before the repair.
        damping: the ridge, over the mean of the diagonal.
        ridge: what is known of the paper's, a sentence.
    """
    ours = (
        "All sub-blocks behind the first that is pruned are refitted, towards the unpruned model's stream, so that "
        "they make up for those before them; the paper refits what it prunes, towards what that wrote.",
        "The ridge is 8 times the kept inputs over the tokens, relative to each coordinate's mean square.",
    )
    own = (ridge, "The mean of the diagonal is that of the coordinates that stay.")
    with_own, with_ours = (
        dataclasses.replace(recipe, chain=f"{recipe.chain} > {repair}", deviations=recipe.deviations + further)
        for repair, further in (
            (f"least_squares(blend=0, tokens=equal, damping={damping}, ridge=mean)", own),
            ("least_squares(tokens=equal)", ours),
        )
    )
    title = f"{recipe.title}; with our repair"
    return {name: with_own, f"{name}-our-repair": dataclasses.replace(with_ours, title=title, published=())}
