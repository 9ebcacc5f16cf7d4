"""Adapters of peft on tiny models, with values that hide no mistake, and peft's own loss in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from support import TINY_GPT2, TINY_LLAMA
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm import LLMModule

LLAMA = {**TINY_LLAMA, "vocab_size": 97}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_type": "LORA", "r": 2},
    "LoRA everywhere": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "lora_dropout": 0.0},
    "DoRA": {"peft_type": "LORA", "r": 2, "use_dora": True},
    "AdaLoRA": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "orth_reg_weight": 0.0},
    "IA3": {"peft_type": "IA3"},
    "prompt tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "p-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "prefix tuning": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "layer norms": {"peft_type": "LN_TUNING"},
    "OFT": {"peft_type": "OFT", "oft_block_size": 4},
    "VeRA": {"peft_type": "VERA", "r": 4},
    "LoHa": {"peft_type": "LOHA", "r": 2},
}
PROMPTS = ("prompt tuning", "p-tuning", "prefix tuning")
BASES = {"llama": LLAMA, "gpt2": TINY_GPT2}
FIXED = {"dtype": "float64", "lr_schedule": "constant", "warmup": 0, "weight_decay": 0.0}


def adapted(method: str, base: Any = None, **options: Any) -> LLMModule:
    """A module with an adapter that has been moved away from where it begins, which is often nowhere."""
    torch.manual_seed(0)
    module = LLMModule(dict(LLAMA) if base is None else base, peft=METHODS[method], **{**FIXED, **options})
    module.configure_model()
    move(module)
    return module


def move(module: Any, by: float = 0.1) -> None:
    """Add noise to what trains."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * by)


def own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What peft's forward returns for labels, without transformers' rounding to float32."""
    base = model.get_base_model()

    def in_float64(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    before = base.loss_function
    base.loss_function = in_float64
    try:
        loss: Tensor = model(**batch).loss
    finally:
        base.loss_function = before
    assert loss.dtype == torch.float64
    return loss


def gradient_of(module: Any, value: Tensor) -> Tensor:
    """Of everything that trains, in one vector."""
    module.zero_grad()
    value.backward()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((found - truth).norm() / truth.norm())


def save_base(folder: Any, base: dict[str, Any] = LLAMA, seed: int = 0) -> str:
    """Write a model of random weights as a folder to start from."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**base)).save_pretrained(folder)
    return str(folder)
