"""AdaLoRA under Lightning is peft's own training loop, however its steps are cut, killed and resumed."""

import copy

import lightning as L
import pytest
import torch
from adapter_models import FIXED, LLAMA, distance, move, own_loss
from support import TINY_GPT2, Positions, pad_rows, ragged_rows
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from lightning_llm.callbacks import (
    AccumulationSchedule,
    AdaLoraAllocation,
    DynamicBatchScaler,
    TokenWeightedAccumulation,
)

FIELDS = {"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2, "lora_alpha": 8}
STEPS, BATCH = 10, 4
ROWS = ragged_rows(STEPS * BATCH)
OPTIMIZER = {"learning_rate": 1e-2, "eps": 1e-3, "betas": (0.9, 0.99)}


def build(base=TINY_GPT2, **options):
    """GPT-2, whose norms round nothing to float32."""
    torch.manual_seed(0)
    module = LLMModule(dict(base), peft={**FIELDS, **options.pop("peft", {})}, **{**FIXED, **OPTIMIZER, **options})
    module.configure_model()
    move(module)
    return module


def loader(size, rows=ROWS):
    return DataLoader(rows, batch_size=size, collate_fn=pad_rows)


def trained(module):
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def pefts_own_loop(clip=None, penalty=True):
    """As in peft's documentation, on whole batches."""
    module = build(peft={} if penalty else {"orth_reg_weight": 0.0})
    model = module.model.train()
    model.peft_config["default"].total_step = STEPS
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    ranks = []
    for step in range(STEPS):
        own_loss(model, pad_rows(ROWS[BATCH * step : BATCH * (step + 1)])).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        pattern = model.peft_config["default"].rank_pattern
        ranks.append(None if pattern is None else copy.deepcopy(pattern))
    return trained(module), ranks


WAYS = {
    "whole batches": (4, 1, list),
    "whole batches, weighted": (4, 1, lambda: [TokenWeightedAccumulation()]),
    "micro-batches": (1, 4, lambda: [TokenWeightedAccumulation()]),
    "a schedule of micro-batches": (2, 1, lambda: [TokenWeightedAccumulation(), AccumulationSchedule(2)]),
    "pieces": (4, 1, lambda: [TokenWeightedAccumulation(), DynamicBatchScaler(max_piece=3)]),
    "micro-batches in pieces": (2, 2, lambda: [TokenWeightedAccumulation(), DynamicBatchScaler(max_piece=1)]),
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("way", WAYS)
def test_training_is_pefts_own_loop_to_the_last_rank(way, clip, quiet_trainer):
    truth, ranks = pefts_own_loop(clip)
    assert 0 < sum(sum(pattern) for pattern in ranks[-1].values()) == 2 * len(ranks[-1])
    size, accumulate, callbacks = WAYS[way]
    module = build()
    trainer = quiet_trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[*callbacks(), AdaLoraAllocation()],
    )
    trainer.fit(module, loader(size))
    assert trainer.global_step == STEPS
    assert distance(trained(module), truth) < 1e-12
    assert module.model.peft_config["default"].rank_pattern == ranks[-1]
    assert trainer.callback_metrics["train/rank"] == sum(map(sum, ranks[-2].values())) / len(ranks[-2])


@pytest.mark.parametrize("is_last", [True, False])
def test_a_search_before_the_first_step_is_no_step(is_last, quiet_trainer):
    """Whichever of the two callbacks hears of the start of training first."""
    truth, ranks = pefts_own_loop()
    module, allocation, scaler = build(), AdaLoraAllocation(), DynamicBatchScaler(find="start")
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(len(allocation.state_dict()["sensitivity"]))

    both = [scaler, allocation] if is_last else [allocation, scaler]
    trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), *both, Look()])
    trainer.fit(module, loader(4))
    assert seen == [0]
    assert distance(trained(module), truth) < 1e-12
    assert module.model.peft_config["default"].rank_pattern == ranks[-1]


def test_the_penalty_and_the_ranks_have_a_part_in_it(quiet_trainer):
    truth, _ = pefts_own_loop()
    assert distance(pefts_own_loop(penalty=False)[0], truth) > 1e-3
    module = build()
    with pytest.warns(UserWarning, match="no rank is ever given up"):
        quiet_trainer(max_epochs=1).fit(module, loader(4))
    assert distance(trained(module), truth) > 1e-3


class SaveInside(L.Callback):
    """Saves two micro-batches into the window after some optimizer steps."""

    def __init__(self, steps, folder):
        self.steps, self.folder = steps, folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.steps and batch_idx == 4 * trainer.global_step + 1:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def test_a_run_that_is_killed_inside_a_window_goes_on_to_the_same_bits(quiet_trainer, tmp_path):
    def run(ckpt_path=None, saves=()):
        module = build()
        if ckpt_path is not None:
            move(module, 1.0)  # what is not loaded is wrong
        callback = AdaLoraAllocation()
        callbacks = [TokenWeightedAccumulation(), AccumulationSchedule(4), callback, SaveInside(saves, tmp_path)]
        trainer = quiet_trainer(max_epochs=1, callbacks=callbacks)
        trainer.fit(module, Positions([pad_rows([row]) for row in ROWS]), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == STEPS
        assert callback.state_dict()["is_final"]
        return trained(module), module.model.peft_config["default"].rank_pattern

    saves = (1, 3, 5, 8, 9)
    whole, pattern = run(saves=saves)
    for save in saves:
        weights, resumed_pattern = run(tmp_path / f"{save}.ckpt")
        assert torch.equal(weights, whole), save
        assert resumed_pattern == pattern
    checkpoint = torch.load(tmp_path / "3.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["AdaLoraAllocation"]
    for name in state["sensitivity"]:
        if "h.1." in name:  # as if the second layer had mattered most
            state["sensitivity"][name].fill_(1e6)
            state["uncertainty"][name].fill_(1e6)
    torch.save(checkpoint, tmp_path / "otherwise.ckpt")
    assert distance(run(tmp_path / "otherwise.ckpt")[0], whole) > 1e-6


def test_a_step_without_a_single_token_changes_nothing_but_the_count(quiet_trainer):
    rows = [dict(row) for row in ROWS]
    for row in rows[8:12]:  # the third step
        row["labels"] = torch.full_like(row["labels"], -100)
    module = build()
    quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation(), AdaLoraAllocation()]).fit(
        module, loader(4, rows)
    )
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    pattern = module.model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)


def test_ranks_that_were_given_up_stay_so_in_a_folder_of_the_adapter(quiet_trainer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = build(base=LLAMA)
    base = copy.deepcopy(module.model).unload()
    quiet_trainer(max_epochs=1, callbacks=[AdaLoraAllocation()]).fit(module, loader(4))
    module.model.eval().save_pretrained(tmp_path)
    assert isinstance(base, AutoModelForCausalLM._model_mapping[type(module.config)])
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(loaded(ids).logits, module.model(ids).logits, rtol=1e-10, atol=1e-12)


def test_what_it_cannot_serve_is_refused(quiet_trainer):
    def fit(module, **options):
        quiet_trainer(callbacks=[AdaLoraAllocation()], **options).fit(module, loader(4))

    with pytest.raises(ValueError, match=r"the run has 4 optimizer steps, of which the first tinit=2 and the last"):
        fit(build(), max_steps=4)
    with pytest.raises(ValueError, match="expects one AdaLoRA adapter that trains, but LLMModule has 0"):
        fit(LLMModule(dict(LLAMA), peft={"peft_type": "LORA"}), max_steps=9)
    manual = build()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic optimization"):
        fit(manual, max_steps=9)
