"""Local tasks: what is read, what is refused, and answers against log-likelihoods computed choice by choice."""

import codecs
import math

import numpy as np
import pytest

from saap_jax.evaluation.likelihood import Request, encode_pair, prefix_token
from saap_jax.evaluation.task_results import TaskResult, compared_metric, result_json
from saap_jax.evaluation.tasks import Item, Task, find_task, read_task, result_of, run_tasks
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from tests.evaluation.items import choice_lines, context_lines, write_lines
from tests.evaluation.test_likelihood import alone


@pytest.fixture(scope="module")
def tiny(tiny_model_directory):
    return load_model(tiny_model_directory), load_tokenizer(tiny_model_directory)


@pytest.fixture
def tasks(tmp_path):
    paths = [
        write_lines(tmp_path / "choices.jsonl", choice_lines()),
        write_lines(tmp_path / "contexts.jsonl", context_lines()),
    ]
    return [read_task(path.stem, path) for path in paths]


def by_hand(model, tokenizer, context: str, continuation: str) -> float:
    """Score a text by its own forward pass; tokens are those that the continuation adds."""
    tokens, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context.rstrip()))
    return alone(model, Request((*tokens[:start],), (*tokens[start:],)))[0]


def test_answers(tiny, tasks):
    for task, result in zip(tasks, run_tasks(*tiny, tasks), strict=True):
        accuracy, normed = [], []
        for item, found in zip(task.items, result.log_likelihoods, strict=True):
            expected = [by_hand(*tiny, *pair) for pair in item.pairs]
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
            accuracy.append(np.argmax(expected) == item.gold)
            normed.append(np.argmax([x / len(c) for x, c in zip(expected, item.choices, strict=True)]) == item.gold)
        assert result.values["acc"].tolist() == accuracy
        assert 0 < result.mean("acc") < 1
        n = len(accuracy)
        p = sum(accuracy) / n
        assert result.mean("acc") == p
        assert result.standard_error("acc") == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
        if task.name == "choices":
            assert result.values["acc_norm"].tolist() == normed
            assert normed != accuracy, "the two metrics are not the same thing"
        else:
            assert "acc_norm" not in result.values
        plain = result_json(result)
        assert plain["metrics"]["acc"]["value"] == p
        assert [item["id"] for item in plain["items"]] == [item.id for item in task.items]


def test_what_the_answer_depends_on():
    """The length is that of the choice in characters, without the blank before it; the first of equal ones wins."""
    task = Task("t", None, (Item("a", ("c",), ("ab", "abcd"), 1), Item("b", ("c",), ("x", "y"), 1)), True)
    result = result_of(task, ((-2.2, -4.0), (-1.0, -1.0)))
    assert result.values["acc"].tolist() == [0, 0]
    assert result.values["acc_norm"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="task t, item b: a log-likelihood is not a number"):
        result_of(task, ((-2.2, -4.0), (-1.0, math.nan)))


def test_pairs(tokenizer):
    """White space before the continuation belongs to it; the tokens are those of the whole text."""
    whole = tokenizer.encode("the cat sat")
    request = encode_pair(tokenizer, "the cat", " sat")
    assert [*request.context, *request.continuation] == whole
    assert encode_pair(tokenizer, "the cat ", "sat") == request
    bos = tokenizer.bos_token_id
    assert encode_pair(tokenizer, "", "the") == Request((bos,), tuple(tokenizer.encode("the")))
    assert encode_pair(tokenizer, "", tokenizer.bos_token + "the") == Request((bos,), tuple(tokenizer.encode("the")))
    assert encode_pair(tokenizer, " ", "the") == encode_pair(tokenizer, "", " the"), "a blank is no context"
    assert prefix_token(tokenizer) == bos


class TestFiles:
    def test_limit_and_names(self, tmp_path, monkeypatch):
        path = write_lines(tmp_path / "zeroshot.jsonl", choice_lines())
        assert [item.id for item in read_task("t", path, 3).items] == ["0", "1", "2"]
        assert find_task(str(path)) == path
        marked = tmp_path / "marked.jsonl"
        marked.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
        assert read_task("t", marked).items == read_task("t", path).items
        assert find_task("mine") is None
        (tmp_path / "zeroshot").mkdir()
        own = write_lines(tmp_path / "zeroshot" / "mine.jsonl", choice_lines())
        monkeypatch.setenv("SAAP_DATA", str(tmp_path))
        assert find_task("mine") == own
        assert find_task("other") is None
        assert find_task("zeroshot/mine.jsonl") == own
        with pytest.raises(FileNotFoundError, match="tasks: expected a JSON-lines file, found none at none.jsonl"):
            find_task("none.jsonl")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ("", "expected JSON lines with context, choices and gold, found no line"),
            ("{", "line 1: expected JSON"),
            ('{"a": ' * 10**5, "line 1: expected JSON"),
            ('{"context": "\\ud800"}', "line 1: expected JSON"),
            (" " * 2**23 + "{}", "line 1: expected at most 8,388,608 bytes"),
            ('{"contexts": {"a": 1}, "continuation": "c", "gold": 0}', "contexts: expected a list of two texts"),
            ('{"context": "c", "choices": ["a", "b"], "gold": [0]}', r"gold: .* got \[0\]"),
            ("[1]", "line 1: expected an object"),
            ('{"a": 1}', "line 1: contexts: expected a list of two texts or more, none empty, got None"),
            ('{"context": 1, "choices": ["a", "b"], "gold": 0}', "context: expected a text beside choices, got 1"),
            ('{"context": "c", "choices": ["a", ""], "gold": 0}', "choices: expected a list of two texts or more"),
            ('{"context": "c", "choices": ["a", "b"], "gold": 2}', "gold: expected a number from 0 to 1, got 2"),
            ('{"contexts": ["c", "d"], "gold": 0}', "continuation: expected a text beside contexts, got None"),
        ],
    )
    def test_refused(self, tmp_path, lines, message):
        path = tmp_path / "bad.jsonl"
        path.write_text(lines)
        with pytest.raises(ValueError, match=message):
            read_task("bad", path)

    def test_refused_together(self, tmp_path):
        both = write_lines(tmp_path / "both.jsonl", [choice_lines()[0], context_lines()[1]])
        with pytest.raises(ValueError, match="on all lines or on none"):
            read_task("both", both)
        twice = write_lines(tmp_path / "twice.jsonl", [choice_lines()[0]] * 2)
        with pytest.raises(ValueError, match="expected another id on each line"):
            read_task("twice", twice)


def test_compared_metric():
    values = np.ones(2)
    assert compared_metric(TaskResult("t", "", ("1", "2"), {"acc_norm": values, "acc": values})) == "acc"
    generated = TaskResult("t", "", ("1", "2"), {"f1,none": values, "exact_match,strict": values})
    assert compared_metric(generated) == "exact_match,strict"
    assert compared_metric(TaskResult("t", "", ("1",), {"acc": values, "acc_norm": values}), "acc_norm") == "acc_norm"
    with pytest.raises(ValueError, match="task t: expected acc or exact_match of 0 or 1 an item, it has f1"):
        compared_metric(TaskResult("t", "", ("1",), {"f1": values}))
    with pytest.raises(ValueError, match="expected acc .* it has acc"):
        compared_metric(TaskResult("t", "", ("1",), {"acc": np.array([0.5])}), "acc")
