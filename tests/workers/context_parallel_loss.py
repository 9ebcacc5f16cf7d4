"""Ranks that share rows: loss and gradient of every family against the whole rows in one process."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from windowed_models import batch_of, build, full_float64, gradients, uncut, worst_error

from lightning_llm.context_parallel import attention
from lightning_llm.context_parallel.loss import context_parallel_logits, context_parallel_loss, context_parallel_nll
from lightning_llm.loss import token_nll

LENGTH = 37  # 40 with what two ranks' four chunks are filled up with
PACKED = torch.cat([torch.arange(n) for n in (4, 13, 1, 19)])[None]  # borders inside chunks of 10
LEFT_RIGHT = torch.ones(2, LENGTH, dtype=torch.long)
LEFT_RIGHT[0, 30:], LEFT_RIGHT[1, :5], LEFT_RIGHT[1, 20:] = 0, 0, 0


def shared(model: Any, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> tuple[float, dict[str, Any]]:
    """Mean loss, and the gradients' mean over the ranks."""
    model.zero_grad()
    loss = context_parallel_loss(model, ids, labels, group=dist.group.WORLD, **options)
    loss.mean.backward()
    assert loss.num_tokens.dtype == torch.int64
    return loss.mean.item(), averaged(model)


def averaged(model: Any) -> dict[str, Any]:
    grads = gradients(model)
    for grad in grads.values():
        if grad is not None:
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return grads


def compare(model: Any, ids: Any, labels: Any, truth_inputs: dict[str, Any], **options: Any) -> dict[str, float]:
    value, truth = uncut(model, ids, labels, **truth_inputs)
    found, grads = shared(model, ids, labels, **options)
    return {"loss": abs(found - value) / value, "gradient": worst_error(grads, truth)}


def families() -> Iterator[tuple[str, dict[str, float]]]:
    for family in ("llama", "llama_tied", "llama_mqa", "gpt2", "mistral", "gemma2", "gemma3"):
        model = build(family)
        ids, labels = batch_of()
        yield family, compare(model, ids, labels, {})
        positions = {"position_ids": PACKED.expand(2, -1)}
        yield f"{family} packed", compare(model, ids, labels, positions, **positions)


def layouts() -> Iterator[tuple[str, dict[str, float]]]:
    model = build("llama")
    ids, labels = batch_of()
    masked = labels.masked_fill(LEFT_RIGHT == 0, -100)
    masked[1, 5] = -100  # the first token after padding stands after nothing
    mask = {"attention_mask": LEFT_RIGHT}
    yield "padded", compare(model, ids, masked, mask, **mask)
    for length in (3, 9):  # less than a token to each chunk, and less than a chunk to a rank
        yield f"{length} tokens", compare(model, ids[:, :length], ids[:, :length], {})
    only = torch.full_like(labels, -100)
    only[0, 9] = 5  # the other ranks have no label
    yield "one label", compare(model, ids, only, {})
    yield "plain kernel", compare(model, ids, labels, {}, loss_kernel="plain")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield "checkpointed", compare(model, ids, labels, {})
    yield "adapters", adapters(ids, labels)
    yield "latent attention", compare(latent(), ids, labels, {})


def adapters(ids: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    return compare(model.double(), ids, labels, {})


def latent() -> Any:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 2, "n_group": 1}
    return build("llama", model_type="deepseek_v3", num_key_value_heads=4, topk_group=1, **sizes, **experts)


def nll() -> dict[str, float]:
    """Of each token, and of something else than its sum."""
    model = build("mistral")
    ids, labels = batch_of()
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = token_nll(model(input_ids=ids, use_cache=False).logits, labels)
    (truth * weights).sum().square().backward()
    expected = gradients(model)
    model.zero_grad()
    found = context_parallel_nll(model, ids, labels, group=dist.group.WORLD)
    (found * weights).sum().square().backward()
    logits = context_parallel_logits(model, ids, group=dist.group.WORLD)
    with torch.no_grad():
        apart = (logits - model(input_ids=ids, use_cache=False).logits).abs().max()
        silent = context_parallel_nll(model, ids, labels, group=dist.group.WORLD)
    return {
        "values": float((found - truth).abs().max()),
        "without a graph": float((silent - truth).abs().max()),
        "gradient": worst_error(averaged(model), expected),
        "logits": float(apart),
    }


@contextmanager
def own_gradients_only() -> Iterator[None]:
    """As if keys had no gradient from other ranks' queries."""
    exchanged = attention.sum_to_owners
    attention.sum_to_owners = lambda whole, share, group, dim: share.split(whole, dim)[share.rank]
    try:
        yield
    finally:
        attention.sum_to_owners = exchanged


def dropout() -> dict[str, float]:
    """Dropped attention weights: the gradient against differences of the loss, with the same draws."""
    model = build("llama", attention_dropout=0.3)
    ids, labels = batch_of()
    random = torch.Generator().manual_seed(3)
    direction = {name: torch.randn(p.shape, generator=random).double() for name, p in model.named_parameters()}

    def loss() -> torch.Tensor:
        torch.manual_seed(7 + dist.get_rank())
        return context_parallel_loss(model, ids, labels, group=dist.group.WORLD).mean

    model.zero_grad()
    loss().backward()
    slope = sum(float((grad * direction[name]).sum()) for name, grad in averaged(model).items())
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += step * direction[name]
            values.append(float(loss()))
    measured = (values[0] - values[1]) / 2e-5
    return {"slope": abs(slope - measured) / abs(measured)}


def saved_bytes(run: Any) -> int:
    """What a backward would need, apart from parameters; each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(storages.values())


def memory() -> dict[str, int]:
    from lightning_llm.head_loss import causal_lm_loss

    model = build("llama", max_position_embeddings=512)
    model.set_attn_implementation("sdpa")
    ids, labels = batch_of(rows=1, length=512)
    inputs = {"input_ids": ids, "use_cache": False}
    causal_lm_loss(model, inputs, labels)
    return {
        "whole": saved_bytes(lambda: causal_lm_loss(model, inputs, labels).total),
        "shared": saved_bytes(lambda: context_parallel_loss(model, ids, labels, group=dist.group.WORLD).total),
    }


def refusals() -> dict[str, str]:
    """The messages, which every rank raises, so that none waits."""
    rank, group = dist.get_rank(), dist.group.WORLD
    ids, labels = batch_of()
    other = ids[:, : LENGTH - rank]

    def loss(model: Any, rows: torch.Tensor = ids, targets: torch.Tensor = labels, **options: Any) -> Any:
        return lambda: context_parallel_loss(model, rows, targets, **{"group": group, **options})

    cases = {
        "other rows": loss(build("llama"), ids + rank),
        "other lengths": loss(build("llama"), other, other),
        "labels": loss(build("llama"), targets=labels[:, 1:]),
        "group": loss(build("llama"), group=None),
        "kernel": loss(build("llama"), loss_kernel="cce"),
        "linear": loss(build("lfm2")),
        "bloom": loss(small("bloom", hidden_size=16, n_head=2, n_layer=1)),
        "llama4": loss(chunked()),
        "bert": loss(bert()),
        "reentrant": loss(reentrant()),
    }
    return {name: message(case) for name, case in cases.items()}


def reentrant() -> Any:
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


def message(case: Any) -> str:
    try:
        case()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def small(model_type: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=61, **settings))


def chunked() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    return small("llama4_text", **sizes, **heads, attention_chunk_size=8, pad_token_id=0)


def bert() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return small("bert", **sizes)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    full_float64(SimpleNamespace(setattr=setattr))
    result = {"errors": dict(families()) | dict(layouts()), "nll": nll(), "dropout": dropout()}
    with own_gradients_only():
        result["control"] = compare(build("llama"), *batch_of(), {})
    result |= {"memory": memory(), "refusals": refusals()}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
