"""Where tests live that their own files do not say of: what runs at night alone, and the few of each layer.

A test belongs to the default suite unless it takes more than about a second. What takes longer is `slow`, and guards a
landing, if no other test would fail with it: an oracle, a contract, a file that another program reads. All other is
`nightly`.
"""

from collections.abc import Collection, Iterator

NIGHTLY: tuple[str, ...] = tuple(
    f"tests/{name}"
    for name in (
        *("evaluation/test_timing", "evaluation/test_rank_correlation", "evaluation/tasks/test_likelihood"),
        *("export/test_families", "export/test_hf", "export/test_widths"),
        *("jobs/test_addresses", "jobs/test_cards", "jobs/test_full_disk"),
        *("jobs/test_lengths", "jobs/test_racing", "jobs/test_judged"),
        *("llama/test_load_memory", "llama/test_text", "llama/test_segments", "llama/test_tokenizer"),
        *("recovery/test_memory", "recovery/test_top_k", "recovery/test_loop", "recipes/test_paper_configs"),
        *(
            "report/",
            "runs/test_mirror",
            "runs/test_stages",
            "runs/test_suggestions",
            "steps/test_few_shapes",
            "steps/test_shape",
        ),
        *("test_relatives", "trace/test_random_programs", "trace/subject/test_lengths", "trace/subject/test_experts"),
        *("trace/subject/test_commands", "estimation/test_storage"),
    )
)
"""Beginnings of the names of slow tests that a landing does not wait for: what they hold, faster ones hold too."""

SMOKE: tuple[str, ...] = tuple(
    f"tests/{name}"
    for name in (
        *("llama/test_model.py", "structures/test_structures.py", "estimation/test_formulas.py"),
        *("steps/test_chain.py", "steps/test_run.py", "recovery/test_objective.py"),
        *("evaluation/test_perplexity.py", "trace/test_factory.py", "jobs/test_compare.py", "test_api.py"),
    )
)
"""Beginnings of the names of tests that run with other versions of Python and jax, some of each layer."""


def marks_of(name: str, marks: Collection[str]) -> Iterator[str]:
    """Yield the marks of a test beside its own."""
    if "slow" in marks and name.startswith(NIGHTLY):
        yield "nightly"
    if name.startswith(SMOKE) and "slow" not in marks:
        yield "smoke"
