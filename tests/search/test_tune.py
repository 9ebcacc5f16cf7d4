"""``lightning-llm tune``: a real study of tiny models, killed and gone on with, and what it refuses."""

import os
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest
import yaml

from lightning_llm.cli import main

SPACE = ["--search.model.learning_rate", "{log_uniform: [1e-6, 3e-2]}"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model with one layer on a few texts of bytes; ten optimizer steps, validated five times."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "text").mkdir()
    for index in range(12):
        (folder / "text" / f"{index}.txt").write_text(f"Some words of the text with number {index}. " * 8)
    settings = {
        "seed_everything": 0,
        "model": {
            "model": {
                "model_type": "llama", "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32,
                "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
            },
            "lr_schedule": "constant", "warmup": 0,
        },
        "data": {
            "data": str(folder / "text"), "tokenizer": "bytes", "max_length": 32, "micro_batch_size": 4,
            "validation_fraction": 0.2, "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 10, "val_check_interval": 2,
            "limit_val_batches": 1, "num_sanity_val_steps": 0, "logger": False,
            "default_root_dir": str(folder / "plain"),
            "callbacks": [
                {"class_path": "lightning_llm.callbacks.TokenWeightedAccumulation"},
                {"class_path": "lightning_llm.callbacks.HuggingFaceCheckpoint"},
                {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"},
            ],
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def arguments(config, folder, *others, trials=3):
    return ["tune", "--config", str(config), "--folder", str(folder), "--trials", str(trials), *others]


def trials_of(folder):
    return optuna.load_study(study_name="tune", storage=f"sqlite:///{folder}/tune/study.db").trials


def test_study_finds_a_learning_rate_and_its_best_yaml_reproduces_the_trial(config, tmp_path, capsys):
    main(arguments(config, tmp_path, *SPACE, trials=9))
    out = capsys.readouterr().out
    trials = trials_of(tmp_path)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    best, worst = (choose(complete, key=lambda trial: trial.value) for choose in (min, max))
    assert best.value < worst.value - 0.5
    assert best.params["model.learning_rate"] > 1e-3 > worst.params["model.learning_rate"]

    assert pruned, out
    assert all(trial.user_attrs["steps"] < 10 for trial in pruned)
    assert all(trial.user_attrs["steps"] == 10 for trial in complete)
    assert f"9 trials ({len(complete)} completed, {len(pruned)} pruned)" in out
    assert len(re.findall(r"pruned after \d+%", out)) == len(pruned)

    folder = tmp_path / "tune"
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "study.png") in out
    own = yaml.safe_load((folder / f"trial-{best.number:04d}" / "config.yaml").read_text())
    assert own["model"]["learning_rate"] == best.params["model.learning_rate"]
    assert not [*folder.rglob("*.ckpt"), *folder.rglob("*.safetensors")]
    chosen = yaml.safe_load((folder / "best.yaml").read_text())
    assert len(chosen["trainer"]["callbacks"]) == 3  # the run itself writes weights and shows its progress

    main(["fit", "--config", str(folder / "best.yaml")])
    shown = capsys.readouterr().out
    losses = re.findall(r"val/loss=([0-9.]+)", shown)
    assert float(losses[-1]) == pytest.approx(best.value, abs=0.006)  # as the progress bar rounds it

    main(arguments(config, tmp_path, *SPACE, trials=9))  # nothing is missing
    assert len(trials_of(tmp_path)) == 9


def test_killed_search_goes_on_with_the_trial_that_was_under_way(config, tmp_path):
    slow = [*SPACE, "--pruner", "none", "--trainer.max_epochs", "5"]
    command = [sys.executable, "-m", "lightning_llm", *arguments(config, tmp_path, *slow)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    seen, end = b"", time.monotonic() + 150
    while not re.search(rb"trial 1: learning_rate \S+: \d", seen) and time.monotonic() < end:
        seen += os.read(process.stdout.fileno(), 4096) or pytest.fail(seen.decode())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE", "RUNNING"]

    main(arguments(config, tmp_path, *slow))
    trials = trials_of(tmp_path)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == trials[2].params
    assert len({trial.params["model.learning_rate"] for trial in trials}) == 3


def test_loss_that_is_not_finite_fails_its_trial_and_not_the_search(config, tmp_path, capsys):
    space = ["--search.model.learning_rate", "{choice: [1e-3, 1e+30]}", "--seed", "1"]
    main(arguments(config, tmp_path, *space, trials=5))
    out = capsys.readouterr().out
    trials = trials_of(tmp_path)
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert 0 < len(failed) < 5 == len(trials)
    assert all(trial.params["model.learning_rate"] == 1e30 for trial in failed)
    assert all(trial.user_attrs["reason"].startswith("not finite") for trial in failed)
    assert f"trial {failed[0].number} failed, not finite" in out


def test_an_error_stops_at_once_and_the_mended_command_begins_anew(config, tmp_path):
    with pytest.raises(ValueError, match="no metric 'val/los' after a validation"):
        main(arguments(config, tmp_path, *SPACE, "--metric", "val/los", trials=1))
    main(arguments(config, tmp_path, *SPACE, trials=1))
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "There is nothing to search"),
        (["--search.model.learning_rat", "{uniform: [0, 1]}"], "Did you mean `model.learning_rate`"),
        (["--search.model.learning_rate", "{uniforms: [0, 1]}"], "Did you mean `uniform`"),
        (["--search.model.learning_rate", "{choice: [fast]}"], "model.learning_rate: fast"),
        (["--search.data.micro_batch_size", "{uniform: [1, 4]}"], "data.micro_batch_size"),
        (["--search.model.model.hiden_size", "{int: [8, 16]}"], "no field `hiden_size`. Did you mean `hidden_size`"),
        (["--search.model.learning_rate"], "needs what may be drawn"),
        (["--search.model.learning_rate", "{a: ["], "is no YAML"),
        (["--search", "none.yaml"], "There is no file none.yaml"),
        ([*SPACE, "--trainer.max_epochs", "-1"], "A trial needs an end"),
        ([*SPACE, "--trainer.devices", "2"], "Add --trainer.devices 1"),
        ([*SPACE, "--ckpt_path", "some.ckpt"], "Leave ckpt_path out"),
        ([*SPACE, "--model.learning_rat", "1"], "model.learning_rat"),
        ([*SPACE, "--prune_after", "20"], "share of the run"),
        ([*SPACE, "--study", "a/b"], "a name that a folder may have"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained_or_written(config, tmp_path, others, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments(config, tmp_path / "runs", *others))
    assert message in str(stop.value.code)
    assert not (tmp_path / "runs").exists()


def test_without_optuna_it_says_how_to_get_it(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as stop:
        main(arguments(config, tmp_path, *SPACE))
    assert "pip install 'lightning-llm[search]'" in str(stop.value.code)


def test_search_over_batches_in_equal_steps_is_warned_of(config, tmp_path, capsys):
    space = ["--search.data.global_batch_size", "{choice: [4, 8]}", "--trainer.max_steps", "2"]
    main(arguments(config, tmp_path, *space, trials=1))
    assert "trains on more tokens" in capsys.readouterr().out
