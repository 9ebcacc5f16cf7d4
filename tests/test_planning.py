"""The choice of how to train a long sequence: what fits, what is tried first, why, and that training follows it."""

import os
import subprocess
import sys

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm import LLMModule
from lightning_llm.cli import main
from lightning_llm.planning import of_module
from lightning_llm.planning.live_memory import Hollow, LiveMemory, hollow_copy
from lightning_llm.planning.memory_size import free_memory, parse_size
from lightning_llm.planning.plan import MARGIN, Option, Way, choose, make_plan
from lightning_llm.planning.simulation import Need, Step, simulate
from lightning_llm.tasks.windowed_causal_lm import WindowedCausalLM

LLAMA = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 65536,
}  # fmt: skip


def on_meta(**changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**LLAMA, **changes}))


def option(way, total, length=1000):
    return Option(way, {x: Need(total * x / length, 0, 0, 0, 0, 0, 0) for x in (length, length // 4, 8 * length)}, 1.0)


OPTIONS = [
    option(Way(), 100),
    option(Way(checkpointing=True), 60),
    option(Way(loss_kernel="plain"), 5),
    option(Way(window=512), 40),
    option(Way(window=256), 30),
    option(Way(window=512, offload=True), 20),
]


@pytest.mark.parametrize(
    ("memory", "name"),
    [
        (112, "plain"),
        (110, "checkpointing"),  # 100 of 110 leaves less than a tenth
        (60, "windows of 512"),
        (40, "windows of 256"),
        (25, "windows of 512, offloaded"),
    ],
)
def test_the_first_way_that_fits_is_chosen_and_the_reason_names_it(memory, name):
    plan = choose(1000, memory, OPTIONS)
    assert plan.chosen.name == name
    assert plan.reason.startswith(name)
    assert "\n" not in plan.reason
    assert " <-" in next(line for line in str(plan).splitlines() if line.startswith(name.ljust(30)))


def test_where_nothing_fits_the_least_need_and_the_longest_row_are_named():
    plan = choose(1000, 10, OPTIONS)
    assert plan.chosen is None
    assert "windows of 512, offloaded" in plan.reason
    assert "The longest row that fits has 450 tokens" in plan.reason  # 9 of 10 bytes, 0.02 a token


def test_the_longest_row_is_one_that_fits_and_a_longer_one_does_not():
    model = on_meta()
    plan = make_plan(model, 4096, 1e9, windows=[256])
    for row in plan.options[:2]:
        room = 30e6
        longest = row.longest(room)
        hollow = hollow_copy(model)
        total = simulate(hollow, Step(), longest, checkpointing=row.way.checkpointing).total
        assert total == pytest.approx(room, rel=0.03)
        assert simulate(hollow, Step(), 2 * longest, checkpointing=row.way.checkpointing).total > 1.2 * room


def test_needs_of_windows_in_between_are_not_below_what_they_take():
    model = on_meta()
    rows = {o.way: o.need for o in make_plan(model, 4096, 1e9).options}
    exact = simulate(hollow_copy(model), Step(), 4096, window=1024)
    assert exact.total <= rows[Way(window=1024)].total * 1.0001
    assert exact.total == pytest.approx(rows[Way(window=1024)].total, rel=0.1)


def test_keys_and_values_are_those_of_the_whole_row():
    need = simulate(hollow_copy(on_meta()), Step(), 4096, window=256)
    one = 2 * 2 * 16 * 4  # layers, keys and values, width, bytes
    assert need.keys_and_values == one * 4096 + one * (4096 - 256)


def test_rows_autocast_and_frozen_weights_count():
    model = on_meta()
    base = simulate(hollow_copy(model), Step(), 2048)
    rows = simulate(hollow_copy(model), Step(rows=3), 2048)
    assert rows.activations == pytest.approx(3 * base.activations, rel=0.01)
    assert simulate(hollow_copy(model), Step(autocast=torch.bfloat16), 2048).activations < base.activations
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    frozen = simulate(hollow_copy(model), Step(), 2048)
    assert frozen.optimizer_state == 2 * 64 * 64 * 4
    assert frozen.gradients < 0.2 * base.gradients
    assert frozen.activations < base.activations


def test_shards_divide_weights_and_state_but_not_the_sum_over_windows():
    model = hollow_copy(on_meta())
    whole, shards = (simulate(model, Step(shards=n), 2048) for n in (1, 4))
    assert (shards.weights, shards.optimizer_state) == (whole.weights / 4, whole.optimizer_state / 4)
    weights = sum(p.nbytes for p in on_meta().parameters())
    assert simulate(model, Step(shards=4), 2048, window=256).gradients == 1.25 * weights


def test_a_model_with_weights_is_neither_changed_nor_copied():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    attention = model.config._attn_implementation
    copied = hollow_copy(model)
    assert all(isinstance(p, Hollow) and p.requires_grad for p in copied.parameters())
    make_plan(model, 512, 1e9)
    assert not model.training
    assert model.config._attn_implementation == attention
    assert not model.model.gradient_checkpointing
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_storage_counts_once_and_until_it_is_freed():
    layer = hollow_copy(torch.nn.Linear(4, 4, device="meta"))
    with LiveMemory(layer) as memory:
        states = torch.zeros(10, 4)
        view = states[2:].T
        assert memory.live["other"] == 160
        del states
        assert memory.live["other"] == 160
        del view
        assert memory.live["other"] == 0
        layer.weight.view(-1)
        assert memory.live["other"] == 0
    assert memory.peak == {"other": 160}


def test_a_model_that_windows_refuse_is_planned_without_them():
    plan = make_plan(on_meta(num_key_value_heads=4, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                     "rope_theta": 1e4}, max_position_embeddings=256), 512, 1e9)  # fmt: skip
    assert all(o.way.window is None for o in plan.options)
    assert "Without windows" in str(plan)
    assert "rotary" in plan.note


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
        {**LLAMA, "model_type": "qwen3", "head_dim": 16},
        {**LLAMA, "model_type": "mistral", "sliding_window": 128},
        {**LLAMA, "model_type": "gemma2", "head_dim": 16},
    ],
    ids=lambda family: family["model_type"],
)
def test_other_families_are_planned_too(family):
    plan = LLMModule(family).plan(512, "1GB")
    assert plan.chosen == Way()
    assert {o.way.window for o in plan.options} >= {None, 256}


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("80GiB", 80 * 2**30), ("1.5 MB", 1_500_000), (123, 123), ("2e9", 2 * 10**9)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "16 apples", "-3GB", "0", "GB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="`memory` must be a size such as '16GB'"):
        parse_size(text)


def test_free_memory_of_the_host_is_some_of_it():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(torch.device("cpu")) < total


# ---- training --------------------------------------------------------------------------------------------------------


class Rows(L.LightningDataModule):
    def __init__(self, max_length):
        super().__init__()
        self.max_length = max_length
        self.save_hyperparameters({"micro_batch_size": 1})

    def train_dataloader(self):
        ids = torch.randint(0, 96, (2, self.max_length), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "labels": row} for row in ids])


def fit(quiet_trainer, monkeypatch, memory, **options):
    monkeypatch.setattr(of_module, "free_memory", lambda device: memory)
    torch.manual_seed(0)
    module = LLMModule(LLAMA, sequence_window="auto", warmup=0, **options)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, Rows(4096))
    return module, trainer


def needs(max_length=4096):
    return {o.way: o.need.total for o in LLMModule(LLAMA).plan(max_length, "1GB").options}


@pytest.fixture(scope="module")
def of_ways():
    return needs()


def test_auto_trains_plain_checkpointed_or_in_windows_as_memory_allows_with_the_same_result(
    quiet_trainer, monkeypatch, of_ways, tmp_path
):
    def just(way):
        return of_ways[way] / (1 - MARGIN) * 1.001

    module, _ = fit(quiet_trainer, monkeypatch, just(Way()))
    assert type(module.task).__name__ == "CausalLM"
    assert not module.gradient_checkpointing
    weights = [p.detach() for p in module.parameters()]

    module, trainer = fit(quiet_trainer, monkeypatch, just(Way(window=256)))
    assert isinstance(module.task, WindowedCausalLM)
    assert module.task.window in (256, 512)
    for ours, plain in zip(module.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.detach(), plain, rtol=1e-3, atol=2e-5)

    trainer.save_checkpoint(tmp_path / "auto.ckpt")
    loaded = LLMModule.load_from_checkpoint(tmp_path / "auto.ckpt")
    assert loaded.sequence_window is None  # until a run decides
    assert loaded.hparams["sequence_window"] == "auto"


def test_the_rank_with_the_least_memory_chooses_for_all(run_ranks, of_ways):
    """Two ranks share a host, so each has half of what it sees; one sees enough for plain rows, the other does not."""
    windows, plain = (2 * of_ways[way] / (1 - MARGIN) * 1.001 for way in (Way(window=256), Way()))
    found = run_ranks("planned_ranks", 2, memories=[plain, windows])
    assert found[0]["window"] == found[1]["window"] in (256, 512)
    assert found[0]["weights"] == found[1]["weights"]
    found = run_ranks("planned_ranks", 2, memories=[plain, plain])  # control
    assert [result["window"] for result in found] == [None, None]


def test_auto_turns_checkpointing_on(quiet_trainer, monkeypatch):
    wide = {**LLAMA, "num_key_value_heads": 4}
    monkeypatch.setitem(LLAMA, "num_key_value_heads", 4)
    plan = LLMModule(wide).plan(4096, "1GB", offload=False, with_logits=False)
    checkpointing = next(o for o in plan.options if o.way == Way(checkpointing=True))
    module, _ = fit(quiet_trainer, monkeypatch, checkpointing.need.total / (1 - MARGIN) * 1.001)
    assert module.gradient_checkpointing
    assert any(getattr(m, "gradient_checkpointing", False) for m in module.model.modules())


def test_auto_refuses_what_fits_in_no_way(quiet_trainer, monkeypatch):
    with pytest.raises(ValueError, match="nothing fits: rows of 4096 tokens need .* Shorten rows"):
        fit(quiet_trainer, monkeypatch, 1e5)


def test_auto_without_a_length_says_what_to_pass(quiet_trainer):
    module = LLMModule(LLAMA, sequence_window="auto")
    with pytest.raises(ValueError, match="needs a data module with a `max_length`.*Pass a number of tokens"):
        quiet_trainer(max_steps=1).fit(module, Rows(64).train_dataloader())


def test_other_words_and_checkpointing_beside_auto_are_refused():
    with pytest.raises(ValueError, match="must be a number of tokens or 'auto', but got 'best'"):
        LLMModule(LLAMA, sequence_window="best")
    with pytest.raises(ValueError, match="leave `gradient_checkpointing` out"):
        LLMModule(LLAMA, sequence_window="auto", gradient_checkpointing=True)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    data = {"data": "/nowhere", "tokenizer": "bytes", "max_length": 1024, "micro_batch_size": 2}
    path.write_text(yaml.safe_dump({"model": {"model": LLAMA, "learning_rate": 1e-3}, "data": data,
                                    "trainer": {"precision": "bf16-mixed"}}))  # fmt: skip
    return path


def test_the_command_prints_a_table_and_the_choice_before_any_data_or_weight(config, capsys):
    main(["plan", "--config", str(config), "--memory", "1GB", "--parts"])
    out = capsys.readouterr().out
    assert "rows of 1024 tokens, 2 at a time, precision bf16-mixed" in out
    assert "keys and values" in out
    assert out.strip().splitlines()[-1].startswith("plain: it needs")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--memory", "lots"], "`memory` must be a size"),
        (["--precision", "8-bit"], "A plan knows precision"),
        (["--max_length", "0"], "`max_length` must be a whole number"),
        (["--shards", "0"], "`shards` must be a whole number"),
    ],
)
def test_the_command_names_what_is_wrong(config, arguments, named):
    with pytest.raises(SystemExit, match=named):
        main(["plan", "--config", str(config), *arguments])


def test_the_command_names_a_missing_file_or_length(config, tmp_path):
    with pytest.raises(SystemExit, match="There is no file"):
        main(["plan", "--config", str(tmp_path / "none.yaml")])
    config.write_text(yaml.safe_dump({"model": {"model": LLAMA}}))
    with pytest.raises(SystemExit, match=r"no data.max_length. Add it, or --max_length N"):
        main(["plan", "--config", str(config)])


@pytest.mark.slow
def test_the_command_takes_none_of_the_models_memory(tmp_path):
    """A model of 7 billion parameters in a process that may not have them."""
    large = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
             "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump({"model": {"model": large}, "data": {"max_length": 8192}}))
    code = (
        "import sys, torch, resource; from lightning_llm.planning.live_memory import hollow_copy; import yaml;"
        "from lightning_llm import LLMModule; from lightning_llm.planning.of_module import _architecture;"
        f"m = LLMModule(yaml.safe_load(open({str(path)!r}))['model']['model']);"
        "model = hollow_copy(_architecture(m.source, m.config, 'AutoModelForCausalLM', torch.float32, None, False));"
        "assert sum(p.nbytes for p in model.parameters()) > 20e9;"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2e6"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
