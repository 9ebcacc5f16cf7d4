"""Sharded set-up on the meta device: the weights, the steps and the exports of an unsharded run."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.sharding import mesh_to_shard


@pytest.mark.parametrize("pretrained", [False, True])
def test_fsdp2_training_with_a_resume_equals_one_process_without(run_ranks, tiny_gpt2, tmp_path, pretrained):
    options = {"model": tiny_gpt2}  # tied embeddings; buffers that no state dict holds
    if pretrained:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2), dtype=torch.float64)
        model.save_pretrained(tmp_path / "weights")
        options["weights"] = str(tmp_path / "weights")
    first, second = run_ranks("fsdp_module", 2, **options)
    assert first["sharded"] == first["parameters"] > 10
    assert first["error"] < 1e-11  # six steps of Adam amplify the rounding of the first
    assert first["val/loss"] == second["val/loss"] == pytest.approx(first["single val/loss"], rel=1e-12)
    assert first["export equal"]
    assert first["checkpoint equal"]
    assert first["total_tokens"] == second["total_tokens"] == 2 * 12 * 11


def test_rotary_buffers_reach_every_rank(run_ranks, tiny_llama):
    """Llama's rotary frequencies are computed at construction; on the meta device they would be garbage."""
    first, second = run_ranks("fsdp_module", 2, model=tiny_llama)
    assert first["error"] < 1e-6  # Llama is float32 inside
    assert first["val/loss"] == second["val/loss"]


def test_built_model_under_a_sharded_strategy_is_refused(tiny_gpt2):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_gpt2))
    with pytest.raises(ValueError, match="builds the model itself, on the meta device"):
        mesh_to_shard(None, model, shares_rows=False)
