"""What commands are run on: tiny models, texts, tasks and runs. The models are written without `saap_jax`."""

import json
import random
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from tests.fuzz import formats
from tests.fuzz.worker import Outcome, Worker

SPECIAL = ("<|endoftext|>", "<unk>")
EMBED, HEAD_DIM, GROUP = 16, 4, 2
KEPT = {
    "attention": {"units": 2, "kept": [[0, 1], [1]]},
    "mlp": {"units": 24, "kept": [list(range(24)), list(range(3, 20))]},
}
"""What the model of two different layers has of an unpruned one."""

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}the"


def build(place: Path, worker: Worker) -> None:
    """Fill a directory."""
    tokenizer = _tokenizer()
    for name, layers in (("tiny", ((2, 24), (2, 24))), ("sharded", ((2, 24), (2, 24))), ("ragged", ((2, 24), (1, 17)))):
        _model(place / name, layers, tokenizer, shards=2 if name == "sharded" else 1)
    (place / "ragged/keep.json").write_text(json.dumps(KEPT, indent=1))
    _texts(place)
    _ran(worker.run(formats.COMPARE, place))
    unfinished = place / "unfinished"
    shutil.copytree(place / "runs", unfinished)
    record = json.loads((unfinished / "c/run.json").read_text())
    (unfinished / "c/run.json").write_text(json.dumps(record | {"status": "running"}, indent=1))
    shutil.rmtree(unfinished / "c/best")
    _ran(worker.run(formats.SCORE, place))
    _ran(worker.run(("export", "tiny", "tiny.gguf", "--format", "gguf"), place))
    _warm(worker, place)


def _warm(worker: Worker, place: Path) -> None:
    """Have each command's modules, fonts, templates and options ready, by commands that start no backend of jax."""
    scratch = place / "scratch"
    scratch.mkdir()
    shutil.copytree(place / "runs", scratch / "runs")
    (scratch / "limits.toml").write_text(formats.LIMITS)
    for words in (formats.REPORT, formats.AB, formats.GATE):
        worker.warm(words, scratch)
    for words in ((*formats.COMPARE, "--new-tokens"), (*formats.SCORE, "--calibration.examples"),
                  (*formats.RECOVER, "--new-tokens"), ("evaluate", "tiny", *formats.SHOWN, "--windows"),
                  ("prune", "--calibration.examples"), ("generate", "tiny", "the", "--max-new-tokens")):  # fmt: skip
        worker.warm((*words, "-1"), scratch)
    shutil.rmtree(scratch)


def _ran(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err


def _tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"], trainer)
    return tokenizer


def _model(place: Path, layers: Sequence[tuple[int, int]], tokenizer: tokenizers.Tokenizer, *, shards: int) -> None:
    """Write a random model of the given (key/value heads, channels) a layer."""
    place.mkdir()
    vocab, dice = tokenizer.get_vocab_size(), np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, EMBED)}
    for number, (heads, mlp) in enumerate(layers):
        width = heads * HEAD_DIM
        own = {
            "self_attn.q_proj": (GROUP * width, EMBED),
            "self_attn.k_proj": (width, EMBED),
            "self_attn.v_proj": (width, EMBED),
            "self_attn.o_proj": (EMBED, GROUP * width),
            "mlp.gate_proj": (mlp, EMBED),
            "mlp.up_proj": (mlp, EMBED),
            "mlp.down_proj": (EMBED, mlp),
            "input_layernorm": (EMBED,),
            "post_attention_layernorm": (EMBED,),
        }
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in own.items()}
    shapes["model.norm.weight"] = (EMBED,)
    tensors = {
        name: (dice.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype("<f4") for name, shape in shapes.items()
    }
    names = list(tensors)
    files = [names[start::shards] for start in range(shards)]
    for number, held in enumerate(files, start=1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        (place / file).write_bytes(_safetensors({name: tensors[name] for name in held}))
    if shards > 1:
        places = {name: f"model-{n:05}-of-{shards:05}.safetensors" for n, held in enumerate(files, 1) for name in held}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
        (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (place / "config.json").write_text(json.dumps(_config(layers, vocab), indent=1))
    tokenizer.save(str(place / "tokenizer.json"), pretty=False)
    about = {
        "backend": "tokenizers",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[0],
        "unk_token": SPECIAL[1],
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (place / "tokenizer_config.json").write_text(json.dumps(about, indent=1))
    (place / "chat_template.jinja").write_text(TEMPLATE)


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        header[name], end = entry, end + tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.tobytes() for tensor in tensors.values())


def _config(layers: Sequence[tuple[int, int]], vocab: int) -> dict:
    alike = len(set(layers)) == 1
    heads, mlp = zip(*layers, strict=True)
    if alike:
        sizes = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        sizes |= {"num_key_value_heads": heads[0], "num_attention_heads": GROUP * heads[0], "intermediate_size": mlp[0]}
    else:
        sizes = {"model_type": "saap_llama", "num_key_value_heads": list(heads), "intermediate_size": list(mlp)}
        sizes |= {"num_attention_heads": [GROUP * each for each in heads]}
        sizes |= {"query_heads_per_kv_head": [GROUP] * len(layers), "output_biases": False}
    return sizes | {
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": vocab,
        "hidden_size": EMBED,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": len(layers),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
        "use_cache": True,
        "initializer_range": 0.02,
    }


def _texts(place: Path) -> None:
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "the",
        "dog",
        "sat",
        "on",
        "one",
        "log",
        "with",
        "red",
        "big",
        "hats,",
        "then",
        "ran",
    ]
    dice = random.Random(0)

    def text(count: int) -> str:
        return " ".join(dice.choice(words) for _ in range(count)) + ".\n"

    for name in ("evaluation", "calibration", "other"):
        (place / f"{name}.txt").write_text(text(120))
    rows = [{"id": number, "text": text(20), "label": [0.5, None]} for number in range(4)]
    asked = [{"instruction": text(4), "input": text(3) if number % 2 else "", "output": text(6)} for number in range(4)]
    tasks = [
        {
            "id": f"q{number}",
            "context": text(6),
            "choices": [text(2).strip(), text(3).strip(), "cats"],
            "gold": number % 3,
        }
        for number in range(4)
    ]
    for file, lines in (("lines", rows), ("instruct", asked), ("tasks", tasks)):
        (place / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "limits.toml").write_text(formats.LIMITS)
    (place / "mine.py").write_text(formats.CONFIG)
