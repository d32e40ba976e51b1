"""The model inside lm-evaluation-harness: the same numbers as local tasks, by its own command line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from saap_jax.evaluation.tasks import read_task, run_tasks
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import load_tokenizer
from tests.evaluation.items import choice_lines, context_lines, write_lines
from tests.helpers import forward

pytestmark = [pytest.mark.lmeval, pytest.mark.filterwarnings("default")]

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: {kind}
{fields}
metric_list:
{metrics}
"""
METRIC = "  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"


def write_yaml(directory, name: str, path, fields: dict, metrics, kind: str = "multiple_choice") -> None:
    listed = "\n".join(f"{key}: {value}" for key, value in fields.items())
    text = YAML.format(name=name, path=path, kind=kind, fields=listed, metrics="".join(map(METRIC.format, metrics)))
    (directory / f"{name}.yaml").write_text(text)


CHOICES = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
CONTEXTS = {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "continuation"}


def write_tasks(directory, choices: list[dict], contexts: list[dict]) -> None:
    """Write items, and the tasks of the harness that read them."""
    path = write_lines(directory / "mine_choices.jsonl", choices)
    write_yaml(directory, "mine_choices", path, CHOICES, ("acc", "acc_norm"))
    path = write_lines(directory / "mine_contexts.jsonl", contexts)
    write_yaml(directory, "mine_contexts", path, CONTEXTS, ("acc",))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Local files, and the tasks of the harness that read the same files."""
    directory = tmp_path_factory.mktemp("tasks")
    write_tasks(directory, choice_lines(), context_lines())
    lines = [{"question": question, "answer": "the"} for question in ("the cat sat on", "and the dog", "the log")]
    path = write_lines(directory / "mine_answers.jsonl", lines)
    fields = {"doc_to_text": "question", "doc_to_target": "answer"}
    fields |= {"generation_kwargs": '{until: ["a"], max_gen_toks: 5}'}
    write_yaml(directory, "mine_answers", path, fields, ("exact_match",), "generate_until")
    return directory


@pytest.fixture(scope="module")
def harness(directory, tmp_path_factory):
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    from saap_jax.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def model(harness, tiny_model_directory):
    return harness.HarnessModel(str(tiny_model_directory))


def requests_of(*arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=each, idx=0, metadata=("t", number, 1))
        for number, each in enumerate(arguments)
    ]


@pytest.mark.parametrize("name", ["mine_choices", "mine_contexts"])
@pytest.mark.parametrize("limit", [0, 5])
def test_local_tasks_give_the_same_numbers(harness, model, directory, name, limit):
    theirs = harness.run_harness_tasks(model, [name], limit=limit, task_path=str(directory))[0]
    task = read_task(name, directory / f"{name}.jsonl", limit)
    ours = run_tasks(model.model, model.tokenizer, [task])[0]
    assert (theirs.task, theirs.ids) == (ours.task, ours.ids)
    assert len(ours.ids) == (limit or len(task.items))
    assert {key: value.tolist() for key, value in theirs.values.items()} == {
        key: value.tolist() for key, value in ours.values.items()
    }
    for a, b in zip(theirs.log_likelihoods, ours.log_likelihoods, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    wrong = task._replace(items=tuple(item._replace(gold=1 - min(item.gold, 1)) for item in task.items))
    assert run_tasks(model.model, model.tokenizer, [wrong])[0].mean("acc") != ours.mean("acc")


def test_its_own_command(directory, tiny_model_directory, tmp_path):
    """`python -m saap_jax.lm_eval` knows the model; accuracies and standard errors are ours."""
    words = ["run", "--model", "saap", "--model_args", f"path={tiny_model_directory}", "--batch_size", "4"]
    words += ["--tasks", "mine_choices,mine_contexts", "--include_path", str(directory)]
    words += ["--output_path", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "saap_jax.lm_eval", *words], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mine_choices" in done.stdout
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    model, tokenizer = load_model(tiny_model_directory), load_tokenizer(tiny_model_directory)
    for name in ("mine_choices", "mine_contexts"):
        ours = run_tasks(model, tokenizer, [read_task(name, directory / f"{name}.jsonl")])[0]
        for metric in ours.values:
            assert results[name][f"{metric},none"] == pytest.approx(ours.mean(metric))
            assert results[name][f"{metric}_stderr,none"] == pytest.approx(ours.standard_error(metric))


def test_without_the_package(tmp_path):
    code = "import sys; sys.modules['lm_eval'] = None; from saap_jax.lm_eval import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "pip install 'saap_jax[eval]'" in done.stderr


def test_rolling(harness, tiny_model_directory, model):
    """Each token is predicted once, in windows; the first from the token that begins texts."""
    text = "the cat sat on the mat and the dog sat on the log " * 2
    tokens, bos = model.tok_encode(text), model.prefix_token_id
    short = harness.HarnessModel(model.model, tokenizer=model.tokenizer, max_length=10)
    for each, window in ((model, len(tokens)), (short, 10)):
        expected = 0.0
        for start in range(0, len(tokens), window):
            stop = min(start + window, len(tokens))
            first = max(0, stop - window)  # the last window looks back
            row = [bos if first == 0 else tokens[first - 1], *tokens[first : stop - 1]]
            logits = np.asarray(forward(each.model, np.asarray([row], np.int32)), np.float64)[0]
            logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected += sum(logs[place - first, tokens[place]] for place in range(start, stop))
        assert each.loglikelihood_rolling(requests_of((text,)))[0] == pytest.approx(expected, abs=1e-3)
    long, cut = (
        model.loglikelihood_rolling(requests_of((text,)))[0],
        short.loglikelihood_rolling(requests_of((text,)))[0],
    )
    assert abs(long - cut) > 0.01


def test_long_contexts_are_cut_on_the_left(harness, model):
    short = harness.HarnessModel(model.model, tokenizer=model.tokenizer, max_length=6)
    context, continuation = "the cat sat on the mat and the dog sat", " on the log"
    kept = model.tok_encode(context + continuation)[-7:]
    count = len(model.tok_encode(context + continuation)) - len(model.tok_encode(context))
    found = short.loglikelihood(requests_of((context, continuation)))[0]
    again = model._loglikelihood_tokens([(None, kept[:-count], kept[-count:])])[0]
    assert found[0] == pytest.approx(again[0], abs=1e-5)
    assert found[0] != pytest.approx(model.loglikelihood(requests_of((context, continuation)))[0][0], abs=1e-3)


def test_results_are_cached_as_asked(model):
    class Hook:
        def __init__(self):
            self.seen = []

        def add_partial(self, *args):
            self.seen.append(args)

    model.cache_hook = hook = Hook()
    found = model.loglikelihood(requests_of(("the cat", " sat"), ("", "the")))
    pairs = [("the cat", " sat"), ("", "the")]
    assert hook.seen == [("loglikelihood", pair, each) for pair, each in zip(pairs, found, strict=True)]
    rolled = model.loglikelihood_rolling(requests_of(("the cat",)))
    assert hook.seen[2:] == [("loglikelihood_rolling", ("the cat",), rolled[0])]


class TestGeneration:
    def greedy(self, model, text: str, count: int) -> str:
        tokens = model.tok_encode(text)
        for _ in range(count):
            tokens.append(int(np.asarray(forward(model.model, np.asarray([tokens], np.int32)))[0, -1].argmax()))
        return model.tokenizer.decode(tokens[len(model.tok_encode(text)) :])

    def test_greedy_and_stop_strings(self, model):
        contexts = ["the cat sat", "and the dog", "on the"]
        made = model.generate_until(requests_of(*((each, {"until": [], "max_gen_toks": 6}) for each in contexts)))
        expected = [self.greedy(model, each, 6) for each in contexts]
        assert made == expected
        assert len(set(made)) > 1
        stop = expected[0][2:4]
        cut = model.generate_until(requests_of((contexts[0], {"until": [stop], "max_gen_toks": 6})))
        assert cut == [expected[0].split(stop)[0]]
        assert len(cut[0]) < len(expected[0])

    def test_options_of_other_requests_are_their_own(self, model):
        options = [{"until": [], "max_gen_toks": count} for count in (2, 6)]
        made = model.generate_until(requests_of(*(("the cat", each) for each in options)))
        assert made[1].startswith(made[0])
        assert len(made[1]) > len(made[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_gen_toks": 4, "num_beams": 3}, "expected until, .* got .*num_beams"),
            ({"max_gen_toks": 5000}, "max_gen_toks: expected 1 to 2047 for this model, got 5000"),
        ],
    )
    def test_refused(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            model.generate_until(requests_of(("the cat", options)))

    def test_a_task(self, harness, model, directory):
        result = harness.run_harness_tasks(model, ["mine_answers"], task_path=str(directory))[0]
        assert len(result.values["exact_match"]) == 3
        assert not result.log_likelihoods


def test_chat_template(harness, model, tokenizer):
    import copy

    with pytest.raises(ValueError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "the cat"}])
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    own = harness.HarnessModel(model.model, tokenizer=chatty)
    talk = [{"role": "system", "content": "be good"}, {"role": "user", "content": "the cat"}]
    assert own.apply_chat_template(talk) == "[user] the cat\n[assistant]"
    assert own.chat_template(True) == chatty.chat_template
    assert model.tokenizer_name != ""


class TestRefused:
    def test_names(self, harness, model, directory):
        with pytest.raises(ValueError, match="'mine_choice' is neither a local task .* did you mean 'mine_choices'"):
            harness.run_harness_tasks(model, ["mine_choice"], task_path=str(directory))
        with pytest.raises(FileNotFoundError, match="task_path: expected a directory"):
            harness.run_harness_tasks(model, ["mine_choices"], task_path=str(directory / "none"))

    def test_no_data(self, harness, model, directory):
        write_yaml(directory, "mine_missing", directory / "none.jsonl", CHOICES, ("acc",))
        with pytest.raises(ValueError, match="tasks mine_missing: the harness failed"):
            harness.run_harness_tasks(model, ["mine_missing"], task_path=str(directory))

    def test_options(self, harness, model, tokenizer):
        with pytest.raises(ValueError, match="max_length: expected 2 to 2048, .* got 1"):
            harness.HarnessModel(model.model, tokenizer=tokenizer, max_length=1)
        with pytest.raises(ValueError, match="got one without the other"):
            harness.HarnessModel(model.model)
