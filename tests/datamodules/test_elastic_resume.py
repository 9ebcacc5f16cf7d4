"""A run that stops and goes on, on the same or another layout, trains on what the whole run trains on, step by step."""

import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from elastic_training import NUM_STEPS, data_module, run, steps_of

ROOT = Path(__file__).parents[2]

# name: data options, accumulation
SETTINGS = {
    "rows": ({}, 4),
    "global": ({"global_batch_size": 8}, 2),
    "ramp": ({"global_batch_size": {"0 samples": 4, "20 samples": 8, "90 samples": 12}}, 2),
    "tokens": ({"global_batch_tokens": 200, "batching": "padding_free", "windowing": "documents"}, 2),
    "padded": ({"batching": "padded", "windowing": "windows", "micro_batch_tokens": 96}, 4),
    "padding_free": ({"batching": "padding_free", "micro_batch_tokens": 64}, 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted runs, each with checkpoints at some steps and micro-batches."""
    made = {}

    def get(name):
        if name not in made:
            data, accumulate = SETTINGS[name]
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            save = {"save_steps": range(1, NUM_STEPS), "save_batches": range(1, 40)}
            made[name] = (folder, *run(folder, "whole", data=data, accumulate=accumulate, record=save))
        return made[name]

    return get


@pytest.mark.parametrize("name", SETTINGS)
def test_every_epoch_of_a_run_holds_each_row_once(whole, name):
    folder, steps, _ = whole(name)
    data = data_module(folder, **SETTINGS[name][0])
    data.setup("fit")
    num_rows = len(data.table())
    epochs = sorted({epoch for epoch, _ in steps.values()})
    assert len(epochs) > 1
    for epoch in epochs[:-1]:
        rows = [row for number, rows in steps.values() if number == epoch for row in rows]
        assert sorted(rows) == list(range(num_rows))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("step", [3, 8, 11, "end of epoch"])
def test_the_same_layout_goes_on_bitwise(whole, name, step):
    folder, steps, weights = whole(name)
    if step == "end of epoch":
        step = max(s for s, (epoch, _) in steps.items() if epoch == 0)
    data, accumulate = SETTINGS[name]
    rest, resumed = run(folder, "again", data=data, accumulate=accumulate, resume=folder / f"step{step}.ckpt")
    assert rest == {s: value for s, value in steps.items() if s > step}
    assert torch.equal(resumed, weights)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(whole, name, workers):
    folder, steps, weights = whole(name)
    data, accumulate = SETTINGS[name]
    rest, resumed = run(
        folder,
        "workers",
        data={**data, "num_workers": workers},
        accumulate=accumulate,
        resume=folder / "step8.ckpt",
        record={"save_steps": [10]},
    )
    assert rest == {s: value for s, value in steps.items() if s > 8}
    assert torch.equal(resumed, weights)
    # and what they had prepared when a checkpoint was saved is not in it
    later, _ = run(folder, "later", data=data, accumulate=accumulate, resume=folder / "step10.ckpt")
    assert later == {s: value for s, value in steps.items() if s > 10}


@pytest.mark.parametrize(
    ("name", "accumulate"), [("global", 1), ("global", 4), ("ramp", 1), ("ramp", 4), ("tokens", 4)]
)
def test_another_number_of_micro_batches_goes_on_with_the_same_steps(whole, name, accumulate):
    folder, steps, _ = whole(name)
    for step in (5, 9):
        rest, _ = run(folder, "cut", data=SETTINGS[name][0], accumulate=accumulate, resume=folder / f"step{step}.ckpt")
        assert rest == {s: value for s, value in steps.items() if s > step}


@pytest.mark.parametrize("name", ["rows", "global", "padded"])
def test_a_checkpoint_inside_a_window_is_that_of_its_start(whole, name):
    """Also without AccumulationSchedule, which rewinds the rest of the checkpoint."""
    folder, steps, weights = whole(name)
    data, accumulate = SETTINGS[name]
    for batch in (5, 6, 7, 14 if accumulate == 4 else 13):
        rest, resumed = run(folder, "inside", data=data, accumulate=accumulate, resume=folder / f"batch{batch}.ckpt")
        first = min(rest)
        assert rest == {s: value for s, value in steps.items() if s >= first}
        assert first <= batch // accumulate + 1 + (accumulate > 2)
        assert torch.equal(resumed, weights)


def test_limited_epochs_and_their_ends_are_resumed(tmp_path):
    options = {"trainer": {"limit_train_batches": 6, "max_epochs": 5, "max_steps": -1}, "accumulate": 2}
    steps, weights = run(tmp_path, "whole", **options, record={"save_steps": range(1, 15)})
    assert len(steps) == 15
    for step in (2, 3, 4, 6, 7):
        rest, resumed = run(tmp_path, "again", **options, resume=tmp_path / f"step{step}.ckpt")
        assert rest == {s: value for s, value in steps.items() if s > step}
        assert torch.equal(resumed, weights)


def test_validation_inside_an_epoch_and_checkpoints_from_it(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def options():
        keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, monitor=None, every_n_epochs=1)
        return {
            "trainer": {"enable_checkpointing": True, "val_check_interval": 0.25, "max_epochs": 2, "max_steps": -1},
            "callbacks": [keep],
            "accumulate": 2,
        }

    steps, weights = run(tmp_path, "whole", **options())
    saved = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))
    assert len(saved) > 2
    for path in saved[:-1]:
        rest, resumed = run(tmp_path, "again", **options(), resume=path)
        assert set(rest) == set(range(min(rest), max(steps) + 1))
        assert all(rest[s] == steps[s] for s in rest)
        assert torch.equal(resumed, weights)


@pytest.mark.parametrize("name", ["rows", "ramp"])
def test_a_run_that_max_steps_ended_inside_an_epoch_goes_on_there(whole, name):
    """Lightning takes the epoch for done in a checkpoint that is saved after `fit`."""
    folder, steps, weights = whole(name)
    data, accumulate = SETTINGS[name]
    for step in (5, 12):
        save = SaveAtEnd(folder / f"end{step}.ckpt")
        run(folder, "first", data=data, accumulate=accumulate, steps=step, callbacks=[save])
        rest, resumed = run(folder, "again", data=data, accumulate=accumulate, resume=save.path)
        assert rest == {s: value for s, value in steps.items() if s > step}
        assert torch.equal(resumed, weights)


class SaveAtEnd(L.Callback):
    def __init__(self, path):
        self.path = path

    def teardown(self, trainer, pl_module, stage):
        trainer.save_checkpoint(self.path)


class SaveAfterValidation(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"val{trainer.global_step}.ckpt")


@pytest.mark.parametrize("interval", [4, 0.25, 0.5])
def test_checkpoints_of_a_validation_go_on_with_other_micro_batches_also_at_an_epochs_end(tmp_path, interval):
    trainer = {"max_epochs": 3, "max_steps": -1, "val_check_interval": interval}
    data = {"global_batch_size": {"0 samples": 4, "20 samples": 8, "90 samples": 12}}
    steps, _ = run(
        tmp_path, "whole", data=data, trainer=trainer, accumulate=2, callbacks=[SaveAfterValidation(tmp_path)]
    )
    saved = sorted(tmp_path.glob("val*.ckpt"))
    assert len(saved) > 3
    for path in saved:
        step = int(path.stem[3:])
        for accumulate in (1, 2, 3):
            if step == max(steps):
                continue  # nothing is left to train
            rest, _ = run(tmp_path, "again", data=data, trainer=trainer, accumulate=accumulate, resume=path)
            assert rest == {s: value for s, value in steps.items() if s > step}, (path, accumulate)


def test_the_first_step_after_a_change_of_micro_batches_is_a_whole_one(tmp_path):
    """Else Lightning would divide the gradient of a few micro-batches by the number of many."""

    class Windows(L.Callback):
        def __init__(self):
            self.held, self.sizes = 0, []

        def on_after_backward(self, trainer, pl_module):
            self.held += 1

        def on_train_batch_end(self, trainer, *_):
            if not trainer.fit_loop._should_accumulate():
                self.sizes.append(self.held)
                self.held = 0

    run(tmp_path, "whole", accumulate=1, record={"save_steps": [3, 5]}, steps=6)
    for step in (3, 5):
        for data, accumulate in (({}, 4), ({"micro_batch_size": 3}, 2)):
            windows = Windows()
            resume = tmp_path / f"step{step}.ckpt"
            run(tmp_path, "w", data=data, accumulate=accumulate, resume=resume, steps=step + 4, callbacks=[windows])
            assert windows.sizes == [accumulate] * 4


def test_a_global_batch_set_at_the_edges_holds_from_the_next_step_on_and_is_saved(tmp_path):
    class SetAndSave(L.Callback):
        def __init__(self, hook, step):
            self.step, self.is_done = step, False
            setattr(self, hook, self._set)

        def _set(self, trainer, *_):
            if trainer.global_step == self.step and not self.is_done:
                self.is_done = True
                trainer.datamodule.set_global_batch(12)
                trainer.save_checkpoint(tmp_path / "set.ckpt")

    data = {"global_batch_size": 6}
    for hook, step in (("on_train_start", 0), ("on_train_batch_end", 3), ("on_train_epoch_end", 13)):
        steps, weights = run(tmp_path, "whole", data=data, accumulate=2, callbacks=[SetAndSave(hook, step)])
        sizes = [len(rows) for _, rows in steps.values()]
        assert set(sizes[:step]) <= {6, 1}, hook  # an epoch of 73 rows ends with one of 1
        assert sizes[step] == 12, hook
        if hook != "on_train_start":
            rest, resumed = run(tmp_path, "again", data=data, accumulate=2, resume=tmp_path / "set.ckpt")
            # Lightning's own number of the epoch is one behind after a checkpoint from `on_train_epoch_end`
            assert {s: rows for s, (_, rows) in rest.items()} == {s: v[1] for s, v in steps.items() if s > step}, hook
            assert torch.equal(resumed, weights)


def test_loaders_that_are_made_anew_each_epoch_go_on_with_the_schedule(tmp_path):
    data = {"global_batch_size": {"0 samples": 4, "20 samples": 8}}
    steps, _ = run(tmp_path, "whole", data=data)
    again, _ = run(tmp_path, "again", data=data, trainer={"reload_dataloaders_every_n_epochs": 1})
    assert again == steps


def test_a_checkpoint_without_a_position_or_with_a_foreign_one_is_named(tmp_path):
    run(tmp_path, "whole", record={"save_steps": [3]}, steps=4)
    state = torch.load(tmp_path / "step3.ckpt", weights_only=True)
    state["loops"]["fit_loop"]["state_dict"].pop("combined_loader")
    state["TextDataModule"] = {"position": 3}
    torch.save(state, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"is of another kind \(its entries are \['position'\]\): another data module"):
        run(tmp_path, "again", resume=tmp_path / "foreign.ckpt", steps=4)
    del state["TextDataModule"]
    torch.save(state, tmp_path / "none.ckpt")
    with pytest.warns(UserWarning, match="holds no position of this data module"):
        run(tmp_path, "again", resume=tmp_path / "none.ckpt", steps=5)


def test_a_global_batch_that_a_callback_sets_holds_from_the_next_step_and_after_a_resume(tmp_path):
    class Grow(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3 and trainer.fit_loop.epoch_loop.batch_idx % 2:
                trainer.datamodule.set_global_batch(12)
            if trainer.global_step == 9 and trainer.fit_loop.epoch_loop.batch_idx % 2:
                trainer.datamodule.set_global_batch(4)

    for workers in (0, 2):
        data = {"global_batch_size": 6, "num_workers": workers}
        folder = tmp_path / str(workers)
        folder.mkdir()
        steps, weights = run(
            folder, "whole", data=data, accumulate=2, callbacks=[Grow()], record={"save_steps": range(1, 14)}
        )
        sizes = [len(rows) for _, rows in steps.values()]
        assert sizes[:4] == [6, 6, 6, 12]
        assert 12 not in sizes[9:]
        assert 4 in sizes[9:]
        epochs = {}
        for epoch, rows in steps.values():
            epochs.setdefault(epoch, []).extend(rows)
        assert sorted(epochs[0]) == list(range(len(epochs[0])))  # nothing lost or repeated at the change
        for step in (5, 8, 11):
            rest, resumed = run(
                folder, "again", data=data, accumulate=2, callbacks=[Grow()], resume=folder / f"step{step}.ckpt"
            )
            assert rest == {s: value for s, value in steps.items() if s > step}
            assert torch.equal(resumed, weights)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    steps, weights = run(tmp_path, "whole", accumulate=2)
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from elastic_training import run\n"
        "record = {'save_steps': [5, 10], 'kill_at': 13}\n"
        "run(sys.argv[1], 'killed', accumulate=2, record=record, data={'num_workers': 2})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT / "tests")], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -9, done.stderr[-2000:]
    killed = steps_of(tmp_path / "killed.jsonl")
    assert killed == {s: value for s, value in steps.items() if s <= 13}
    rest, resumed = run(tmp_path, "rest", accumulate=2, resume=tmp_path / "step10.ckpt")
    assert rest == {s: value for s, value in steps.items() if s > 10}
    assert torch.equal(resumed, weights)


@pytest.mark.timeout(300)
def test_one_two_and_four_ranks_go_on_with_the_same_steps(whole, run_ranks):
    """Saved on 1 rank and resumed on 2 and 4; saved on 2 and resumed on 1 and 4."""
    for world_size, folder_of in ((2, {}), (4, {})):
        for name in SETTINGS:
            folder_of[name] = str(whole(name)[0])
        results = run_ranks("elastic_resume", world_size, time_limit=200, folders=folder_of, settings=SETTINGS)
        for name in SETTINGS:
            folder, steps, _ = whole(name)
            paths = [folder / f"world{world_size}-rank{rank}.jsonl" for rank in range(world_size)]
            assert steps_of(*paths) == {s: value for s, value in steps.items() if s > 6}, (name, world_size)
            assert len({result[name] for result in results}) == 1  # the same weights on every rank
            data, accumulate = SETTINGS[name]
            rest, _ = run(
                folder, "one", data=data, accumulate=accumulate, resume=folder / f"world{world_size}" / "step10.ckpt"
            )
            assert rest == {s: value for s, value in steps.items() if s > 10}, (name, world_size)


def test_other_data_or_settings_are_refused_by_name(whole, tmp_path):
    folder, _, _ = whole("rows")
    for option, value, message in (
        ("max_length", 16, "max_length was 32 and is 16"),
        ("seed", 4, "seed was 3 and is 4"),
        ("windowing", "windows", "windowing was 'packed' and is 'windows'"),
        ("validation_fraction", 0.0, "documents was 41 and is 48|documents was 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, "refused", data={option: value}, accumulate=4, resume=folder / "step3.ckpt")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    text = (folder / "data.jsonl").read_text().replace("ab ab ab ab", "cd cd cd cd", 1)
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"saved over other data, .*: content was '\w+' and is '\w+'. Bring the data"):
        run(tmp_path, "refused", accumulate=4, resume=folder / "step3.ckpt")


def test_budget_and_rows_cannot_continue_each_other(whole):
    folder, _, _ = whole("rows")
    with pytest.raises(ValueError, match="batches was 'rows' and is 'pools'"):
        data = {"batching": "padding_free", "micro_batch_tokens": 64}
        run(folder, "refused", data=data, accumulate=4, resume=folder / "step3.ckpt")
