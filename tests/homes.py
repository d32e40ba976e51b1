"""Where tests live that their own files do not say of: what is slow, what runs at night alone, a few of each layer.

A test belongs to the default suite unless it takes more than about a second. What takes longer is `slow`, and guards a
landing: an oracle, a contract, a file that another program reads, a page. What takes minutes, or seldom fails alone, is
`nightly`.
"""

from collections.abc import Collection, Iterator

NIGHTLY: tuple[str, ...] = tuple(
    f"tests/{name}"
    for name in (
        *("llama/test_load_memory", "test_relatives", "trace/test_random_programs", "test_kills.py::test_the_rest"),
        *("estimation/test_observe.py::test_a_masked_model", "evaluation/test_race.py::test_two_thousand"),
        *("evaluation/test_race.py::test_one_of_eight", "recovery/test_memory.py::test_decoding"),
        *("sharded/test_planned_memory", "sharded/test_relatives"),
        *("sharded/test_processes.py::test_four", "sharded/test_traced.py::test_everything"),
        *("trace/subject/test_pipeline.py::test_gate_taylor", "trace/subject/test_compensation.py::test_the_held_out"),
    )
)
"""Beginnings of the names of tests that take minutes, or seldom fail where no faster one does."""

_SLOW = {
    "estimation/hessian": "TestAgainstTheFullHessian::test_attention_is_exact_whatever_the_batches[cut_model",
    "estimation/observe": "one_compilation",
    "estimation/reconstruction": "costs_of_blocks a_single_cost",
    "estimation/registry": "the_how_to",
    "estimation/squares": "sums_of_narrow",
    "estimation/storage": "statistics_of_somebody",
    "evaluation/perplexity": "layers_in_common",
    "evaluation/cost": "forward_bytes",
    "evaluation/differences": "windows_of_an_article",
    "evaluation/timing": "the_timed_programs",
    "export/gguf": "a_gemma_whose",
    "jobs/ab": "TestOnARealComparison",
    "jobs/cards": "each_step",
    "jobs/compare": "TestTheCache candidates_are",
    "jobs/evaluate": "TestLimits::test_a_planted",
    "jobs/frontier": "",
    "jobs/full_disk": "at_every",
    "jobs/generate": "several_texts",
    "jobs/prune": "in_rounds targets_hold_and_not_much_less_would_do[options1 costs_of_widths "
    "targets_hold_and_not_much_less_would_do[options3",
    "jobs/recover": "adapters_end_in_a_model_without_them[groupwise",
    "jobs/sensitivity": "",
    "llama/families": "gate_gradients ablation generation_equals_recomputation[mistral "
    "generation_equals_recomputation[qwen3_moe",
    "llama/generate": "logits_of_prompt_and_steps[fused logits_of_prompt_and_steps[runs-ragged "
    "logits_of_prompt_and_steps[runs-biases logits_of_prompt_and_steps[single-ragged stop_tokens",
    "llama/orbax": "the_teacher",
    "llama/model": "layers_without gates_an_example",
    "recovery/adapters": "groupwise_merges_exactly[4-4",
    "recovery/memory": "",
    "report/write": "TestOneRun::test_a_command_writes",
    "steps/least_squares": "",
    "steps/run": "rounds_repair layers_are",
    "steps/shape": "what_it_cannot",
    "surgery/sequence": "the_step_keeps",
    "trace/writers": "coordinates_of_removed_units_are_those_that_gates_set_to_zero[convnet",
    "trace/subject/adapters": "prune_returns",
    "trace/subject/compensation": "biases_and_second_repairs",
    "trace/subject/estimators": "gate_scores",
    "trace/subject/own_code": "a_pattern nothing_left a_size zeros",
    "trace/subject/pipeline": "wrong_estimators",
}
"""Beginnings of the names of tests by file, without `test_`; nothing: all of the file."""

SLOW = tuple(
    f"tests/{folder}/test_{file}.py::{'' if name[:4] in ('', 'Test') else 'test_'}{name}"
    for folder, _, file, names in ((*home.rpartition("/"), names) for home, names in _SLOW.items())
    for name in names.split(" ")
)
"""Beginnings of the names of tests that take more than about a second: with these the default suite is too long."""

SMOKE: tuple[str, ...] = tuple(
    f"tests/{name}"
    for name in (
        *("llama/test_model.py", "structures/test_structures.py", "estimation/test_formulas.py"),
        *("steps/test_chain.py", "steps/test_run.py", "recovery/test_objective.py"),
        *("evaluation/test_perplexity.py", "trace/test_factory.py", "jobs/test_compare.py", "test_api.py"),
        "runs/test_stages.py",
    )
)
"""Beginnings of the names of tests that run with other versions of Python and jax, some of each layer."""


def marks_of(name: str, marks: Collection[str]) -> Iterator[str]:
    """Yield the marks of a test beside its own."""
    if name.startswith(NIGHTLY):
        yield "nightly"
    if "slow" in marks or name.startswith(SLOW):
        yield "slow"
    elif name.startswith(SMOKE):
        yield "smoke"
