"""Attention document by document equals attention under the block mask, in the logits and in the gradient."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.packed_attention import PACKED_SDPA, document_starts

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": SMALL | {"num_key_value_heads": 2},
    "gpt_neox": SMALL,
    "mistral": SMALL | {"num_key_value_heads": 2, "sliding_window": 8},
}
DOCUMENTS = ((40,), (13, 1, 26), (7, 20, 13))


def outputs(name, implementation, **inputs):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=50, pad_token_id=0, bos_token_id=0, eos_token_id=0, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().train()
    logits = model(**inputs, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
def test_packed_attention_equals_attention_under_the_block_mask(name):
    ids = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
    truth = outputs(name, "sdpa", input_ids=ids, position_ids=positions)
    ours = outputs(name, PACKED_SDPA, input_ids=ids, position_ids=positions)
    leaking = outputs(name, "sdpa", input_ids=ids)
    for a, b, wrong in zip(ours, truth, leaking, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert (wrong - b).abs().max() > 1e-3  # a control: documents that see each other are told apart


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_go_the_usual_way(name):
    ids = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    truth = outputs(name, "sdpa", input_ids=ids, attention_mask=mask)
    ours = outputs(name, PACKED_SDPA, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(ours, truth, rtol=0, atol=0)


def test_the_mask_of_packed_rows_is_linear_in_their_length():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]])

    def same_document_and_causal(batch, head, query, key):
        return (documents[batch, query] == documents[batch, key]) & (key <= query)

    starts = document_starts(1, 6, 6, mask_function=same_document_and_causal, allow_is_causal_skip=False)
    assert starts.tolist() == [[[[True, False, False, True, False, True]]]]


def test_llm_module_uses_it_on_a_cpu_and_leaves_no_trace_of_it_in_what_it_saves(quiet_trainer, tiny_llama, tmp_path):
    from support import dataset_of

    from lightning_llm import LLMModule
    from lightning_llm.callbacks import HuggingFaceCheckpoint
    from lightning_llm.datamodules.batches.plan import RowPlan
    from lightning_llm.datamodules.loader import RowLoader
    from lightning_llm.datamodules.order import TableOrder

    dataset = dataset_of([9, 20, 5, 12, 30, 3] * 4, 32, "packed")
    module = LLMModule(tiny_llama)
    trainer = quiet_trainer(max_steps=2, callbacks=[HuggingFaceCheckpoint(tmp_path / "export")])
    trainer.fit(module, RowLoader(dataset, RowPlan(TableOrder(len(dataset)), 2)))
    assert module.model.config._attn_implementation == PACKED_SDPA
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert PACKED_SDPA.encode() not in (tmp_path / "run.ckpt").read_bytes()
    for file in (tmp_path / "export" / "last").glob("*.json"):
        assert PACKED_SDPA not in file.read_text()
    asked = LLMModule(tiny_llama, attn_implementation="eager")
    quiet_trainer(max_steps=1).fit(asked, RowLoader(dataset, RowPlan(TableOrder(len(dataset)), 2)))
    assert asked.model.config._attn_implementation == "eager"
