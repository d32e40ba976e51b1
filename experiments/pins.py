"""Pin what must not move while code moves: run a few commands, and keep or compare what they find.

    python experiments/pins.py record FILE [PIN ...]
    python experiments/pins.py check FILE [PIN ...]

Commands run in an empty directory, so what is imported is the installed package, or that of PYTHONPATH. Numbers belong
to the kind of CPU and the version of XLA that made them: `experiments/pins.json` is of x86-64 with AVX-512 and the lock
file. Elsewhere, `record` on the parent commit makes them. `arena` reads texts of SAAP_DATA, and where that is not set
of the package, under another name. `check` ends with code 1 and says what moved: numbers by more than TOLERANCE, all
else by anything. With JAX_COMPILATION_CACHE_DIR set a second run takes a fraction of the time.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 2e-5
"""Relative, of losses in float32: what another order of a sum changes, and less than a digit of any table."""

# --- what names commands and options: the only part that follows when they change --------------------

FEW = (
    "--calibration.length 32 --calibration.batch-size 2 --calibration.examples 8 --evaluation.windows 8 "
    "--evaluation.length 32 --new-tokens 0"
)
PLAIN_AND_REFITTED = " ".join(
    f"{name} '{name}-refit = {name} > uniform > least_squares(damping=0.1)'" for name in ("wanda", "{second}")
)
ALL = (
    "random magnitude taylor_vector taylor_element gate_taylor gate_fisher wanda fluctuation blockpruner fast "
    "default evopress fasp-mlp flap gisp grasprune llm-pruner-param-first "
    "llm-pruner-param-mix llm-pruner-param-second llm-pruner-vectorize minitron modegpt-mlp "
    "osscar saap saap-no-stability saap-stable-goes shortened-llama-ppl "
    "shortened-llama-taylor shortgpt sleb slimgpt two-ssp wanda-sp ziplm-no-search"
)
"""The estimators of the quickstart, and every recipe that chooses units."""
CHOICES = {
    "fasp-mlp": "wanda > within(max_ratio={{attention: 0}}) > uniform > layerwise(wanda)",
    "modegpt-mlp": "block_influence(granularity=layer) > within(max_ratio={{attention: 0}}) > softmax(0.1) > "
    "layerwise(leverage)",
    "osscar": "obs > uniform(floor=True) > layerwise(obs_swaps)",
    "slimgpt": "obs > log > layerwise(obs)",
}
"""What published methods choose by, before a refit."""
WITH_LEAST_SQUARES = {
    name: f"'{name}-our-repair = {chain} > least_squares(tokens=equal)'" for name, chain in CHOICES.items()
}
PROTECTED = " ".join(f"'{name} = {name} > within(protect=(0.13, -0.07)) > uniform'" for name in ALL.split()[:8])
COMMANDS = {
    "quickstart": "compare quickstart --calibration.examples 4 --evaluation.windows 8 --no-race --no-cut "
    f"--methods {PROTECTED}",
    "arena": f"compare fast {WITH_LEAST_SQUARES['modegpt-mlp']} llm-pruner-param-second --name arena --ratios 0.2 0.5 "
    "--calibration.examples 8 --calibration.batch-size 2 --evaluation.windows 8 --new-tokens 0",
    "recipes": f"compare {ALL} {' '.join(WITH_LEAST_SQUARES.values())} --name recipes --model.name tiny "
    f"--ratios 0.2 0.3 {FEW}",
    "prune": "prune --model.name tiny --ratio 0.2 --out pruned --no-judge --calibration.examples 8 "
    "--calibration.length 32 --calibration.batch-size 2 --method 'fused > within(protect=(0.13, -0.07), "
    "attention=0.25, attention_from=0.3, multiple_of={{mlp: 4}}) > uniform > rounds(0.1) > least_squares'",
    "recover": "recover pruned --name recover --dense tiny --new-tokens 0 --method.group-size 4 --method.rank 2 "
    "--data.length 32 --training.batch-size 4 --training.max-steps 6 --training.warmup 1 --training.check-every 3 "
    "--training.learning-rate 1e-2 --training.distillation 0.5 --evaluation.windows 8 --evaluation.length 32",
    "export": "export {model} out/{name} --format {format}",
    "discover": "discover pinned.py:{name}",
    "traced": f"compare pinned.py:{{name}} {PLAIN_AND_REFITTED} --name {{name}} --ratios 0.2 0.4 --new-tokens 0 "
    "--calibration.batch-size 2 --evaluation.batch-size 2 --model.norms --model.refused",
    "alone": f"compare {PLAIN_AND_REFITTED} --name alone --model.name tiny --ratios 0.3 {FEW}",
}
TEXTS = (
    "--calibration.scenarios c4=jsonl:text/c4_en_300docs.jsonl#text --evaluation.in-domain ptb:ptb/train.txt "
    "--evaluation.out-of-domain wikitext:wikitext2/train_partial.txt"
)
MESH = "--name mesh --mesh.data 4 --mesh.fsdp 2 --calibration.batch-size 8 --evaluation.batch-size 8"
FORMATS = {"hf": "tiny", "padded": "pruned", "ragged": "pruned", "gguf": "pruned", "tunix": "tiny", "maxtext": "tiny"}
"""And of which model: some formats know only layers that are alike."""
TRACED = ("gpt2", "convnet", "moe")
"""Of tests/models_for_tracing.py."""


def saap(command: str, further: str = "", **values: str) -> str:
    """Run a command of COMMANDS, and return what it prints."""
    words = shlex.split(f"{COMMANDS[command]} {further}".format(**values))
    ran = subprocess.run([sys.executable, "-m", "saap_jax", *words], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"saap {' '.join(words)}: ended with code {ran.returncode}\n{ran.stderr[-4000:]}")
    return ran.stdout


def losses_of(run: str) -> dict[str, Any]:
    """Read of a comparison, of each candidate: units that stay, parameters, mean and worst loss of each text."""
    place = Path("runs") / run
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    dense = json.loads((place / "run.json").read_text())["dense"] | {"candidate": "dense"}
    found = {}
    for row in [dense, *rows]:
        kept = {name: "/".join(map(str, units)) for name, units in row.get("kept", {}).items()}
        losses = [of(each) for each in row["losses"].values() for of in (np.mean, np.max)]
        found[row["candidate"]] = [kept, row["parameters"], *losses]
    return found


def recovered(run: str) -> dict[str, Any]:
    """Read of a recovery's directory the perplexities of the unpruned model, before and after."""
    record = json.loads((Path("runs") / run / "run.json").read_text())
    return {when: list(record[when]["ppl"].values()) for when in ("dense", "before", "after")}


# --- pins --------------------------------------------------------------------------------------------


def quickstart() -> Any:
    """The eight estimators of the quickstart on SmolLM2-135M, with protected layers."""
    saap("quickstart")
    return losses_of("quickstart")


def arena() -> Any:
    """Three recipes on SmolLM2-135M."""
    data = bool(os.environ.get("SAAP_DATA"))
    saap("arena", TEXTS if data else "")
    return {"texts of SAAP_DATA" if data else "texts of the package": losses_of("arena")}


def recipes() -> Any:
    """Every recipe on a tiny model."""
    saap("recipes")
    return losses_of("recipes")


def pruned() -> Any:
    """A tiny model pruned, recovered, and exported in each format."""
    saap("prune")
    found: dict[str, Any] = {"pruned": digest(tensors_of(Path("pruned")))}
    Path("out").mkdir()
    for form, model in FORMATS.items():
        name = "model.gguf" if form == "gguf" else form
        saap("export", "--anyway" * (form == "tunix"), model=model, name=name, format=form)
        found[form] = digest(tensors_of(Path("out") / name))
    saap("recover")
    return found | {"recovered": recovered("recover")}


def traced() -> Any:
    """Models that have never heard of the library: their structures, and losses of their pruned programs."""
    lines = ["import sys", f"sys.path.append({str(Path(__file__).parent)!r})", "from pins import problem"]
    lines += [f"def {name}(): return problem({name!r})" for name in TRACED]
    Path("pinned.py").write_text("\n".join(lines))
    found = {}
    for name in TRACED:
        cells = [re.findall(r"[^│┃]+", line) for line in saap("discover", name=name).splitlines()]
        rows = [[cell.strip() for cell in row] for row in cells if len(row) == 5]
        saap("traced", name=name, second="gate_taylor")
        found[name] = {"structures": [row[:4] for row in rows if row[0] != "structure"], "losses": losses_of(name)}
    return found


def sharded() -> Any:
    """A job on eight devices that are forced on this CPU finds what one device finds."""
    saap("alone", second="gate_fisher")
    os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "NPROC": "32"}
    saap("alone", MESH, second="gate_fisher")
    del os.environ["XLA_FLAGS"], os.environ["NPROC"]
    if moved := list(differing(losses_of("mesh"), losses_of("alone"), "sharded, against one device")):
        raise SystemExit("\n".join(moved))
    return losses_of("alone")


PINS = {each.__name__: each for each in (quickstart, arena, recipes, pruned, traced, sharded)}

# --- what they run on --------------------------------------------------------------------------------


def tiny(place: Path) -> None:
    """Write a LLaMA of random weights in the format of Hugging Face, whose tokens are bytes."""
    import safetensors.numpy
    import tokenizers

    layers, embed, mlp, queries, keys = 8, 32, 48, 64, 32
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    shapes = {"embed_tokens": (len(letters), embed), "norm": (embed,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}_layernorm": (embed,) for name in ("input", "post_attention")}
        shapes |= {f"layers.{layer}.mlp.{name}_proj": (mlp, embed) for name in ("gate", "up")}
        rows = {"q": queries, "k": keys, "v": keys}
        shapes |= {f"layers.{layer}.self_attn.{name}_proj": (count, embed) for name, count in rows.items()}
        shapes |= {f"layers.{layer}.self_attn.o_proj": (embed, queries), f"layers.{layer}.mlp.down_proj": (embed, mlp)}
    random, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        drawn = random.standard_normal(shape)
        drawn = 1 + 0.2 * drawn if len(shape) == 1 else drawn * (4.5 if name == "embed_tokens" else 1.5)
        tensors[f"model.{name}.weight"] = (drawn * shape[1] ** -0.5 if len(shape) > 1 else drawn).astype(np.float32)
    place.mkdir()
    safetensors.numpy.save_file(tensors, place / "model.safetensors")
    config = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "head_dim": 8}
    config |= {"architectures": ["LlamaForCausalLM"], "hidden_size": embed, "intermediate_size": mlp}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": layers}
    config |= {"vocab_size": len(letters), "max_position_embeddings": 512, "tie_word_embeddings": True}
    (place / "config.json").write_text(json.dumps(config))
    numbers = {letter: number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(numbers, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def problem(name: str, count: int = 6) -> Any:
    """Draw parameters, examples and targets for a model of tests/models_for_tracing.py."""
    import jax

    from saap_jax import Problem

    sys.path.append(str(Path(__file__).parent.parent))  # behind the package's own
    from tests.models_for_tracing import EXAMPLES

    example, random = EXAMPLES[name](), np.random.default_rng(0)

    def parameter(path: Any, leaf: Any) -> Any:
        drawn = 0.5 * random.standard_normal(leaf.shape)
        return (np.abs(drawn) + 0.5 if "variance" in jax.tree_util.keystr(path) else drawn).astype(np.float32)

    def examples(leaf: Any) -> Any:
        shape = (2 * count, *leaf.shape[1:])
        return (
            random.integers(0, 8, shape, np.int32)
            if leaf.dtype == np.int32
            else parameter((), leaf.update(shape=shape))
        )

    params, inputs = jax.tree.map_with_path(parameter, example.params), tuple(map(examples, example.inputs))
    both = inputs, examples(jax.eval_shape(example.function, params, *inputs))
    halves = [jax.tree.map(lambda leaf, part=part: leaf[part], both) for part in (slice(count), slice(count, None))]
    square = lambda outputs, targets: ((outputs - targets) ** 2).mean()  # noqa: E731
    return Problem(function=example.function, params=params, loss=square, calibration=halves[0], held_out=halves[1])


def tensors_of(path: Path) -> Mapping[str, np.ndarray]:
    """Read the tensors of an export by the library of its format."""
    if path.suffix == ".gguf":
        import gguf

        return {each.name: np.asarray(each.data) for each in gguf.GGUFReader(path).tensors}
    if found := sorted(path.glob("*.safetensors")):
        import safetensors.numpy

        return {name: each for file in found for name, each in safetensors.numpy.load_file(file).items()}
    import jax
    import orbax.checkpoint as ocp

    (items,) = path.rglob("items")
    tree = ocp.PyTreeCheckpointer().restore(items.absolute())
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in jax.tree.leaves_with_path(tree)}


def digest(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return digests of the names and shapes of tensors and of their bits, their sum, and the root of their squares."""
    ordered = sorted(tensors.items())
    shapes = "".join(f"{name} {each.shape} {each.dtype}\n" for name, each in ordered).encode()
    bits = b"".join(np.ascontiguousarray(each).tobytes() for _, each in ordered)
    found: dict[str, Any] = {
        name: hashlib.sha256(of).hexdigest()[:16] for name, of in (("shapes", shapes), ("bits", bits))
    }
    found["sum"] = sum(float(each.astype(np.float64).sum()) for _, each in ordered)
    return found | {"root": math.sqrt(sum(float(np.square(each, dtype=np.float64).sum()) for _, each in ordered))}


# --- comparing ---------------------------------------------------------------------------------------


def differing(found: Any, expected: Any, place: str) -> Iterator[str]:
    """Yield where two values differ by more than is allowed; bits may, where the numbers agree."""
    if isinstance(expected, dict) and isinstance(found, dict) and found.keys() == expected.keys():
        for key in expected.keys() - {"bits"}:
            yield from differing(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            yield from differing(*pair, f"{place}/{number}")
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=1e-9):
            yield f"{place}: {found!r}, expected {expected!r}"
    elif found != expected:
        yield f"{place}: {found!r}, expected {expected!r}"


def main() -> None:
    """Record, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("pins", nargs="*", help=", ".join(PINS))
    arguments = parser.parse_args()
    path = arguments.file.absolute()
    known = json.loads(path.read_text()) if path.exists() else {}
    os.environ |= {"COLUMNS": "200", "JAX_PLATFORMS": "cpu"}
    moved = []
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        tiny(Path("tiny"))
        for name in arguments.pins or PINS:
            start, found = time.monotonic(), json.loads(json.dumps(PINS[name]()))
            if arguments.what == "record":
                known[name] = known.get(name, {}) | found if name == "arena" else found
                path.write_text(json.dumps(known, separators=(",", ":"), sort_keys=True) + "\n")
                said = "recorded"
            else:
                expected = {key: known[name].get(key) for key in found} if name == "arena" else known.get(name)
                here = list(differing(found, expected, name))
                said = (
                    "\n".join([*here, f"{len(here)} moved"])
                    if here
                    else f"as it was{', bits too' * (found == expected)}"
                )
                moved += here
            print(f"{name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
    raise SystemExit(bool(moved))


if __name__ == "__main__":
    main()
