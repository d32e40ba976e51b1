"""A directory of format `nas` in vLLM's own DeciLM, on a processor: all tensors are taken, and the logits are ours.

vLLM's attention kernels are compiled for accelerators, so attention is computed by torch here. In an environment with
torch for processors, `pip install --no-deps vllm` and what its import asks for are enough.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from saap_jax.export.hf import write_hf
from tests.export.models import RELATIVES, SPECS
from tests.helpers import forward, random_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("modules_cache")]
torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12), np.int32)
TIED = dataclasses.replace(SPECS["ragged_llama3"], tied=True)


class Attention(torch.nn.Module):
    """Causal attention of one row, `[tokens, heads * head_dim]`."""

    def __init__(self, heads, head_dim, scale, num_kv_heads, **_):
        super().__init__()
        self.heads, self.kv_heads, self.shape, self.scale = heads, num_kv_heads, (-1, head_dim), scale

    def forward(self, query, *others):
        query, key, value = (each.unflatten(-1, self.shape).transpose(0, 1) for each in (query, *others))
        key, value = (each.repeat_interleave(self.heads // self.kv_heads, 0) for each in (key, value))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=self.scale).transpose(0, 1).flatten(1)


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm import distributed
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.models import llama

    llama.Attention = Attention
    config = VllmConfig(compilation_config=CompilationConfig(mode=0, custom_ops=["none"]))
    with set_current_vllm_config(config):
        store = (tmp_path_factory.mktemp("vllm") / "store").as_uri()
        distributed.init_distributed_environment(1, 0, store, 0, backend="gloo")
        distributed.initialize_model_parallel(1, 1)
        yield config


@pytest.mark.parametrize("spec", [SPECS["empty"], TIED, RELATIVES["qwen2-ragged"]], ids=["empty", "tied", "qwen2"])
def test_it_computes_our_logits(spec, vllm_config, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig
    from vllm.model_executor.models.nemotron_nas import DeciLMForCausalLM

    model = random_model(spec)
    write_hf(model, tmp_path, "nas", np.dtype(np.float32))
    said = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    options = {"hf_config": said, "dtype": torch.float32, "head_dtype": torch.float32, "max_model_len": 512}
    object.__setattr__(vllm_config, "model_config", SimpleNamespace(**options, is_moe=False, quantization=None))
    theirs = DeciLMForCausalLM(vllm_config=vllm_config)
    taken = theirs.load_weights(load_file(tmp_path / "model.safetensors").items())
    assert taken == {name for name, _ in theirs.named_parameters()}
    for part in theirs.modules():
        if hasattr(part, "quant_method"):
            part.quant_method.process_weights_after_loading(part)
    with torch.no_grad():
        hidden = [theirs(torch.tensor(row, dtype=torch.long), torch.arange(len(row))) for row in TOKENS]
        logits = np.stack([theirs.compute_logits(each).numpy() for each in hidden])[..., : spec.vocab]
    np.testing.assert_allclose(logits, forward(model, TOKENS), rtol=0, atol=5e-5)
    assert np.abs(logits[::-1] - forward(model, TOKENS)).max() > 0.1, "control"
