"""Packed documents do not see each other, and the self-test knows a model that lets them."""

import contextlib
import warnings

import lightning as L
import pytest
import torch
from packed_models import ENCODERS, build, documents, gradients, join, pack, without_first
from windowed_models import full_float64

from lightning_llm import LLMModule, verify_packing
from lightning_llm.document_masks import document_ids, packed_encoder_inputs
from lightning_llm.isolation import PackingLeakError, check_mask, packing_error
from lightning_llm.loss import token_nll
from lightning_llm.tasks.causal_lm import CausalLM, decoder_inputs

ISOLATED = ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral"]
LEAKING = ["bloom", "opt", "falcon", "mamba", "qwen3_next", "gpt_oss"]


def separate_total(model, rows):
    """The truth: each document by itself, in a batch of one, with nothing but its tokens."""
    totals = [
        token_nll(model(input_ids=d[None], use_cache=False).logits, without_first(d)[None]).sum()
        for row in rows
        for d in row
    ]
    return sum(totals)


# ---- packed equals separate ------------------------------------------------------------------------------------------


# GPT-2 computes in the type of its weights. The others cast inside: norms, rotary angles, softmax to float32, so that
# float64 weights give about 1e-7; where documents are apart the same casts are made in both, and the error is smaller.
@pytest.mark.parametrize("layout", [pack, join])
@pytest.mark.parametrize(
    ("model_type", "attention", "tolerance"),
    [
        ("gpt2", "sdpa", 1e-12),
        ("gpt2", "eager", 1e-12),
        *((name, "sdpa", 1e-6) for name in ("llama", "qwen3", "mistral", "gemma3_text")),
        *((name, "eager", 1e-6) for name in ("llama", "gemma2", "gemma3_text")),
    ],
)
def test_packed_loss_and_gradients_equal_those_of_separate_documents(model_type, attention, tolerance, layout):
    model, rows = build(model_type, attention).train(), documents()
    loss = CausalLM().loss(model, layout(rows))
    wanted = separate_total(model, rows)
    assert loss.num_tokens == sum(len(d) - 1 for row in rows for d in row)
    assert abs(loss.total / wanted - 1) <= tolerance
    expected = gradients(model, wanted)
    assert (gradients(model, loss.total) - expected).abs().max() <= tolerance * expected.abs().max()


def test_packed_loss_with_a_mask_of_ones_is_another(tiny_gpt2):
    """The control of the test above: the same comparison fails for the call that leaks."""
    model, rows = build("gpt2"), documents()
    batch = pack(rows)
    leaking = CausalLM().loss(model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}).total
    assert abs(leaking / separate_total(model, rows) - 1) > 1e-4


# ---- the self-test ---------------------------------------------------------------------------------------------------


def with_cache(model, batch):
    return model(**batch).logits


def with_mask_of_ones(model, batch):
    return model(**batch, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits


def without_positions(model, batch):
    """Documents are apart, but positions count on through the row: wrong for learned positions."""
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:
        ids = document_ids(batch["position_ids"])
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        inputs["attention_mask"] = ((ids[:, :, None] == ids[:, None, :]) & causal)[:, None]
    return model(**inputs).logits


def positions_only(model, batch):
    first = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    positions = {"position_ids": batch["position_ids"] + first} if "position_ids" in batch else {}
    return model(input_ids=batch["input_ids"], **positions).logits


def booleans(model, batch):
    inputs = packed_encoder_inputs(model, batch)
    if "position_ids" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"] == 0
    return model(**inputs).logits


def positions_from_zero(model, batch):
    inputs = packed_encoder_inputs(model, batch)
    return model(**{**inputs, **{key: batch[key] for key in ("position_ids",) if key in batch}}).logits


LEAKING_RUNS = [
    *((name, None, None) for name in LEAKING),
    *((name, None, with_cache) for name in ("gpt2", "llama", "qwen3", "mistral", "gemma3_text")),
    *((name, None, with_mask_of_ones) for name in ("gpt2", "llama", "qwen3", "mistral", "gemma3_text")),
    ("llama", "eager", with_mask_of_ones),
    ("gpt2", None, without_positions),
    *((name, attention, positions_only) for name in ENCODERS for attention in ("sdpa", "eager")),
    *((name, "eager", booleans) for name in ("bert", "roberta")),
    ("roberta", "sdpa", positions_from_zero),
]


@pytest.mark.parametrize(("model_type", "attention", "run"), LEAKING_RUNS)
def test_the_self_test_refuses_what_leaks(model_type, attention, run):
    model = build(model_type, attention, torch.float32)
    message = (
        rf"{type(model).__name__} lets packed documents see each other.*windowing='windows'.*leaking_packs='unpack'"
    )
    with pytest.raises(PackingLeakError, match=message):
        verify_packing(model, run)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, None) for name in ISOLATED]
    + [(name, "eager") for name in ("gpt2", "llama", "gemma3_text")]
    + [(name, attention) for name in ENCODERS for attention in ("sdpa", "eager")],
)
def test_the_self_test_passes_what_does_not_leak(model_type, attention, dtype, monkeypatch):
    full_float64(monkeypatch)  # eager attention's softmax is float32 otherwise, and rounds as the processor likes
    if model_type == "mixtral" and dtype == torch.float64:
        dtype = torch.float32  # transformers' grouped products have no float64
    error = verify_packing(build(model_type, attention, dtype))
    assert error <= (1e-12 if dtype == torch.float64 else 5e-6)


def test_attention_in_booleans_is_right_under_sdpa():
    """The control of the same call under eager attention, which is refused above."""
    assert verify_packing(build("bert", "sdpa"), lambda m, b: m(**packed_encoder_inputs(m, b)).logits) <= 1e-12


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_neither_hides_a_leak_nor_invents_one(autocast):
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    dtype = torch.float32 if autocast else torch.bfloat16
    with context:
        for name in ("gpt2", "llama", "gemma3_text", "mixtral"):
            assert packing_error(build(name, dtype=dtype)).crosstalk == 0
            assert verify_packing(build(name, dtype=dtype)) < 0.03
        for name in LEAKING:
            with pytest.raises(PackingLeakError):
                verify_packing(build(name, dtype=dtype))
        with pytest.raises(PackingLeakError):
            verify_packing(build("gpt2", dtype=dtype), with_mask_of_ones)


def test_a_tolerance_of_ones_own():
    model = build("gpt2", dtype=torch.float32)
    with pytest.raises(PackingLeakError, match=r"rounding explains 1e-09 at most"):
        verify_packing(model, tolerance=1e-9)
    assert verify_packing(build("gpt2"), tolerance=1e-12) <= 1e-12


def test_modes_random_numbers_and_gradients_are_as_before():
    model = build("gpt2").train()
    model.transformer.h[1].eval()  # frozen by hand
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()
    modes = [module.training for module in model.modules()]
    grads, state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    verify_packing(model)
    with pytest.raises(PackingLeakError):
        verify_packing(model, with_cache)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))


@pytest.mark.parametrize(("positions", "vocab_size"), [(6, 2), (16, 3), (17, 61)])
def test_few_positions_and_a_tiny_vocabulary_are_enough(positions, vocab_size):
    from transformers import AutoModelForCausalLM, GPT2Config

    options = {"bos_token_id": 0, "eos_token_id": 0, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=vocab_size, n_positions=positions, **options))
    assert verify_packing(model) < 1e-5
    with pytest.raises(PackingLeakError):
        verify_packing(model, with_cache)


def test_a_model_that_does_not_look_at_context_yet_cannot_be_judged():
    model = build("gpt2")
    for block in model.transformer.h:
        torch.nn.init.zeros_(block.attn.c_proj.weight)
    with pytest.warns(UserWarning, match=r"cannot be told: its outputs hardly depend on earlier tokens"):
        assert verify_packing(model, with_cache) <= 1e-12
    torch.nn.init.zeros_(model.lm_head.weight)  # and one whose outputs are all 0
    with pytest.warns(UserWarning, match=r"hardly depend on earlier tokens \(0\.0e\+00"):
        assert verify_packing(model, with_cache) == 0


def test_weights_that_are_not_finite_are_said_to_be():
    model = build("gpt2")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"cannot be told: its outputs are not finite numbers. Look at its weights"):
        verify_packing(model)


def test_tokens_that_a_model_forbids_by_an_infinite_logit_do_not_disturb():
    def forbid(model, batch):
        logits = CausalLM().outputs(model, batch).clone()
        logits[..., 5] = -torch.inf
        return logits

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify_packing(build("gpt2"), forbid) <= 1e-12
    with pytest.raises(PackingLeakError):
        verify_packing(build("opt"), forbid)


def test_packed_rows_with_a_two_dimensional_mask_are_refused():
    positions, ones = torch.tensor([[0, 1, 2, 0, 1]]), torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(
        PackingLeakError, match=r"restart within a row, and an `attention_mask`.*Leave `attention_mask` out"
    ):
        check_mask({"position_ids": positions, "attention_mask": ones})
    padded = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0, 0]])
    check_mask({"position_ids": torch.tensor([[1, 1, 0, 1, 2]]), "attention_mask": padded[0]})
    check_mask({"position_ids": torch.tensor([[0, 1, 2, 1, 1]]), "attention_mask": padded[1]})
    check_mask({"position_ids": positions, "attention_mask": ones[:, None, None].expand(1, 1, 5, 5)})


# ---- what flash attention gets ---------------------------------------------------------------------------------------


def test_boundaries_go_to_flash_attention_and_to_no_other():
    model, joined, packed = build("llama"), join(documents()), pack(documents())
    assert set(decoder_inputs(model, joined)) == {"input_ids", "position_ids"}
    model.config._attn_implementation_internal = "flash_attention_2"
    boundaries = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert set(decoder_inputs(model, joined)) == {"input_ids", "position_ids"} | boundaries
    assert decoder_inputs(model, packed)["position_ids"].shape == (1, 48)
    alone = {"input_ids": packed["input_ids"]}
    assert decoder_inputs(model, alone)["input_ids"].shape == (2, 24)
    padded = {**alone, "attention_mask": torch.ones(2, 24)}
    assert decoder_inputs(model, padded) == padded


# ---- LLMModule -------------------------------------------------------------------------------------------------------


def module_of(model_type, **options):
    torch.manual_seed(0)
    return LLMModule(build(model_type, dtype=torch.float32), lr_schedule="constant", warmup=0, **options)


def loader(*batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


class Batches(L.LightningDataModule):
    def __init__(self, *batches, **attributes):
        super().__init__()
        self.batches = list(batches)
        for name, value in attributes.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return loader(*self.batches)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def truth(module, rows):
    count = sum(len(d) - 1 for row in rows for d in row)
    return (separate_total(module.model.eval(), rows) / count).item()


PACKS = [{"windowing": "packed"}, {"windowing": "wrapped"}, {"windowing": "windows", "packs_documents": True}]


@pytest.mark.parametrize("attributes", PACKS)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_leaking_model_is_refused_before_the_first_packed_batch(quiet_trainer, stage, attributes):
    data = Batches({"nothing": "was read"}, **attributes)
    with pytest.raises(PackingLeakError, match=r"OPTForCausalLM lets packed documents see each other"):
        getattr(quiet_trainer(max_steps=1), stage)(module_of("opt"), datamodule=data)


def test_a_leaking_model_is_refused_at_the_first_packed_batch_of_any_loader(quiet_trainer):
    trainer = quiet_trainer(max_steps=1)
    with pytest.raises(PackingLeakError, match=r"OPTForCausalLM lets packed documents see each other"):
        trainer.fit(module_of("opt"), loader(pack(documents())))
    assert trainer.global_step == 0
    with pytest.raises(PackingLeakError):
        quiet_trainer().predict(module_of("opt"), loader(join(documents())))


def test_rows_of_one_document_are_for_every_model(quiet_trainer):
    batch = pack(documents())
    padded = {"input_ids": batch["input_ids"], "labels": batch["labels"], "attention_mask": batch["labels"] != -100}
    for attributes in ({"windowing": "windows"}, {"windowing": "packed", "packs_documents": False}):
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(module_of("opt"), Batches(padded, **attributes))
        assert trainer.global_step == 1


@pytest.mark.parametrize("layout", [pack, join])
@pytest.mark.parametrize("attributes", [{}, {"windowing": "packed"}])
def test_a_leaking_model_trains_and_scores_unpacked_if_asked(quiet_trainer, attributes, layout):
    module, rows = module_of("opt", leaking_packs="unpack"), documents()
    expected = truth(module, rows)
    data = Batches({**layout(rows), "row_ids": torch.arange(2 if layout is pack else 7)}, **attributes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer()
        trainer.validate(module, datamodule=data, verbose=False)
        assert trainer.callback_metrics["val/loss"].item() == pytest.approx(expected, rel=1e-6)
        (scores,) = trainer.predict(module, datamodule=data)
        trainer = quiet_trainer(max_steps=1, limit_val_batches=0)
        trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)
    assert scores["nll"].shape == scores["num_tokens"].shape == scores["row_ids"].shape
    assert scores["num_tokens"].sum() == 33
    assert scores["nll"].sum().item() == pytest.approx(33 * expected, rel=1e-6)
    messages = [str(w.message) for w in caught if "leaking_packs" in str(w.message)]
    assert len(messages) == 1
    assert "each document becomes a row of its own, padded to the longest of its batch" in messages[0]


def test_an_isolated_model_is_not_unpacked(quiet_trainer):
    module, rows = module_of("gpt2", leaking_packs="unpack"), documents()
    expected = truth(module, rows)
    seen = []
    module.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader(pack(rows)))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)
    assert seen[-1] == (2, 24)


def test_a_mask_on_packed_rows_is_refused_or_the_rows_are_unpacked(quiet_trainer):
    rows = documents()
    batch = pack(rows) | {"attention_mask": torch.ones(2, 24, dtype=torch.int64)}
    with pytest.raises(PackingLeakError, match=r"Leave `attention_mask` out of packed batches"):
        quiet_trainer(max_steps=1).fit(module_of("gpt2"), loader(batch))
    module = module_of("gpt2", leaking_packs="unpack")
    expected = truth(module, rows)
    trainer = quiet_trainer(max_steps=1)
    with pytest.warns(UserWarning, match=r"leaking_packs='unpack'.*Leave `attention_mask` out"):
        trainer.fit(module, loader(batch))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_padding_may_be_longer_than_the_model_has_positions(quiet_trainer):
    rows = documents() * 2  # 80 tokens, 64 positions
    module = module_of("gpt2")
    expected = truth(module, rows)
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, loader(join(rows)))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-6)


def test_what_to_do_about_leaks_is_one_of_two():
    with pytest.raises(ValueError, match=r"`leaking_packs` must be 'refuse' or 'unpack', but got 'ignore'"):
        module_of("gpt2", leaking_packs="ignore")


def test_ranks_of_a_sharded_model_find_out_together(run_ranks):
    ranks = run_ranks("fsdp_isolation", 2, model_type="opt")
    assert [rank["steps"] for rank in ranks] == [3, 3]
    assert ranks[0]["loss"] == ranks[1]["loss"]
    assert ranks[0]["warned"] == 1
