"""Adapters, frozen parts, checkpointed layers, low precision; what cannot be cut is refused."""

import peft
import pytest
import torch
from packed_models import CONFIGS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from windowed_models import (
    LINEAR,
    batch_of,
    build,
    full_float64,
    gradients,
    to_dtype,
    total_error,
    uncut,
    windowed,
    worst_error,
)

from lightning_llm.sequence_windows.linear_states import LinearStateLayer
from lightning_llm.windowed import UnsupportedModelError, windowed_loss

EXACT = 1e-12


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    full_float64(monkeypatch)


def with_lora(model, **options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return to_dtype(adapted, torch.float64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_adapters_get_the_uncut_gradient_and_the_rest_none(family):
    model = with_lora(build(family))
    ids, labels = batch_of()
    _, truth = uncut(model, ids, labels)
    for when in ("forward", "backward"):
        _, grads = windowed(model, ids, labels, window=8, when=when)
        assert worst_error(grads, truth) < EXACT
    assert {name for name, grad in grads.items() if grad is not None} == {name for name in grads if "lora" in name}


def test_parts_may_be_frozen():
    model = build("llama")
    ids, labels = batch_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1" in name or name.startswith("model.norm")
    _, truth = uncut(model, ids, labels)
    assert worst_error(windowed(model, ids, labels, window=8)[1], truth) < EXACT
    model.requires_grad_(False)
    assert not windowed_loss(model, ids, labels, window=8).total.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_layers_may_be_checkpointed_within_windows(family):
    model = build(family)
    ids, labels = batch_of()
    _, truth = uncut(model, ids, labels)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for when, keep in (("forward", 1), ("backward", 0), ("forward", 3)):
        assert worst_error(windowed(model, ids, labels, window=8, when=when, keep=keep)[1], truth) < EXACT
    layers = [module for module in model.modules() if hasattr(module, "_can_checkpoint_with_cache")]
    assert layers
    assert not any(layer._can_checkpoint_with_cache for layer in layers)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        windowed_loss(model, ids, labels, window=8)


def test_a_loss_may_be_scaled_and_added_to_others():
    model = build("llama_tied")
    ids, labels = batch_of()
    _, truth = uncut(model, ids, labels)
    extra = model.lm_head.weight.square().sum()
    (expected,) = torch.autograd.grad(extra, model.lm_head.weight)
    truth = {name: 3 * grad + (expected if "embed_tokens" in name else 0) for name, grad in truth.items()}
    for when in ("forward", "backward"):
        model.zero_grad()
        loss = windowed_loss(model, ids, labels, window=8, when=when).mean
        (3 * loss + model.lm_head.weight.square().sum()).backward()
        assert worst_error(gradients(model), truth) < EXACT


def test_hooks_of_a_parameter_fire_once():
    model = build("llama")
    ids, labels = batch_of()
    fired = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    for when in ("forward", "backward"):
        fired.clear()
        windowed(model, ids, labels, window=8, when=when)
        assert len(fired) == len({id(p) for p in fired}) == len(list(model.parameters()))


def test_accumulation_with_clipping_ends_at_the_same_weights():
    batches = [batch_of(rows=1, length=length, seed=length) for length in (37, 20, 9, 30)]

    def train(options):
        model = build("llama_tied")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        norms = []
        for step in (batches[:2], batches[2:]) * 2:
            count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in step)
            for ids, labels in step:
                window = 64 if options is None else 8
                (windowed_loss(model, ids, labels, window=window, **(options or {})).total / count).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
            optimizer.step()
            optimizer.zero_grad()
        assert max(norms) > 0.3
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    truth = train(None)  # one window: the row as it is
    for when in ("forward", "backward"):
        assert (train({"when": when}) - truth).norm() / truth.norm() < EXACT


@pytest.mark.parametrize(
    ("family", "window"), [("llama", 64), ("qwen3", 64), ("gpt2", 64), ("mistral", 64), ("llama", 4), ("gpt2", 4)]
)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_in_bfloat16_it_is_no_worse_than_the_uncut_step(family, window, parameters):
    ids, labels = batch_of(rows=1, length=128)
    _, truth = uncut(build(family), ids, labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        model = build(family, parameters)
        model.set_attn_implementation("sdpa")
        plain = total_error(uncut(model, ids, labels)[1], truth)
        for when in ("forward", "backward") if window == 64 else ("forward",):
            assert total_error(windowed(model, ids, labels, window=window, when=when)[1], truth) < 1.5 * plain


def test_many_windows_in_bfloat16_add_no_error_as_their_gradients_are_summed_in_float32():
    ids, labels = batch_of(rows=1, length=128)
    _, truth = uncut(build("llama"), ids, labels)
    model = build("llama", torch.bfloat16)
    errors = [
        total_error(windowed(model, ids, labels, window=2, gradient_dtype=dtype)[1], truth)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert errors[0] < 0.8 * errors[1]


def assert_refused(model, match, error=UnsupportedModelError):
    ids, labels = batch_of(length=24)
    with pytest.raises(error, match=match) as caught:
        windowed_loss(model, ids, labels, window=8).mean.backward()
    return str(caught.value)


def packed_model(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name]))


@pytest.mark.parametrize("name", ["bloom", "gpt_oss", "falcon"])
def test_models_that_attend_otherwise_are_refused_and_told_what_to_do(name):
    assert "gradient_checkpointing" in assert_refused(packed_model(name), "attend")


def test_encoders_and_encoder_decoders_are_refused():
    bert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **CONFIGS["bert"]))
    assert "gradient_checkpointing" in assert_refused(bert, "encoders, which see a sequence as a whole")
    small = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **small))
    mamba = packed_model("mamba")
    assert "gradient_checkpointing" in assert_refused(mamba, "takes no `past_key_values`")
    assert "gradient_checkpointing" in assert_refused(t5, "encoder-decoder")
    bidirectional = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **CONFIGS["bert"]))
    assert "gradient_checkpointing" in assert_refused(bidirectional, "causal|cache")


@pytest.mark.parametrize("family", LINEAR)
def test_layers_of_linear_attention_hand_on_their_state_and_its_gradient(family):
    model = build(family)
    ids, labels = batch_of(length=34)
    _, truth = uncut(model, ids, labels)
    for window, keep, when in ((16, 1, "forward"), (7, 0, "backward"), (11, 3, "forward")):
        _, grads = windowed(model, ids, labels, window=window, keep=keep, when=when)
        # Qwen3-Next works in chunks from a window's first token; elsewhere they are cut otherwise, and rounded so.
        assert worst_error(grads, truth) < (1e-9 if family == "qwen3_next" else EXACT)
    positions = torch.cat([torch.arange(14), torch.arange(20)])[None]
    with pytest.raises(UnsupportedModelError, match="from one packed document"):
        windowed_loss(model, ids, labels, window=8, position_ids=positions)
    with pytest.raises(ValueError, match="`window` must be at least 2"):
        windowed_loss(model, ids, labels, window=1)
    last = windowed(model, ids[:, :33], labels[:, :33], window=16)[1]  # one token left over
    assert worst_error(last, uncut(model, ids[:, :33], labels[:, :33])[1]) < 1e-9


def test_without_the_gradient_of_the_state_linear_attention_is_wrong(monkeypatch):
    model = build("qwen3_next")
    ids, labels = batch_of(length=34)
    monkeypatch.setattr(LinearStateLayer, "roots", lambda self: [])
    assert worst_error(windowed(model, ids, labels, window=8)[1], uncut(model, ids, labels)[1]) > 0.1


def test_chunked_attention_is_refused():
    small = {**CONFIGS["llama"], "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 16}
    config = AutoConfig.for_model("llama4_text", **small, attention_chunk_size=8)
    assert_refused(AutoModelForCausalLM.from_config(config), "neither causal nor a causal sliding window")


def test_what_depends_on_the_whole_is_refused():
    assert_refused(
        build(
            "llama",
            torch.float32,
            rope_parameters={
                "rope_type": "dynamic",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
        ),
        "change with the length beyond 16",
    )
    mixtral = packed_model("mixtral")
    mixtral.config.output_router_logits = True
    assert_refused(mixtral, "balance of experts")
    small = {
        **CONFIGS["llama"],
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "num_key_value_heads": 2,
    }
    assert_refused(AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **small)), "latent attention")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_refused(peft.get_peft_model(build("llama", torch.float32), prompts), "tokens before the sequence")


def test_wrapped_models_are_refused():
    model = build("llama", torch.float32)
    assert_refused(nn.DataParallel(model), "wrapped in DataParallel", ValueError)
    assert_refused(torch.compile(model), "torch.compile", ValueError)


def test_a_layer_that_leaves_the_cache_out_is_noticed():
    model = build("llama", torch.float32)
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "past_key_values": None})
    assert_refused(model, "Layer|does not attend to what its cache returned")
