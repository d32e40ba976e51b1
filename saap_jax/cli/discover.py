"""`saap discover`: coupled structures of one of our models, or of any function that a factory names, and a drawing."""

from pathlib import Path

from saap_jax.cli.console import show, show_lines, show_paths
from saap_jax.cli.failures import UsageError
from saap_jax.config.method import ModelConfig
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.remote import is_remote

USAGE = """\
usage: saap discover [MODEL | MODULE:FACTORY | FILE.py:FACTORY] [--drawing FILE.svg] [--details]

Print the coupled structures of a model, or of what a factory returns: (function, params, *inputs).
--details prints of a factory's function every member, gate and reason.
--drawing writes parameters, axes and structures as a picture."""


def run(words: list[str]) -> None:
    """Run `saap discover`.

    Raises:
        UsageError: more than one model, or another option than these two.
        ValueError, FileNotFoundError: no such model or factory.
    """
    if set(words) & {"-h", "--help"}:
        show_lines(USAGE)
        return
    names, drawing = _split([word for word in words if word != "--details"])
    if len(names) > 1:
        raise UsageError(f"discover: expected one model, got {' '.join(names)}")
    name = names[0] if names else ModelConfig().name
    check_target("--drawing", drawing)
    if ":" in name and not is_remote(name):
        from saap_jax.trace.factory import traced_factory
        from saap_jax.trace.listing import traced_tables
        from saap_jax.trace.trace import describe

        traced, verdicts = traced_factory(name)
        show(*traced_tables(name, traced, verdicts))
        if "--details" in words:
            show_lines(describe(traced))
    else:
        from saap_jax.llama import load_model
        from saap_jax.trace.listing import listing, traced_model

        model = load_model(name)
        table, said = listing(name, model)
        show(table, said)
        traced = traced_model(model) if drawing else None
    if drawing and traced is not None:
        from saap_jax.report.figures.couplings import couplings_svg

        write_atomically(Path(drawing), couplings_svg(traced).encode())
        show_paths(drawing=Path(drawing))


def _split(words: list[str]) -> tuple[list[str], str]:
    names, drawing, pending = [], "", iter(words)
    for word in pending:
        option, equals, value = word.partition("=")
        if option == "--drawing":
            drawing = value if equals else next(pending, "")
            if not drawing.endswith(".svg"):
                raise UsageError(f"discover: --drawing: expected the name of an .svg file, got {drawing or 'nothing'}")
        elif word.startswith("-"):
            raise UsageError(f"discover: expected no option but --drawing and --details, got {word}")
        else:
            names.append(word)
    return names, drawing
