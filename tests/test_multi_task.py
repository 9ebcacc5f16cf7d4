"""Several tasks on one trunk: a task's gradient is the mean over its targets, whatever the cut; heads are their own."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from multi_task_training import (
    MODEL,
    TASKS,
    WEIGHTS,
    Gradients,
    Seen,
    bare_loop,
    batches_of,
    data,
    module,
    prepared,
    trained,
    true_objective,
    weights,
)
from support import Positions
from task_models import CASES, batch_of
from torch import nn

from lightning_llm import LLMModule, MultiTaskModule
from lightning_llm.callbacks import DynamicBatchScaler, HuggingFaceCheckpoint, TokenWeightedAccumulation
from lightning_llm.multi_task.model import MultiTaskModel
from lightning_llm.multi_task.weighting import balanced_weights

TOLERANCE = 1e-12
pytestmark = pytest.mark.filterwarnings("ignore:.*(Metric `Spearman|variance of predictions)")


class Scarce(MultiTaskModule):
    """Runs out of memory with more than two rows at once, in the middle of the forward."""

    num_failed = 0

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        if len(batch["input_ids"]) > 2:
            self.num_failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return output


class MeanOfMeans(MultiTaskModule):
    """What a loss of the micro-batch alone would give."""

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        loss = self.task.loss(self.model, batch)
        return {**output, "loss": WEIGHTS[batch["task"]] * loss.mean + output["loss"] * 0}


def run(tmp_path, quiet_trainer, micro_batches, callbacks=(), **options):
    made, _ = trained(tmp_path, quiet_trainer, micro_batches, callbacks, **options)
    return weights(made)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Weights of a bare loop of AdamW over the steps' rows, and of the beginning; and those rows."""
    folder = tmp_path_factory.mktemp("truth")
    import lightning as L

    seen = Seen()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=2, accumulate_grad_batches=3, limit_val_batches=0, **options,
                        callbacks=[TokenWeightedAccumulation(), seen])  # fmt: skip
    trainer.fit(module(), data(folder))
    start = module()
    begin = weights(start)
    return weights(bare_loop(start, prepared(folder), seen.steps)), begin, seen.steps


def error(found, truth):
    return float((found - truth[0]).norm() / (truth[0] - truth[1]).norm())


# ---- the gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [3, 4, 7])
def test_weights_after_training_are_those_of_whole_batches(tmp_path, quiet_trainer, truth, micro_batches):
    assert error(run(tmp_path, quiet_trainer, micro_batches), truth) < TOLERANCE


def test_pieces_after_running_out_of_memory_change_nothing(tmp_path, quiet_trainer, truth):
    made = module(Scarce)
    trained(tmp_path, quiet_trainer, 3, [DynamicBatchScaler(grow_every=0)], made=made)
    assert made.num_failed > 0
    assert error(weights(made), truth) < TOLERANCE


def test_a_loss_of_the_micro_batch_alone_trains_something_else(tmp_path, quiet_trainer, truth):
    made = module(MeanOfMeans)
    trained(tmp_path, quiet_trainer, 4, made=made)
    assert error(weights(made), truth) > 1e-2


def test_gradient_is_the_weighted_sum_of_those_of_single_models(tmp_path, quiet_trainer):
    """Of plain transformers models, each by itself, with the weights that were exported for them."""
    made, gradients, seen = module(), Gradients(), Seen()
    made.model.save_pretrained(tmp_path / "start")
    trained(tmp_path, quiet_trainer, 5, [gradients, seen], made=made, max_steps=1)
    expected: dict[str, torch.Tensor] = {}
    for name, batch in batches_of(prepared(tmp_path), seen.steps[0]).items():
        auto = made.task.tasks[name].auto_class
        plain = getattr(transformers, auto).from_pretrained(tmp_path / "start" / name, dtype=torch.float64)
        labels = batch["labels"].double() if name == "grade" else batch["labels"]
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        plain(**inputs, labels=labels).loss.backward()
        for key, parameter in plain.named_parameters():
            if parameter.grad is not None:
                is_shared = key.startswith("bert.")
                key = "model.trunk." + key.removeprefix("bert.") if is_shared else f"model.tasks.{name}.{key}"
                expected[key] = expected.get(key, 0) + WEIGHTS[name] * parameter.grad
    found = gradients.steps[0]
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-13, msg=key)


def own_loader(names, targets=None, seed=0):
    """Micro-batches of a loader of one's own, one step."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for name in names:
        ids = torch.randint(3, 200, (3, 6), generator=generator)
        labels = {"topic": torch.tensor([0, 1, 2]), "grade": torch.randn(3), "lm": ids.masked_fill(ids % 2 == 0, -100)}
        batches.append({"input_ids": ids, "labels": labels[name], "task": name})
    counts = dict.fromkeys(TASKS, 0)
    for batch in batches:
        counts[batch["task"]] += int(module().num_targets(batch))
    return [{**batch, "step_targets": targets or counts} for batch in batches]


def test_heads_of_absent_tasks_stay_bitwise_as_they_are(quiet_trainer):
    made = module()
    both = own_loader(["topic", "lm"]), own_loader(["topic", "topic"], seed=1)
    after_first = {}

    class Note(Gradients):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                after_first.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    start = {name: value.clone() for name, value in made.state_dict().items()}
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[TokenWeightedAccumulation(), Note()])
    trainer.fit(made, Positions([*both[0], *both[1]]))
    end = made.state_dict()
    changed = {"topic": 0, "lm": 0, "grade": 0, "trunk": 0}
    for name, value in end.items():
        part = name.split(".")[2] if ".tasks." in name else "trunk"
        changed[part] += int(not torch.equal(value, after_first[name]))
        if part == "grade":
            assert torch.equal(value, start[name])
    assert changed["topic"]
    assert changed["trunk"]
    assert changed["grade"] == changed["lm"] == 0  # of lm in spite of AdamW's momentum and decay


@pytest.mark.parametrize("name", CASES)
def test_targets_are_counted_as_the_loss_weighs_them(name):
    case = CASES[name]
    made, batch = case.module(), batch_of(case.rows(5))
    assert made.task.num_targets(batch) == made.task.loss(made.model, batch).num_tokens


# ---- weightings --------------------------------------------------------------------------------------------------


def test_uncertainty_is_learned_as_in_a_bare_loop_whatever_the_cut(tmp_path, quiet_trainer):
    seen = Seen()
    made, trainer = trained(tmp_path, quiet_trainer, 3, [seen], weighting="uncertainty")
    other, _ = trained(tmp_path, quiet_trainer, 7, weighting="uncertainty")
    loop = module(weighting="uncertainty")
    begin = weights(loop)
    bare_loop(loop, prepared(tmp_path), seen.steps, loop.weighting.log_variances)
    true = weights(loop), begin
    assert error(weights(made), true) < TOLERANCE
    assert error(weights(other), true) < TOLERANCE
    learned = {name: float(value) for name, value in made.weighting.log_variances.items()}
    assert len(set(learned.values())) == 3
    assert all(abs(value) > 1e-3 for value in learned.values())
    decays = {id(p): group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert all(decays[id(value)] == 0 for value in made.weighting.log_variances.values())
    assert "weighting.log_variances.lm" in made.state_dict()
    expected = WEIGHTS["topic"] * torch.exp(-made.weighting.log_variances["topic"]).item()
    assert made.weighting.current()["topic"] == pytest.approx(expected)
    assert float(trainer.callback_metrics["train/lm/weight"]) > 0


def test_gradient_norms_are_those_of_whole_batches_and_become_equal(tmp_path, quiet_trainer):
    """Of the first step, with no memory: the next step's weights make all products of norm and weight equal."""
    seen, options = Seen(), {"weighting": "gradient_norm", "weighting_options": {"decay": 0.0}}
    found = [trained(tmp_path, quiet_trainer, k, [seen], max_steps=1, **options)[0].weighting for k in (3, 7)]
    loop, loaded = module(), prepared(tmp_path)
    matrix = loop.model.last_shared_matrix()
    assert matrix is loop.model.trunk.encoder.layer[-1].output.dense.weight
    norms = {}
    for name in TASKS:
        objective = true_objective(loop, loaded, [row for row in seen.steps[0] if row[0] == name])
        norms[name] = float(torch.autograd.grad(objective / WEIGHTS[name], matrix)[0].norm())
    for weighting in found:
        assert dict(zip(weighting.names, weighting.norms.tolist(), strict=True)) == pytest.approx(norms, rel=1e-12)
        products = [
            w * n / WEIGHTS[name] for (name, w), n in zip(weighting.current().items(), norms.values(), strict=True)
        ]
        assert products == pytest.approx([products[0]] * 3, rel=1e-12)
        assert sum(weighting.current().values()) == pytest.approx(sum(WEIGHTS.values()))


def test_gradient_norm_weighting_does_not_depend_on_the_cut(tmp_path, quiet_trainer):
    options = {"weighting": "gradient_norm", "weighting_options": {"alpha": 0.5}}
    a, b = (run(tmp_path, quiet_trainer, k, **options) for k in (3, 7))
    scarce = module(Scarce, **options)
    trained(tmp_path, quiet_trainer, 3, [DynamicBatchScaler(grow_every=0)], made=scarce)
    begin, fixed = weights(module(**options)), run(tmp_path, quiet_trainer, 3)
    assert scarce.num_failed
    for other in (b, weights(scarce)):
        assert float((a - other).norm() / (a - begin).norm()) < 1e-11
    assert float((a[: len(fixed)] - fixed).norm()) > 1e-3  # and it does something


def test_gradient_norms_of_a_decoder_are_measured_too(tmp_path, quiet_trainer):
    """Whose chunked loss could be gone through backwards only once; with checkpointing, which computes again."""
    tiny = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "pad_token_id": 0}
    tiny |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    tasks = {"lm": "causal-lm", "topic": TASKS["topic"]}
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        options = {"gradient_checkpointing": checkpointing, "offload": checkpointing, "dtype": "float64"}
        made = MultiTaskModule(tiny, tasks, weighting="gradient_norm", **options)
        batches = own_loader(["topic", "lm"])
        for batch in batches:
            batch["step_targets"] = {"topic": 3, "lm": int((batches[1]["labels"][:, 1:] != -100).sum())}
        trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[TokenWeightedAccumulation()])
        trainer.fit(made, Positions(batches))
        found.append(made.weighting.norms)
    assert (found[0] > 0).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_tasks_that_learned_less_get_more():
    even = balanced_weights([1.0, 1.0], [0.5, 1.0], [1.0, 1.0], alpha=0.0)
    uneven = balanced_weights([1.0, 1.0], [0.5, 1.0], [1.0, 1.0], alpha=1.0)
    assert even == [1.0, 1.0]
    assert uneven == pytest.approx([2 / 3, 4 / 3])


# ---- checkpoints and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "gradient_norm"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, quiet_trainer, weighting):
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole, _ = trained(tmp_path, quiet_trainer, 4, weighting=weighting)
    keep = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trained(tmp_path, quiet_trainer, 4, [keep], weighting=weighting, max_steps=3, enable_checkpointing=True)
    torch.manual_seed(5)
    resumed, _ = trained(tmp_path, quiet_trainer, 4, weighting=weighting, ckpt_path=tmp_path / "ckpt" / "step=3.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


def test_state_has_each_parameter_once_and_tied_heads_stay_tied():
    made = module()
    state = made.model.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == sum(
        p.numel() for p in made.model.parameters()
    )
    tasks = made.model.tasks
    assert tasks["lm"].cls.predictions.decoder.weight is tasks["topic"].bert.embeddings.word_embeddings.weight
    assert tasks["topic"].bert.pooler is tasks["grade"].bert.pooler
    assert tasks["topic"].classifier is not tasks["grade"].classifier
    other = module(weighting="fixed")
    for parameter in other.model.parameters():
        nn.init.zeros_(parameter)
    assert other.model.load_state_dict(state).missing_keys == []
    assert torch.equal(weights(other), weights(made))


def test_checkpoint_loads_without_data_or_arguments(tmp_path, quiet_trainer):
    """The classes are those that the data named."""
    given = {**TASKS, "topic": "sequence-classification"}
    made = MultiTaskModule(dict(MODEL), given, lr_schedule="constant", warmup=0, weighting="gradient_norm")
    made, trainer = trained(tmp_path, quiet_trainer, made=made, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = MultiTaskModule.load_from_checkpoint(tmp_path / "last.ckpt", map_location="cpu")
    assert torch.equal(weights(loaded), weights(made))
    assert loaded.task.configs["topic"].id2label == {0: "a", 1: "b", 2: "c"}
    assert loaded.task.tasks["grade"].problem_type == "regression"
    assert loaded.hparams["weighting"] == "gradient_norm"
    assert not {"task", "labels", "sequence_window"} & set(loaded.hparams)


def test_each_exported_folder_answers_in_a_pipeline_as_the_module_does(tmp_path, quiet_trainer):
    made, trainer = trained(
        tmp_path, quiet_trainer, 3, [HuggingFaceCheckpoint(str(tmp_path / "hf"))], max_epochs=1, limit_val_batches=None
    )
    folder = tmp_path / "hf" / "best"
    assert sorted(path.name for path in folder.iterdir()) == ["grade", "lm", "topic"]
    made.eval()
    pipe = transformers.pipeline("text-classification", model=str(folder / "topic"), top_k=None)
    answers = {row["label"]: row["score"] for row in pipe(["seven dogs slept"])[0]}
    tokens = trainer.datamodule.tokenizer("seven dogs slept", return_tensors="pt")
    scores = made.task.score(made.model, {**tokens, "task": "topic"})
    for index, name in enumerate("abc"):
        assert answers[name] == pytest.approx(scores["probabilities"][0, index].item(), abs=1e-6)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folder / "lm", dtype=torch.float64)
    mine = made.task.score(made.model, {**tokens, "task": "lm"})["predictions"]
    assert torch.equal(plain(**tokens).logits.argmax(-1), mine)
    assert not list((tmp_path / "hf").glob(".unfinished*"))
    trained(tmp_path, quiet_trainer, 3, [HuggingFaceCheckpoint(str(tmp_path / "hf"), monitor=None)], max_steps=1)
    assert len(list((tmp_path / "hf").glob("step-*"))) == 2  # what no link names was removed


def test_a_task_of_ones_own_is_taken_as_it_is():
    from lightning_llm.tasks import MaskedLM

    class Mine(MaskedLM):
        pass

    made = LLMModule(dict(MODEL), Mine("plain"))
    assert type(made.task) is Mine
    assert "task" not in made.hparams  # a checkpoint holds plain values alone


def test_pretrained_trunk_and_heads_are_taken(tmp_path):
    made = module()
    made.model.save_pretrained(tmp_path)
    again = MultiTaskModule(str(tmp_path / "lm"), TASKS, dtype="float64")
    again.configure_model()
    lm, own = made.model.tasks["lm"], again.model.tasks["lm"]
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), own.parameters(), strict=True))
    assert again.model.tasks["topic"].bert.encoder is own.bert.encoder


# ---- evaluation --------------------------------------------------------------------------------------------------


def test_metrics_stand_under_their_tasks_and_are_right(tmp_path, quiet_trainer):
    made, _ = trained(tmp_path, quiet_trainer, max_steps=2)
    (metrics,) = quiet_trainer().validate(made, data(tmp_path), verbose=False)
    assert {"val/topic/accuracy", "val/grade/mse", "val/lm/perplexity", "val/loss"} <= set(metrics)
    loaded = prepared(tmp_path)
    made.eval()
    total = 0.0
    for name, part in loaded.tasks.items():
        rows = part._dataset("validation")
        batch = {**rows[list(range(len(rows)))], "task": name}
        loss = float(made.task.loss(made.model, batch).mean)
        assert metrics[f"val/{name}/loss"] == pytest.approx(loss, rel=1e-9)
        total += WEIGHTS[name] * loss
    assert metrics["val/loss"] == pytest.approx(total, rel=1e-9)


def test_predictions_name_their_task_and_row(tmp_path, quiet_trainer):
    from lightning_llm.cli import write_predictions

    made, trainer = trained(tmp_path, quiet_trainer, max_steps=1)
    trainer.predict(made, data(tmp_path))
    lines = [json.loads(line) for line in write_predictions(trainer).read_text().splitlines()]
    counts = {name: len(part._dataset("test")) for name, part in prepared(tmp_path).tasks.items()}
    for name, number in counts.items():
        assert [line["row_id"] for line in lines if line["task"] == name] == list(range(number))
    assert all("probabilities" in line for line in lines if line["task"] == "topic")


def test_a_task_that_writes_generates():
    tiny = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16}
    tiny |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    made = MultiTaskModule(tiny, {"lm": "causal-lm", "topic": {"task": "sequence-classification", "labels": 2}})
    assert made.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 5)
    assert isinstance(made.model, MultiTaskModel)
    with pytest.raises(ValueError, match=r"one that writes \(of \['lm'\]\), but got 'topic'"):
        made.generate(torch.tensor([[1, 2]]), task="topic")


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks_train_as_one(tmp_path, quiet_trainer, run_ranks):
    """Also if one of them runs out of memory; without looking for parameters that a batch does not use."""
    names = ["fixed", "uncertainty", "gradient_norm"]
    truth = {name: run(tmp_path, quiet_trainer, 3, weighting=name) for name in names}
    begin = {name: weights(module(weighting=name)) for name in names}
    torch.save({"truth": truth, "begin": begin}, tmp_path / "truth.pt")
    for rank, found in enumerate(run_ranks("multi_task", 2, time_limit=180, truth=str(tmp_path / "truth.pt"))):
        for name in names:
            assert found[name]["error"] < 1e-11
            assert found[name]["scarce error"] < 1e-11
            assert found[name]["rows once"]
            assert bool(found[name]["failed"]) == (rank == 1)


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "options", "text"),
    [
        ({}, {}, "mapping of names to tasks, one at least"),
        (None, {}, "mapping of names to tasks, one at least, but got None"),
        ({"a": "no-such"}, {}, "`task` must be one of .*but got 'no-such'"),
        ({"a": {"labels": 3}}, {}, "'a' must be a name such as 'masked-lm', or a mapping with `task`"),
        ({"a": {"task": "masked-lm", "label": 3}}, {}, "must be a name such as"),
        ({"a/b": "masked-lm"}, {}, "letters, digits, '_' and '-'.*but got 'a/b'"),
        ({"train": "masked-lm"}, {}, "no word that torch keeps"),
        ({"a": "masked-lm"}, {"weights": {"b": 1.0}}, "`weights` name b, but the tasks are a"),
        ({"a": "masked-lm"}, {"weights": {"a": -1.0}}, "must be above 0, but that of 'a' is -1.0"),
        ({"a": "masked-lm"}, {"weighting": "magic"}, "fixed, uncertainty, gradient_norm, but got 'magic'"),
        ({"a": "masked-lm"}, {"weighting_options": {"alpha": 1}}, "the others have none"),
        ({"a": "masked-lm"}, {"weighting": "gradient_norm", "weighting_options": {"decay": 2}}, "`decay` must lie"),
        ({"a": "causal-lm"}, {"weighting": "gradient_norm", "loss_kernel": "cce"}, "backwards twice"),
        ({"a": "masked-lm"}, {"sequence_window": 8}, "`sequence_window` is for one task"),
        ({"a": "masked-lm"}, {"labels": ["x"]}, "`labels` is for one task"),
        ({"a": "masked-lm"}, {"peft": {"peft_type": "LORA"}}, "`peft` is for one model"),
        ({"a": "masked-lm", "b": "dpo"}, {}, "'b': 'dpo' trains alone"),
    ],
)
def test_bad_settings_are_refused_by_name(tasks, options, text):
    with pytest.raises(ValueError, match=text):
        MultiTaskModule(dict(MODEL), tasks, **options)


def test_built_models_plans_and_models_that_share_nothing_are_refused():
    built = module().model.tasks["lm"]
    with pytest.raises(ValueError, match="got a built BertForMaskedLM"):
        MultiTaskModule(built, {"a": "masked-lm"})
    with pytest.raises(ValueError, match="Plans are made for one task"):
        module().plan(64)
    sharded = module()
    sharded._device_mesh = object()
    with pytest.raises(ValueError, match="trains whole models: use one device or DDPStrategy"):
        sharded.setup("fit")
    other = LLMModule({**MODEL, "hidden_size": 8}, "masked-lm")
    other.configure_model()
    with pytest.raises(ValueError, match="differ in `embeddings`"):
        MultiTaskModel({"a": built, "b": other.model})


def test_module_and_data_with_other_tasks_are_refused(tmp_path, quiet_trainer):
    made = MultiTaskModule(dict(MODEL), {**TASKS, "more": "masked-lm"})
    with pytest.raises(ValueError, match="has the tasks grade, lm, more, topic, the data module grade, lm, topic"):
        trained(tmp_path, quiet_trainer, made=made)


def test_training_without_the_callback_that_weights_is_refused(tmp_path, quiet_trainer):
    with pytest.raises(ValueError, match="needs the callback TokenWeightedAccumulation"):
        quiet_trainer(max_steps=1, accumulate_grad_batches=3).fit(module(), data(tmp_path))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda batch: batch.pop("task"), KeyError, "names its own as batch\\['task'\\]"),
        (lambda batch: batch.update(task="other"), ValueError, "is for the task 'other', but the module has"),
        (lambda batch: batch.pop("step_targets"), KeyError, "targets each task has in the whole optimizer step"),
        (lambda batch: batch.update(step_targets={"lm": 3}), KeyError, r"`step_targets` for \['lm'\]"),
        (
            lambda batch: batch.update(step_targets={"topic": 9, "grade": 0, "lm": 0}),
            ValueError,
            "held .*'topic': 3.* targets, but their `step_targets` say .*'topic': 9",
        ),
    ],
)
def test_batches_of_a_loader_of_ones_own_are_looked_at(quiet_trainer, change, kind, text):
    (batch,) = own_loader(["topic"])
    change(batch)
    trainer = quiet_trainer(max_epochs=1, callbacks=[TokenWeightedAccumulation()])
    with pytest.raises(kind, match=text):
        trainer.fit(module(), Positions([batch]))


def test_configuration_in_the_repository_trains_from_the_command_line(tmp_path, monkeypatch):
    from lightning_llm.cli import main

    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    short = [
        "--trainer.max_steps",
        "2",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.logger.init_args.save_dir",
    ]
    main(
        [
            "fit",
            "--config",
            "configs/multi_task.yaml",
            *short,
            str(tmp_path),
            "--trainer.val_check_interval",
            "1",
            "--trainer.log_every_n_steps",
            "1",
        ]
    )
    (path,) = tmp_path.rglob("metrics.csv")
    header = path.read_text().splitlines()[0]
    assert "val/topic/accuracy" in header
    assert "train/lm/loss" in header
    (folder,) = tmp_path.rglob("huggingface")
    assert (folder / "last" / "topic" / "model.safetensors").exists()
