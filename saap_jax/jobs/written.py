"""What models write after the same prompts, for people to read beside the figures."""

from collections.abc import Mapping
from typing import Any

from saap_jax.jobs.judged import DENSE, PRUNED
from saap_jax.llama import Llama
from saap_jax.llama.files.tokenizer import Tokenizer
from saap_jax.llama.generate import stream_texts
from saap_jax.runs.records import WrittenText
from saap_jax.runtime.progress import Track, step
from saap_jax.subjects.base import Subject
from saap_jax.subjects.llama import CutLlama, LlamaSubject

PROMPTS = ("The capital of France is", "Once upon a time, a little dog", "To bake bread, first")

NEW_TOKENS = 64
"""Of `saap prune` and `saap recover`; `saap compare` has an option."""


def written_by(subject: Subject, cut: Any, most: int, track: Track) -> list[WrittenText]:
    """Return what the unpruned and the pruned model write; nothing of a traced model, or on several devices."""
    if not (isinstance(subject, LlamaSubject) and isinstance(cut, CutLlama)) or subject.layout:
        return []
    return written({DENSE: subject.model, PRUNED: cut.model}, subject.words, most, track)


def written(models: Mapping[str, Llama], tokenizer: Tokenizer, most: int, track: Track) -> list[WrittenText]:
    """Return what each model writes after each of `PROMPTS`, the likeliest token each time.

    Args:
        models: by what they are called.
        most: new tokens; fewer where the models have no more positions. Nothing is written where they have none, or
            where the tokenizer knows no token of a prompt.
    """
    lengths = [len(tokenizer.encode(prompt, verbose=False)) for prompt in PROMPTS]
    most = min([most, *(model.constants.positions - max(lengths) for model in models.values())])
    if most < 1 or not models or not all(lengths):
        return []
    found: list[WrittenText] = [{"prompt": prompt, "texts": dict.fromkeys(models, "")} for prompt in PROMPTS]
    with step(track, "let the models write"):
        for name, model in models.items():
            for row, piece in stream_texts(model, tokenizer, PROMPTS, max_new_tokens=most):
                found[row]["texts"][name] += piece
    return found
