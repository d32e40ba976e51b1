"""Invented items of local tasks, and the files that hold them."""

import json
from pathlib import Path

import numpy as np

WORDS = ["the", "cat", "dog", "sat", "on", "mat", "log", "and", "12", "a", "very", "old", "sea"]


def choice_lines(count: int = 12, seed: int = 0) -> list[dict]:
    """Return items with one context each and two to four choices, some of one token, some with blanks around."""
    random = np.random.default_rng(seed)

    def words(least: int, most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(least, most)))

    lines = []
    for number in range(count):
        choices = [words(1, 5) for _ in range(random.integers(2, 5))]
        if number % 4 == 0:
            choices[0] = f" {choices[0]} "
        context = words(3, 12) + (" " if number % 5 == 0 else ":")
        gold = int(random.integers(len(choices)))
        lines.append({"id": str(number), "context": context, "choices": choices, "gold": gold})
    return lines


def context_lines(count: int = 8, seed: int = 1) -> list[dict]:
    """Return items with two contexts and one continuation."""
    random = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        sentence = " ".join(random.choice(WORDS, 6))
        contexts = [f"{sentence} {option}" for option in ("cat", "old dog")]
        continuation = " ".join(random.choice(WORDS, 4))
        gold = int(random.integers(2))
        lines.append({"id": str(number), "contexts": contexts, "continuation": continuation, "gold": gold})
    return lines


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
