"""A model for lm-evaluation-harness, scored by the same core as local tasks; its tasks by their names.

Needs the package lm-eval (extra `eval`), which is imported with this module, and neither torch nor anything that
downloads models. `python -m saap_jax.lm_eval` is the harness's own command line with this model as `--model saap`.

Source: lm-evaluation-harness 0.4.13, `lm_eval/api/model.py` and, for what the requests mean, `HFLM`.
"""

import difflib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from saap_jax.data.chat import conversation
from saap_jax.evaluation.likelihood import PaddedRows, Request, encode, log_likelihoods, prefix_token
from saap_jax.evaluation.task_results import TaskResult
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.tokenizer import Tokenizer, load_tokenizer
from saap_jax.llama.generate import Sampling, generate
from saap_jax.llama.model import Llama

MAX_NEW_TOKENS = 256
"""Tokens generated at most where a task does not say, as `HFLM` has it."""


class HarnessModel(TemplateLM):
    """A model of this library as the harness sees it."""

    tokenizer: Tokenizer

    def __init__(
        self,
        path: str | Llama = "smollm2-135m",
        tokenizer: Tokenizer | None = None,
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load a model, or take one.

        Args:
            path: what `load_model` takes: a name, GGUF file or directory, pruned or not; or a model.
            tokenizer: needed beside a model; of a path, its own.
            batch_size: rows of 128 tokens that run at once; "auto" is 16.
            max_length: tokens of context and continuation together; longer requests lose tokens on the left. None: the
                model's positions.
            device, max_batch_size: given by the harness, and not used; JAX decides.
        """
        super().__init__()
        if isinstance(path, Llama) != (tokenizer is not None):
            raise ValueError(
                "saap: expected a model and its tokenizer, or the path of a model, got one without the other"
            )
        self.name = "" if isinstance(path, Llama) else path
        if isinstance(path, Llama):
            self.model = path
        else:
            self.model = load_model(path, dtype)
        self.tokenizer = tokenizer or load_tokenizer(self.name)
        if str(batch_size).startswith("auto"):
            self.batch_size = 16
        else:
            self.batch_size = int(batch_size)
        positions = self.model.constants.positions
        if max_length is None:
            self.max_length = positions
        else:
            self.max_length = int(max_length)
        if not 2 <= self.max_length <= positions:
            raise ValueError(f"max_length: expected 2 to {positions}, the positions of the model, got {max_length}")

    # --- text and tokens -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        if token is None:
            return self.prefix_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        return prefix_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Tokenise a text; see `saap_jax.evaluation.likelihood.encode`."""
        return encode(self.tokenizer, string, special=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """Name that tells chat templates apart in the harness's cache of requests."""
        return (self.tokenizer.name_or_path or self.name or "saap").replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as one text, by the tokenizer's template; without the system's part if it refuses one.

        Raises:
            ValueError: the tokenizer has no template, or it fails.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.name or 'the model'}: its tokenizer has no chat template; leave chat templates out"
            )
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return conversation(self.tokenizer, chat_history, **ends)
        except ValueError:
            asked = [message for message in chat_history if message["role"] != "system"]
            return conversation(self.tokenizer, asked, **ends)

    # --- requests ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        cut = [
            Request(tuple(context[-max(self.max_length + 1 - len(continuation), 1) :]), tuple(continuation))
            for _, context, continuation in requests
        ]

        def progress(batches: Sequence[PaddedRows]) -> Iterator[PaddedRows]:
            return iter(tqdm(batches, desc="Running loglikelihood batches", disable=disable_tqdm))

        scored = log_likelihoods(self.model, cut, batch_size=self.batch_size, progress=progress)
        for (texts, _, _), found in zip(requests, scored, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, (found.log_likelihood, found.greedy))
        return [(found.log_likelihood, found.greedy) for found in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sum the log-likelihood of whole texts in nats, in windows of `max_length`, each token predicted once."""
        owners: list[int] = []
        windows: list[Any] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(window)))
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        sums = np.zeros(len(requests))
        np.add.at(sums, np.asarray(owners, int), [value for value, _ in scored])
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(value))
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context, up to the first stop string, without it.

        Contexts too long to leave room for the new tokens lose tokens on the left.

        Raises:
            ValueError: an option of generation that is not known, or no room for the new tokens.
        """
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in tqdm(alike.values(), desc="Running generate_until requests", disable=disable_tqdm):
            options = requests[numbers[0]].args[1]
            made = self._generate([requests[number].args[0] for number in numbers], options)
            for number, text in zip(numbers, made, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Continue contexts that share their options."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        until = handle_stop_sequences(wanted.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        new = wanted.pop("max_gen_toks")
        sampled = wanted.pop("do_sample")
        sampling = {name: wanted.pop(name) for name in ("temperature", "top_k", "top_p") if name in wanted}
        if wanted:
            raise ValueError(
                f"generation: expected until, max_gen_toks, do_sample, temperature, top_k, top_p, got {wanted}"
            )
        if not 0 < new < self.max_length:
            raise ValueError(f"max_gen_toks: expected 1 to {self.max_length - 1} for this model, got {new}")

        def finished(_: int, tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            return any(stop in text for stop in until if stop)

        ends = sorted({self.eot_token_id, *self.model.constants.eos_tokens})
        made = generate(
            self.model,
            [self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id] for context in contexts],
            max_new_tokens=new,
            sampling=Sampling(**(sampling if sampled else {}), stop_tokens=ends),
            batch_size=self.batch_size,
            finished=finished,
        )
        decoded = (self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made)
        return [postprocess_generated_text(text, until, None) for text in decoded]


register_model("saap")(HarnessModel)


# --- tasks by name -------------------------------------------------------------------------------------


def run_harness_tasks(
    model: HarnessModel, names: Sequence[str], *, limit: int = 0, task_path: str = ""
) -> list[TaskResult]:
    """Run tasks of the harness without examples (zero shots), and return their results; a group gives several.

    Args:
        limit: items of each task, the first ones; 0 takes all.
        task_path: directory of further tasks (YAML files), which come before those of the package.

    Raises:
        ValueError: a name that the harness does not know, or a task that cannot be run, such as one whose data cannot
            be downloaded.
    """
    if task_path and not Path(task_path).is_dir():
        raise FileNotFoundError(f"task_path: expected a directory of YAML files, found none at {task_path}")
    manager = None
    if task_path:
        manager = TaskManager(include_path=task_path, include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=task_path or None)  # to index those of the package takes 10 seconds and more
    if unknown := [name for name in names if name not in manager.all_tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, 1)
        if near:
            hint = f", did you mean {near[0]!r}?"
        else:
            hint = "; `lm_eval ls tasks` lists them"
        raise ValueError(f"tasks: {unknown[0]!r} is neither a local task nor one of the harness{hint}")
    try:
        found: Any = simple_evaluate(
            model=model,
            tasks=list(names),
            num_fewshot=0,
            limit=limit or None,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager,
        )
    except Exception as error:  # data sets, templates and metrics raise whatever they meet
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"tasks {', '.join(names)}: the harness failed ({type(error).__name__}: {first})") from error
    source = f"lm-eval {importlib.metadata.version('lm-eval')}"
    return [_result(task, samples, source) for task, samples in found["samples"].items()]


def _result(task: str, samples: Sequence[dict[str, Any]], source: str) -> TaskResult:
    """Make a result of the harness's samples; of several filters, each metric is `METRIC,FILTER`."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    values: dict[str, np.ndarray] = {}
    ids: tuple[str, ...] = ()
    likelihoods: tuple[tuple[float, ...], ...] = ()
    for each in filters:
        chosen = sorted((sample for sample in samples if sample["filter"] == each), key=lambda sample: sample["doc_id"])
        names = tuple(str(sample["doc"].get("id", sample["doc_id"])) for sample in chosen)
        if len(set(names)) == len(names):
            ids = names
        else:
            ids = tuple(str(sample["doc_id"]) for sample in chosen)
        for metric in chosen[0]["metrics"]:
            if all(isinstance(sample[metric], int | float | np.number | np.bool_) for sample in chosen):
                name = metric if each == "none" else f"{metric},{each}"
                values[name] = np.array([float(sample[metric]) for sample in chosen])
        answers = [sample["filtered_resps"] for sample in chosen]
        if all(isinstance(answer, tuple | list) and len(answer) == 2 for row in answers for answer in row):
            likelihoods = tuple(tuple(float(answer[0]) for answer in row) for row in answers)
    if not values:
        raise ValueError(f"task {task}: expected a metric that is a number for each item, it has none")
    return TaskResult(task, source, ids, values, likelihoods)
