"""Export a model: write it, read it back, compare, and only then give it its name."""

import contextlib
import dataclasses
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from safetensors import safe_open

from saap_jax.checks import is_remote
from saap_jax.config.use import ExportConfig
from saap_jax.errors import read_object
from saap_jax.export.hf import TRAVELS, write_hf
from saap_jax.export.widths import without_empty_layers
from saap_jax.extras import need
from saap_jax.jobs import origins
from saap_jax.llama.files.config import config_from_spec
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.sources import loader_of, resolve
from saap_jax.llama.files.tokenizer import Tokenizer, load_tokenizer
from saap_jax.llama.files.write import new_output, write_further, write_json, write_tokenizer
from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import dequantized, quantization_of
from saap_jax.report.blocks import Code, text_table
from saap_jax.runs.commands import options
from saap_jax.runs.origin import OriginStep
from saap_jax.runtime.progress import Track, quiet, step
from saap_jax.runtime.remote import staged
from saap_jax.runtime.words import plural
from saap_jax.structures.discovery import count_parameters
from saap_jax.surgery.cut import width_note
from saap_jax.wings import wing

TUNIX = "tunix.json"
MAXTEXT = "maxtext.yml"
"""Names of the files that say what configures Tunix, and MaxText."""

TEACHER = "teacher"
"""Name of the directory of the unpruned model, beside what MaxText distils."""

TEXT = """\
In 1912, after forty days of rain, the river left its bed. The people of the valley carried what they could to the
mill: flour, two goats, a clock that had stopped at 7:35. "It won't last," said the miller, and counted the steps that
were still dry. By morning there were eleven of 24, and nobody spoke of the bridge any more. def f(x): return x ** 2
"""
"""What is compared: prose, numbers, quotation marks, a little code."""

LENGTH = 96

TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2, "q8_0": 1e-1, "q4_1": 1e-2}
"""Type of the exported weights -> largest accepted deviation of the logits, as a share of their spread."""


class Agreement(NamedTuple):
    """How the logits of an exported model compare with those of its source, both computed in float32."""

    tokens: int
    """Positions compared."""
    largest: float
    """Largest absolute difference of a logit."""
    deviation: float
    """Root mean square of the differences, as a share of the standard deviation of the source's logits."""
    argmax: float
    """Share of the positions at which both models find the same token most likely."""
    tolerance: float
    """Largest accepted `deviation`."""


class Exported(NamedTuple):
    """What an export wrote, and how it compares with its source."""

    kind: str
    """The model type or architecture that was written."""
    parameters: int
    """Of the source."""
    added: int
    """Zeros that the format needed beside them."""
    written: int
    """Parameters that the files hold, counted there."""
    bytes: int
    """Of everything that was written."""
    agreement: Agreement
    notes: tuple[str, ...]
    """What a user should know: a sentence each."""


def export_model(config: ExportConfig, *, track: Track = quiet) -> Exported:
    """Write `config.model` to `config.out`, which appears only when its logits were found to be those of the source.

    Raises:
        ValueError: the format cannot hold the model, or the model that was read back computes something else.
        FileExistsError: `out` exists.
        FileNotFoundError: there is no such model.
    """
    for name in ("model", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name}: expected a path, got none; say saap export MODEL OUT --format {config.format}")
    source = resolve(config.model)
    if config.teacher:
        teacher = resolve(config.teacher)
    else:
        teacher = None
    if config.format == "gguf":
        need("gguf", "format gguf")
    if (config.format == "gguf") != (Path(config.out).suffix == ".gguf"):
        raise ValueError(f"out: expected a name.gguf for format gguf alone, got {config.out} for {config.format}")
    with staged(config.out) as out:
        return _export(config, source, teacher, out.expanduser(), track)


def _export(config: ExportConfig, source: Path, teacher: Path | None, out: Path, track: Track) -> Exported:
    """Do what `export_model` does, to a path of this machine."""
    notes: list[str] = []
    with new_output(out, "the model", suffix=".gguf" if config.format == "gguf" else None) as place:
        with step(track, "load the model"):
            model = load_model(source)
            tokenizer = None
            with contextlib.suppress(FileNotFoundError):
                tokenizer = load_tokenizer(source)
            if tokenizer is None:
                notes.append(f"{source} has no tokenizer, so there is none in what was written either")
            origin = origins.origin_of(config.model, source)
        written = model
        quantization = quantization_of(model)
        blocks = quantization is not None and config.format == "gguf" and not config.dequantize
        if blocks:
            notes.append("quantised matrices are Q4_1: their integers as they are, scales and offsets in float16")
        elif quantization is not None:
            written = dequantized(model)
            bits = quantization.bits
            notes.append(
                f"matrices of {bits} bits were dequantised to {config.dtype}, so the model is no smaller there"
            )
        if config.format not in ("ragged", "gguf"):
            layers = len(written.spec.layers)
            written = without_empty_layers(written)
            if gone := layers - len(written.spec.layers):
                notes.append(f"left out, computing nothing: {plural(gone, 'layer')} without heads and channels")
        positions = model.constants.max_positions
        if config.format == "gguf":
            from saap_jax.export.gguf_file import context_of

            positions = context_of(model.constants)
        tokens = sample_tokens(tokenizer, model.spec.vocab, positions)
        beside = None if teacher is None else load_model(teacher)
        if beside is not None and beside.spec.vocab != model.spec.vocab:
            raise ValueError(
                f"teacher: expected a model of {model.spec.vocab:,} words, as the one that is exported, got "
                f"{beside.spec.vocab:,} in {config.teacher}"
            )
        if beside is not None and quantization_of(beside) is not None:
            beside = dequantized(beside)
        with step(track, "write"):
            kind, added, more = _write(config, written, tokenizer, source, place, beside)
            notes += more
        with step(track, "read back and compare"):
            if beside is not None:
                check_agreement(beside, load_model(place / TEACHER), tokens, config.dtype)
            agreement = check_agreement(model, load_model(place), tokens, config.dtype, blocks=blocks)
            parameters = (count_parameters(model), count_written(place))
            if place.is_dir():
                if config.format == "maxtext":
                    loader = "maxtext"
                else:
                    loader = loader_of(read_object(place / "config.json"))
                made = origin_step(config, parameters, tuple(notes))
                write_further(origins.files_of(origin, made, loader, out.name), place)
            if tokenizer is not None:
                check_tokenizer(tokenizer, load_tokenizer(place), str(out))
    files = [file for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return Exported(kind, parameters[0], added, parameters[1], size, agreement, tuple(notes))


def count_written(place: Path) -> int:
    """Count the parameters in a GGUF file, the safetensors files of a directory, or a checkpoint of MaxText."""
    if place.is_file():
        import gguf

        from saap_jax.llama.files.gguf import ROPE_FACTORS

        tensors = gguf.GGUFReader(place).tensors
        return sum(int(tensor.n_elements) for tensor in tensors if tensor.name != ROPE_FACTORS)
    trainers = wing("trainers_read")
    items = trainers.item_of(place, trainers.ITEMS)
    if items is not None:
        return sum(array.size for array in trainers.arrays_of(items).values())
    total = 0
    for path in place.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _write(
    config: ExportConfig, model: Llama, tokenizer: Tokenizer | None, source: Path, place: Path, teacher: Llama | None
) -> tuple[str, int, tuple[str, ...]]:
    """Write one format; tell what it is called, the parameters added, and notes."""
    if config.format == "gguf":
        return _write_gguf(config, model, tokenizer, source, place)
    if config.format == "maxtext":
        return _write_maxtext(config, model, tokenizer, place, teacher)
    generation = source / "generation_config.json"
    about = None
    if config.format == "tunix":
        about = wing("trainers_write").configuration(model.spec)
        found = wing("trainers_write").departures(model.spec)
        if found and not config.anyway:
            raise ValueError(f"format tunix: {'; '.join(found)}; say --anyway to write it all the same")
    added = write_hf(
        model,
        place,
        "hf" if config.format == "tunix" else config.format,
        jnp.dtype(config.dtype),
        tokenizer=tokenizer,
        generation=generation if generation.is_file() else None,
    )
    if about is not None:
        write_json(about, place / TUNIX)
        departures = wing("trainers_write").departures(model.spec)
        return f"{model.constants.traits.architecture} for {about['module']}", added, departures
    if config.format in TRAVELS:
        how = {"ragged": "load it in transformers with trust_remote_code=True"}
        how |= {"nas": f"serve it with vllm serve {shlex.quote(config.out)} --trust-remote-code"}
        notes = tuple(filter(None, (how[config.format], width_note(model.spec))))
        return TRAVELS[config.format]["architectures"][0], added, notes
    return model.constants.traits.architecture, added, ()


def _write_gguf(
    config: ExportConfig, model: Llama, tokenizer: Tokenizer | None, source: Path, place: Path
) -> tuple[str, int, tuple[str, ...]]:
    """Write a GGUF file with the vocabulary of the source, or one made of its tokenizer."""
    from saap_jax.export.gguf_file import context_of, write_gguf
    from saap_jax.export.gguf_vocabulary import copied_vocabulary, lost, no_vocabulary, vocabulary_of

    vocabulary = no_vocabulary()
    notes = ()
    if source.is_file():
        vocabulary = copied_vocabulary(source)
    elif tokenizer is not None:
        vocabulary = vocabulary_of(tokenizer, model.spec.vocab, model.constants)
        notes = lost(tokenizer, model.constants)
    name = Path(config.out).stem
    written = write_gguf(model, place, config.dtype, name=name, vocabulary=vocabulary)
    if written.wider:
        notes += (f"{written.wider} matrices are F16: their rows are no multiple of 32",)
    if written.added and model.constants.traits.gguf.equal_layers:
        notes += (f"llama.cpp has only equal layers of {written.architecture}, so narrower ones got zeros",)
    if (positions := context_of(model.constants)) < model.constants.max_positions:
        notes += (
            f"llama.cpp has no sliding window here, so the context ends where that begins, at {positions} tokens",
        )
    return f"GGUF, architecture {written.architecture}", written.added, notes


def _write_maxtext(
    config: ExportConfig, model: Llama, tokenizer: Tokenizer | None, place: Path, teacher: Llama | None
) -> tuple[str, int, tuple[str, ...]]:
    """Write a checkpoint of MaxText, perhaps its teacher's beside it, what reads them back, and what MaxText takes."""
    trainers = wing("trainers_write")
    checkpoints = wing("trainers_read")
    remote = is_remote(config.out)
    if remote:
        where = config.out.rstrip("/")
    else:
        where = str(Path(config.out).expanduser().absolute())
    student = trainers.Side(model.spec, where)
    other = None
    if teacher is not None:
        other = trainers.Side(teacher.spec, f"{where}/{TEACHER}")
    # transformers reads the config.json beside a tokenizer, and refuses numbers of heads that pruning may leave
    words = None
    if not (remote or tokenizer is None):
        words = (other or student).place
    settings = trainers.settings_of(student, other, words)
    for each, directory in ((model, place), (teacher, place / TEACHER)):
        if each is not None:
            checkpoints.write_maxtext(each, directory, jnp.dtype(config.dtype))
            write_json(config_from_spec(each.spec, config.dtype), directory / "config.json")
            if tokenizer is not None:
                write_tokenizer(tokenizer, directory)
    (place / MAXTEXT).write_text(settings, encoding="utf-8")
    launch = "python3 -m maxtext.trainers.post_train.distillation.train_distill "
    launch += shlex.quote(f"{config.out}/{MAXTEXT}")
    notes = (f"distil with {launch} run_name=NAME base_output_directory=DIR, and what names your text",)
    if teacher is None:
        notes += (f"{MAXTEXT} lacks its teacher: export again with --teacher and the unpruned model",)
    elif len(teacher.spec.layers) != len(model.spec.layers):
        notes += ("whole layers went, so MaxText can compare logits, but not features of layers: leave distill_beta 0",)
    return f"MaxText, decoder block {checkpoints.BLOCKS[model.constants.family]}", 0, notes


def sample_tokens(tokenizer: Tokenizer | None, vocab: int, max_positions: int) -> Int[np.ndarray, "1 seq"]:
    """Make tokens to compare on, int32: of `TEXT`, or at random (always the same) without a tokenizer."""
    length = min(LENGTH, max_positions)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocab, (1, length), np.int32)
    ids = tokenizer.encode(TEXT, truncation=True, max_length=length)
    if max(ids) >= vocab:
        raise ValueError(
            f"tokenizer: expected token ids below the model's {vocab} embeddings, got {max(ids)}; "
            "give the tokenizer that belongs to the model"
        )
    return np.asarray([ids], np.int32)


def check_agreement(
    source: Llama, exported: Llama, tokens: Int[np.ndarray, "1 seq"], dtype: str, *, blocks: bool = False
) -> Agreement:
    """Compare two models on tokens, int32; `dtype` names the type of the exported weights.

    `blocks` says that quantised matrices were written as Q4_1, whose scales are float16.

    Raises:
        ValueError: the deviation is above `TOLERANCES[dtype]`.
    """
    forward = jax.jit(lambda model, tokens: model(tokens))
    logits = np.asarray(forward(source, jnp.asarray(tokens)), np.float64)
    others = np.asarray(forward(exported, jnp.asarray(tokens)), np.float64)
    difference = np.abs(logits - others)
    agreement = Agreement(
        tokens=tokens.size,
        largest=float(difference.max()),
        deviation=float(np.sqrt(np.mean(difference**2)) / max(logits.std(), 1e-12)),
        argmax=float(np.mean(logits.argmax(-1) == others.argmax(-1))),
        tolerance=max(TOLERANCES[dtype], TOLERANCES["q4_1"] if blocks else 0.0),
    )
    if not agreement.deviation <= agreement.tolerance:
        raise ValueError(
            f"export: expected the logits of the written model within {agreement.tolerance:g} of the source's spread "
            f"({dtype}), got {agreement.deviation:.2g} on {agreement.tokens} tokens; nothing was kept: "
            "choose a wider --dtype"
        )
    return agreement


def check_tokenizer(source: Tokenizer, exported: Tokenizer, where: str) -> None:
    """Raise `ValueError` unless both tokenizers encode `TEXT` and some hard spans of text alike."""
    for text in (TEXT, "  two  spaces,\ttabs\n\n\nand lines \n", "naïve café — 東京 🙂 e\u0301", "1234567.89 'll I'VE"):
        expected = source.encode(text)
        got = exported.encode(text)
        if expected != got:
            raise ValueError(
                f"{where}: expected the tokenizer that was written to encode {text[:20]!r} as {expected[:12]}, "
                f"got {got[:12]}; export with --format ragged or padded instead, which copy the tokenizer's files"
            )


def origin_step(config: ExportConfig, parameters: tuple[int, int], notes: tuple[str, ...]) -> OriginStep:
    """Write the step of `saap export`."""
    words = options(dataclasses.asdict(config), ExportConfig(model=config.model, out=config.out))
    facts = {"format": config.format, "dtype": config.dtype, "notes": "; ".join(notes)}
    command = " ".join(["saap export", *map(shlex.quote, (config.model, config.out)), *words])
    return OriginStep(kind="export", command=command, model=config.model, parameters=parameters, facts=facts)


def shown(config: ExportConfig, exported: Exported) -> Iterator[Any]:
    """Show what was written, and how its logits compare with the source's."""
    agreement = exported.agreement
    share = f"{agreement.deviation:.2g} of their spread (accepted for {config.dtype}: {agreement.tolerance:g})"
    rows = [
        ("parameters", f"{exported.parameters:,}"),
        ("parameters in the files", f"{exported.written:,}"),
        ("zeros added by the format", f"{exported.added:,} ({exported.added / exported.parameters:.1%})"),
        ("bytes", f"{exported.bytes:,}"),
        (f"logits on {agreement.tokens} tokens", f"largest difference {agreement.largest:.2g}"),
        ("  root mean square", share),
        ("  same most likely token", f"{agreement.argmax:.1%}"),
    ]
    yield text_table(exported.kind, (), rows, words=2)
    yield from (Code("", note) for note in exported.notes)
    yield {"model": config.out}
