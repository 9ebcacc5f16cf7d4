"""The peak memory of one training step in a process of its own: resident bytes, with weights and their gradients.

Arguments: a JSON object with model, way (plain, checkpointing, windowed), length, window, autocast, holds_gradients.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm.head_loss import causal_lm_loss
from lightning_llm.windowed import windowed_loss


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def make(fields, case):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).train()
    if case["way"] == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def step(model, length, window, case):
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    with torch.autocast("cpu", torch.bfloat16, enabled=case["autocast"]):
        if case["way"] == "windowed":
            loss = windowed_loss(model, ids, ids, window=window)
        else:
            loss = causal_lm_loss(model, {"input_ids": ids, "use_cache": False}, ids, loss_kernel="chunked")
    loss.mean.backward()


case = json.loads(sys.argv[1])
torch.set_num_threads(1)
step(make({**case["model"], **case["smaller"]}, case), 64, 16, case)  # what is loaded at first use is no part of a step
model = make(case["model"], case)
if case["holds_gradients"]:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0)
gc.collect()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
step(model, case["length"], case["window"], case)
held = sum(p.nbytes for p in model.parameters()) * (2 if case["holds_gradients"] else 1)
print(json.dumps(resident("VmHWM") - before + held))
