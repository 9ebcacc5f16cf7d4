"""Adapters over two ranks: DDP and FSDP2 train as one process does on whole batches, and save the same folders."""

import pytest
import torch
from adapter_models import METHODS, save_base
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import AutoPeftModelForCausalLM
from support import TINY_GPT2

from lightning_llm import LLMModule
from lightning_llm.adapters import check_sharding
from lightning_llm.partial_checkpoint import check_strategy


@pytest.mark.parametrize(
    ("sharded", "methods"),
    [(False, ["AdaLoRA", "prefix tuning"]), (True, ["LoRA", "DoRA", "IA3", "LoRA and head"])],
    ids=["DDP", "FSDP2"],
)
def test_two_ranks_train_an_adapter_as_one_process_does(sharded, methods, run_ranks, tmp_path):
    folder = tmp_path / "adapters-2"
    folder.mkdir()
    save_base(folder / "base", TINY_GPT2)
    for result in run_ranks("adapters", 2, methods=methods, sharded=sharded):
        for method in methods:
            assert result[method]["error"] < 1e-10, method
            assert result[method]["resumed"], method
            assert result[method]["sharded"] is sharded
    for method in methods:
        held = torch.load(folder / f"{method}.ckpt", weights_only=True)["state_dict"]
        assert not any("base_layer" in key or "word_embeddings" in key for key in held), method
        loaded = LLMModule.load_from_checkpoint(folder / f"{method}.ckpt", weights_only=True).eval()
        exported = AutoPeftModelForCausalLM.from_pretrained(folder / f"export-{method}" / "last", dtype="float64")
        ids = torch.tensor([[5, 6, 7]])
        assert torch.allclose(exported.eval()(ids).logits, loaded.model(ids).logits, rtol=0, atol=1e-6), method


def test_shards_in_a_folder_hold_all_or_nothing():
    with pytest.raises(ValueError, match="save_distributed_checkpoint=False"):
        check_strategy(ModelParallelStrategy())
    check_strategy(ModelParallelStrategy(save_distributed_checkpoint=False))


@pytest.mark.parametrize("method", ["AdaLoRA", "prompt tuning", "prefix tuning"])
def test_what_cannot_be_sharded_is_refused(method):
    with pytest.raises(ValueError, match="does not work with parameters that are sharded over ranks"):
        check_sharding(METHODS[method], None)
    with pytest.raises(ValueError, match="Training of single tokens does not work"):
        check_sharding({**METHODS["LoRA"], "trainable_token_indices": [5]}, None)
    check_sharding(METHODS["LoRA"], None)
    with pytest.raises(ValueError, match="A quantised model does not work"):
        check_sharding(None, {"quant_method": "torchao"})
