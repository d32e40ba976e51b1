"""What a run took and cost: only what was recorded, in words that hold."""

import pytest

from saap_jax.report.kinds.common import cost_section, cost_sentences, model_name, stage_table, suggestions_section

OLD = {"name": "load", "seconds": 1.26, "times": 1, "peak_host_gib": 0.5}
NEW = OLD | {
    "name": "score", "times": 2, "compile_seconds": 0.4, "compiles": 3, "peak_device_gib": None, "tokens": 4096,
    "tokens_per_second": 3250.8,
}  # fmt: skip
COST = {
    "device_hours": 0.0508, "devices": 2, "usd": 0.0021, "usd_per_million_tokens": {"dense": 0.077, "cut": 0.059},
    "prices": {"kind": "cpu", "usd_per_hour": 0.041, "date": "2026-06"},
}  # fmt: skip


def cells(stages: list[dict]) -> list[list[str]]:
    table = stage_table(stages)
    return [list(table.header), *([cell.text for cell in line.cells] for line in table.lines)]


class TestStages:
    def test_show_what_some_stage_has(self):
        assert cells([OLD, NEW]) == [
            [
                "stage",
                "seconds",
                "of them compiling",
                "programs",
                "tokens",
                "tokens a second",
                "peak host memory (GiB)",
            ],
            ["load", "1.3", "-", "-", "-", "-", "0.50"],
            ["score (2 times)", "1.3", "0.4", "3", "4,096", "3,251", "0.50"],
        ]

    def test_of_an_older_version(self):
        assert cells([OLD])[0] == ["stage", "seconds", "peak host memory (GiB)"]

    def test_zero_is_a_number(self):
        assert cells([OLD | {"compile_seconds": 0.0}])[1][2] == "0.0"


class TestCost:
    def test_says_hours_price_and_tokens(self):
        assert cost_sentences({"cost": COST, "devices": {"platform": "cpu"}}) == [
            "0.0508 device-hours on 2 cores: $0.0021 (cpu, $0.041 an hour each, 2026-06).",
            "A million tokens in the timed forward pass: $0.077 dense, $0.059 cut.",
        ]
        assert "on 1 device: " in cost_sentences({"cost": COST | {"devices": 1}, "devices": {"platform": "gpu"}})[0]

    def test_without_a_price(self):
        cost = {"device_hours": 2.0, "devices": 4, "usd": None, "prices": None, "note": "no price for x"}
        assert cost_sentences({"cost": cost}) == ["2 device-hours on 4 devices; no price for x."]

    def test_without_a_timed_pass(self):
        assert len(cost_sentences({"cost": COST | {"usd_per_million_tokens": None}})) == 1

    def test_nothing_recorded(self):
        assert cost_sentences({}) == []
        assert cost_section({}) == cost_section({"stages": []}) == []


@pytest.mark.parametrize(
    ("suggestion", "said"),
    [
        ("Try more.", ["Try more."]),
        (
            {"text": "Do it.", "effect": "measured: -3 %", "command": "saap prune"},
            ["Do it.", "Measured: -3 %", "saap prune"],
        ),
        ({"text": "Do it.", "expected_effect": "-3 %"}, ["Do it.", "Expected effect: -3 %"]),
    ],
)  # fmt: skip
def test_suggestions(suggestion, said):
    (section,) = suggestions_section({"suggestions": [suggestion]})
    assert [block.text for block in section.blocks if block.kind in ("words", "code")] == said
    assert suggestions_section({"suggestions": []}) == suggestions_section({}) == []


def test_the_model_of_older_and_newer_records():
    assert model_name({"model": {"name": "a"}, "config": {"model": {"name": "b"}}}) == "a"
    assert model_name({"config": {"model": {"name": "b"}}}) == "b"
    assert model_name({"config": {"model": "c"}}) == "c"
    assert model_name({}) == ""
