"""Folders that from_pretrained loads, whole at every moment."""

import lightning as L
import pytest
import torch
from support import pad_rows, ragged_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_llm import LLMModule
from lightning_llm.callbacks import HuggingFaceCheckpoint
from lightning_llm.callbacks.huggingface_checkpoint import improves, write_folder
from lightning_llm.datamodules.tokenizer import byte_tokenizer


def loader(rows):
    return DataLoader(rows, batch_size=4, collate_fn=pad_rows)


class Scores(L.Callback):
    """Lets `val/score` take given values."""

    def __init__(self, values):
        self.values = iter(values)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", next(self.values), batch_size=1)


def fit(trainer, module, epochs_of_rows=8):
    trainer.fit(module, loader(ragged_rows(epochs_of_rows)), loader(ragged_rows(4, seed=1)))


def test_last_folder_is_the_trained_model_with_tokenizer_and_generation_config(tiny_llama, quiet_trainer, tmp_path):
    tokenizer = byte_tokenizer()
    module = LLMModule(tiny_llama, learning_rate=1e-2)
    export = HuggingFaceCheckpoint(str(tmp_path / "hf"), tokenizer=tokenizer)
    fit(quiet_trainer(max_epochs=1, callbacks=[export]), module)
    folder = tmp_path / "hf" / "last"
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    text = AutoTokenizer.from_pretrained(folder)
    ids = text("def ", return_tensors="pt")["input_ids"]
    assert text.decode(loaded.generate(ids, max_new_tokens=5, do_sample=False)[0]).startswith("def ")
    assert export.written_paths() == {
        "Hugging Face last": str(tmp_path / "hf" / "last"),
        "Hugging Face best": str(tmp_path / "hf" / "best"),
    }


def test_best_follows_the_metric_and_only_linked_folders_stay(tiny_gpt2, quiet_trainer, tmp_path):
    export = HuggingFaceCheckpoint(str(tmp_path), monitor="val/score", mode="max")
    callbacks = [Scores([1.0, 3.0, float("nan"), 2.0]), export]
    fit(quiet_trainer(max_epochs=4, callbacks=callbacks), LLMModule(tiny_gpt2))
    assert (tmp_path / "best").resolve().name == "step-00000004"
    assert (tmp_path / "last").resolve().name == "step-00000008"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000004", "step-00000008"]
    assert export.best_score == 3.0


def test_best_score_survives_a_resume(tiny_gpt2, quiet_trainer, tmp_path):
    def run(values, max_epochs, ckpt_path=None):
        export = HuggingFaceCheckpoint(str(tmp_path / "hf"), monitor="val/score")
        trainer = quiet_trainer(max_epochs=max_epochs, callbacks=[Scores(values), export])
        rows = loader(ragged_rows(8)), loader(ragged_rows(4))
        trainer.fit(LLMModule(tiny_gpt2), *rows, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "run.ckpt")

    run([1.0], 1)
    run([5.0], 2, tmp_path / "run.ckpt")
    assert (tmp_path / "hf" / "best").resolve().name == "step-00000002"
    assert (tmp_path / "hf" / "last").resolve().name == "step-00000004"


def test_without_validation_last_is_written_at_the_end_and_at_intervals(tiny_gpt2, quiet_trainer, tmp_path):
    class Seen(L.Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_start(self, *args):
            if (tmp_path / "last").exists():
                self.steps.append((tmp_path / "last").resolve().name)

    seen = Seen()
    export = HuggingFaceCheckpoint(str(tmp_path), every_n_steps=2)
    trainer = quiet_trainer(max_epochs=1, callbacks=[export, seen])
    trainer.fit(LLMModule(tiny_gpt2), loader(ragged_rows(20)))
    assert sorted(set(seen.steps)) == ["step-00000002", "step-00000004"]
    assert (tmp_path / "last").resolve().name == "step-00000005"


def test_readers_always_find_a_whole_folder(tiny_gpt2, tmp_path):
    """While one thread replaces the folder again and again, another one loads it again and again."""
    import threading

    module = LLMModule(tiny_gpt2)
    module.configure_model()
    write_folder(module.model, None, None, tmp_path, 0, ["last"])
    done, failures, loads = threading.Event(), [], [0]

    def read():
        while not done.is_set():
            try:
                folder = (tmp_path / "last").resolve(strict=True)
                assert (folder / "config.json").exists()
                assert (folder / "model.safetensors").exists()
                loads[0] += 1
            except (OSError, AssertionError) as error:
                if folder == (tmp_path / "last").resolve():  # else it was replaced while we looked
                    failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(1, 15):
        write_folder(module.model, None, None, tmp_path, step, ["last"])
    done.set()
    reader.join(timeout=30)
    assert loads[0] > 10
    assert not failures


def test_write_that_fails_leaves_the_old_folder(tiny_gpt2, tmp_path):
    module = LLMModule(tiny_gpt2)
    module.configure_model()
    write_folder(module.model, None, None, tmp_path, 1, ["last", "best"])

    class FullDisk:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_folder(module.model, None, FullDisk(), tmp_path, 2, ["last", "best"])
    assert (tmp_path / "last").resolve().name == (tmp_path / "best").resolve().name == "step-00000001"
    AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    folder = write_folder(module.model, None, None, tmp_path, 2, ["last"])
    assert folder.name == "step-00000002"
    assert not list(tmp_path.glob(".unfinished*"))


def test_second_run_to_the_same_step_replaces_the_first(tiny_gpt2, tmp_path):
    module = LLMModule(tiny_gpt2)
    module.configure_model()
    for _ in range(2):
        write_folder(module.model, None, None, tmp_path, 5, ["last"])
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000005-2"]


def test_folders_that_others_wrote_are_left_alone(tiny_gpt2, tmp_path):
    for name in ("step-100.ckpt", "step-00000099", "step-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("keep")
    (tmp_path / "step-1.txt").write_text("keep")
    module = LLMModule(tiny_gpt2)
    module.configure_model()
    for step in (1, 2):
        write_folder(module.model, None, None, tmp_path, step, ["last"])
    names = {path.name for path in tmp_path.glob("step-*")}
    assert names == {"step-100.ckpt", "step-00000099", "step-notes", "step-1.txt", "step-00000002"}


def test_two_that_write_to_one_folder_are_refused(tiny_gpt2, quiet_trainer, tmp_path):
    exports = [HuggingFaceCheckpoint(str(tmp_path), monitor=name) for name in ("val/loss", "val/perplexity")]
    with pytest.raises(ValueError, match=r"Two HuggingFaceCheckpoint callbacks write to .*Give each a `dirpath`"):
        fit(quiet_trainer(max_epochs=1, callbacks=exports), LLMModule(tiny_gpt2))


def test_best_is_written_anew_where_a_resumed_run_has_another_folder(tiny_gpt2, quiet_trainer, tmp_path):
    for folder, score, epochs, ckpt_path in (("a", 1.0, 1, None), ("b", 5.0, 2, tmp_path / "run.ckpt")):
        export = HuggingFaceCheckpoint(str(tmp_path / folder), monitor="val/score")
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[Scores([score]), export])
        trainer.fit(LLMModule(tiny_gpt2), loader(ragged_rows(8)), loader(ragged_rows(4)), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        assert (tmp_path / folder / "best" / "model.safetensors").exists()


def test_lora_adapters_are_written_alone(tiny_llama, quiet_trainer, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_llama))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    export = HuggingFaceCheckpoint(str(tmp_path), monitor=None)
    fit(quiet_trainer(max_epochs=1, callbacks=[export]), LLMModule(model, learning_rate=1e-2))
    assert (tmp_path / "last" / "adapter_model.safetensors").exists()
    torch.manual_seed(0)
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_llama))
    loaded = PeftModel.from_pretrained(again, tmp_path / "last")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_unknown_metric_is_named_with_those_there_are(tiny_gpt2, quiet_trainer, tmp_path):
    export = HuggingFaceCheckpoint(str(tmp_path), monitor="val/accuracy")
    with pytest.raises(ValueError, match=r"monitor='val/accuracy'\): no such metric is logged; there are .*val/loss"):
        fit(quiet_trainer(max_epochs=1, callbacks=[export]), LLMModule(tiny_gpt2))


def test_module_without_a_hugging_face_model_is_refused(quiet_trainer, tmp_path):
    from support import Plain

    data = DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=2)
    with pytest.raises(TypeError, match=r"should have `save_pretrained`, but Plain.model is NoneType"):
        quiet_trainer(max_epochs=1, callbacks=[HuggingFaceCheckpoint(str(tmp_path))]).fit(Plain(), data)


def test_folder_in_the_way_of_a_link_is_not_touched(tiny_gpt2, tmp_path):
    module = LLMModule(tiny_gpt2)
    module.configure_model()
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="last is in the way"):
        write_folder(module.model, None, None, tmp_path, 1, ["last"])
    assert (tmp_path / "last" / "mine").read_text() == "keep"


def test_improvement_never_comes_from_nan():
    assert improves(1.0, None, "min")
    assert improves(1.0, 2.0, "min")
    assert not improves(1.0, 2.0, "max")
    assert not improves(float("nan"), None, "min")
    with pytest.raises(ValueError, match="`mode` must be 'min' or 'max', but got 'low'"):
        HuggingFaceCheckpoint(mode="low")


def test_two_of_them_save_and_load_their_own_state(tiny_gpt2, quiet_trainer, tmp_path):
    exports = [HuggingFaceCheckpoint(str(tmp_path / name), monitor=name) for name in ("val/loss", "val/perplexity")]
    trainer = quiet_trainer(max_epochs=1, callbacks=exports)
    fit(trainer, LLMModule(tiny_gpt2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    states = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in states if key.startswith("HuggingFaceCheckpoint")]) == 2
