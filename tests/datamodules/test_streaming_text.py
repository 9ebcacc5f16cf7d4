"""StreamingTextDataModule in a Trainer: what is trained, validated, saved and resumed."""

import gzip
import json
import os
import random
import subprocess
import sys

import datasets
import lightning as L
import pytest
import torch
from stream_training import MODEL, SaveEvery, steps_of, train, write_corpus

from lightning_llm import LLMModule
from lightning_llm.datamodules.streaming_text import StreamingTextDataModule, reading_cost
from lightning_llm.datamodules.streams.loader import StreamLoader
from lightning_llm.datamodules.streams.shards import ShardError
from lightning_llm.loss import shift_labels


@pytest.fixture
def data(tmp_path):
    return write_corpus(tmp_path / "corpus")


def read_texts(data):
    from pathlib import Path

    return [json.loads(line)["text"] for path in sorted(Path(data).glob("*.jsonl")) for line in path.open()]


def make(data, **options):
    defaults = {"max_length": 64, "micro_batch_size": 4, "num_streams": 4, "pool_tokens": 600}
    return StreamingTextDataModule(data, **{"tokenizer": "bytes", **defaults, **options})


def num_targets(batches):
    return sum(int((shift_labels(batch["labels"]) != -100).sum()) for batch in batches)


# ---- what is in the batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windowing", ["packed", "wrapped", "windows"])
def test_every_token_but_a_documents_first_is_a_target_once_in_training_and_validation(data, windowing):
    module = make(data, validation_data=data, windowing=windowing)
    expected = sum(len(text.encode()) for text in read_texts(data))
    assert num_targets(module.train_dataloader()) == expected
    validation = list(module.val_dataloader())
    assert num_targets(validation) == expected
    counted = sum(int(batch["num_bytes"].sum()) for batch in validation)
    assert counted == expected - len(read_texts(data))
    assert sum(int(batch["num_words"].sum()) for batch in validation) == sum(len(t.split()) for t in read_texts(data))
    again = list(module.val_dataloader())
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(validation, again, strict=True))
    assert "num_bytes" not in next(iter(module.train_dataloader()))


def test_it_trains_and_validates_a_mixture_source_by_source(data, tmp_path, quiet_trainer):
    other = write_corpus(tmp_path / "other", num_documents=60, num_files=1, seed=1)
    both = {"web": data, "code": other}
    module = make(both, validation_data=both, weights={"web": 1, "code": 1}, windowing="packed")
    torch.manual_seed(0)
    trainer = quiet_trainer(max_steps=20, val_check_interval=10, check_val_every_n_epoch=None)
    trainer.fit(LLMModule(MODEL, learning_rate=1e-2, warmup=2), module)
    metrics = trainer.callback_metrics
    assert {"val/loss/web", "val/loss/code", "val/bits_per_byte/web"} <= set(metrics)
    assert metrics["val/bits_per_byte"] < 8
    sources = torch.cat([batch["source_ids"][batch["row_ids"] >= 0] for batch in module.train_dataloader()])
    assert abs(sources[:100].float().mean() - 0.5) < 0.1
    validated = list(module.val_dataloader())
    assert num_targets(validated) == sum(len(text.encode()) for text in read_texts(data) + read_texts(other))


def test_a_mixture_by_size_flattened_by_temperature(data, tmp_path):
    other = write_corpus(tmp_path / "other", num_documents=24, num_files=1)
    sources = {"large": data, "small": other}
    module = make(sources)
    module.setup("fit")
    assert module._weights("train")[1] == pytest.approx(1 / 11, rel=0.2)
    flat = make(sources, temperature=float("inf"))
    flat.setup("fit")
    assert flat._weights("train") == [0.5, 0.5]
    assert "large: " in flat.summary()
    assert "50.0% of the rows" in flat.summary()
    assert flat.source_names == ["large", "small"]


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_other_layouts_hold_the_same_targets(data, layout):
    module = make(data, windowing="windows", layout=layout)
    assert num_targets(module.train_dataloader()) == num_targets(make(data).train_dataloader())
    assert module.packs_documents is (layout == "padding_free")


def test_iterable_data_sets_are_streamed():
    def generate(shards):
        for shard in shards:
            yield from ({"text": f"document {shard} {number} " * 3} for number in range(20))

    dataset = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2]})
    module = make(dataset, num_workers=2)
    total = sum(len(row["text"]) for row in dataset)
    assert num_targets(module.train_dataloader()) == total
    assert reading_cost(module._sources["train"][""], 4) == 2  # each of three shards is shared by two of four streams
    assert "read 2.0 times over" in module.summary()


def test_what_streams_share_of_compressed_files_is_read_several_times_and_said(tmp_path):
    with gzip.open(tmp_path / "one.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50))
    module = make(str(tmp_path), num_streams=8)
    module.setup("fit")
    assert "read 8.0 times over, for want of more files" in module.summary()
    assert num_targets(module.train_dataloader()) == sum(len(f"document {number}") for number in range(50))


# ---- resume ----------------------------------------------------------------------------------------------------------


class SaveAt(L.Callback):
    """Checkpoints at chosen micro-batches of the run, at the ends of epochs, and after validation."""

    def __init__(self, folder, batches):
        self.folder, self.batches, self.count, self.saved = folder, batches, 0, []

    def save(self, trainer, name):
        self.saved.append((str(self.folder / f"{name}.ckpt"), trainer.global_step))
        trainer.save_checkpoint(self.saved[-1][0])

    def on_train_batch_end(self, trainer, *args):
        self.count += 1
        if self.count in self.batches:
            self.save(trainer, f"batch{self.count}")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, f"epoch{trainer.current_epoch}")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, f"validation{trainer.current_epoch}-{self.count}")


class Seen(L.Callback):
    def __init__(self):
        self.steps, self.rows = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows += [(int(n), int(ids.sum())) for n, ids in zip(batch["row_ids"], batch["input_ids"], strict=True)]
        if not trainer.fit_loop._should_accumulate():
            self.steps.append((trainer.current_epoch, trainer.global_step, sorted(self.rows)))
            self.rows = []


class Bag(L.LightningModule):
    """One weight per byte: as fast as a module can be, and every row moves its weights."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(300))

    def training_step(self, batch, batch_idx):
        return self.weight[batch["input_ids"]].sin().mean() - self.weight[batch["input_ids"]].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(quiet_trainer, data, *callbacks, accumulate=1, resume=None, trainer_options=None, **options):
    module, seen = Bag(), Seen()
    trainer = quiet_trainer(
        accumulate_grad_batches=accumulate, max_epochs=2, callbacks=[seen, *callbacks], **(trainer_options or {})
    )
    trainer.fit(module, make(data, **options), ckpt_path=resume)
    return module.weight.detach().clone(), seen.steps


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [(1, {}), (3, {"validation": True}), (2, {"num_workers": 2}), (2, {"limit_train_batches": 9})],
    ids=str,
)
def test_a_run_goes_on_bitwise_from_any_checkpoint(quiet_trainer, tmp_path, accumulate, options):
    data = write_corpus(tmp_path / "small", num_documents=90)
    options = dict(options)
    trainer_options = {"limit_train_batches": options.pop("limit_train_batches", 1.0)}
    if options.pop("validation", False):
        options["validation_data"] = data
        trainer_options |= {"val_check_interval": 13, "limit_val_batches": 2}
    settings = {"accumulate": accumulate, "trainer_options": trainer_options, **options}
    save = SaveAt(
        tmp_path, {1, 2, 5, 9, 17, 18, 19, 20, 30, 35, 36, 37, 38} if "num_workers" not in options else {5, 30}
    )
    weights, steps = fit(quiet_trainer, data, save, **settings)
    assert len(save.saved) > 3
    for path, done in save.saved:
        torch.load(path, weights_only=True)
        found, rest = fit(quiet_trainer, data, resume=path, **settings)
        assert rest == [step for step in steps if step[1] > done], path
        assert torch.equal(found, weights), path


def test_saving_what_was_delivered_would_lose_rows(quiet_trainer, tmp_path, monkeypatch):
    """Control: Lightning reads a loader without length one batch ahead, and a window may be unfinished."""
    data = write_corpus(tmp_path / "small", num_documents=60)
    monkeypatch.setattr(StreamLoader, "_trained", lambda loader: loader._progress.place(loader._progress.delivered))
    save = SaveAt(tmp_path, {5})
    _, steps = fit(quiet_trainer, data, save, accumulate=2)
    _, rest = fit(quiet_trainer, data, resume=save.saved[0][0], accumulate=2)
    assert rest != [step for step in steps if step[1] > save.saved[0][1]]


def test_a_run_goes_on_with_other_micro_batches_and_workers(quiet_trainer, data, tmp_path):
    save = SaveAt(tmp_path, {7, 20})
    _, steps = fit(quiet_trainer, data, save, accumulate=2, micro_batch_size=4)
    for path, done in save.saved[:2]:
        for accumulate, rows, workers in [(1, 8, 0), (4, 2, 0), (2, 4, 2)]:
            layout = {"accumulate": accumulate, "micro_batch_size": rows, "num_workers": workers}
            _, rest = fit(quiet_trainer, data, resume=path, **layout)
            expected = [step for step in steps if step[1] > done]
            ends = next(n for n, (_, _, held) in enumerate(expected) if held[0][0] == -1)  # where a stream ends
            assert ends > 10
            assert rest[:ends] == expected[:ends]


def test_data_or_settings_that_changed_are_refused_by_name(quiet_trainer, data, tmp_path):
    save = SaveAt(tmp_path, {3})
    fit(quiet_trainer, data, save)
    path = save.saved[0][0]
    for changed, message in [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"num_streams": 2}, "num_streams was 4 and is 2"),
        ({"max_length": 32}, "max_length was 64 and is 32"),
        ({"append_eos": False}, "tokenizer was"),
    ]:
        with pytest.raises(ValueError, match=f"saved over other data.*{message}"):
            fit(quiet_trainer, data, resume=path, **changed)
    (tmp_path / "corpus" / "part-9.jsonl").write_text('{"text": "more"}\n')
    with pytest.raises(ValueError, match="number of files was 3 and is 4; bytes was"):
        fit(quiet_trainer, data, resume=path)


def test_a_shard_that_vanishes_stops_the_run_which_then_goes_on_without_loss(quiet_trainer, data, tmp_path):
    weights, steps = fit(quiet_trainer, data)

    class Remove(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                for path in (tmp_path / "corpus").glob("*.jsonl"):
                    path.rename(path.with_suffix(".away"))

    with pytest.raises(ShardError, match=r"part-\d.jsonl.*Mend it, and resume the run from its last checkpoint"):
        fit(quiet_trainer, data, Remove(), SaveEvery(tmp_path, 4))
    with pytest.raises(FileNotFoundError, match="holds nothing that can be streamed"):
        fit(quiet_trainer, data, resume=tmp_path / "last.ckpt")
    for path in (tmp_path / "corpus").glob("*.away"):
        path.rename(path.with_suffix(".jsonl"))
    found, rest = fit(quiet_trainer, data, resume=tmp_path / "last.ckpt")
    assert torch.equal(found, weights)
    assert rest == steps[-len(rest) :]


def test_another_fit_of_the_same_data_module_begins_anew(quiet_trainer, data):
    module = make(data)
    steps = []
    for _ in range(2):
        seen = Seen()
        quiet_trainer(max_steps=5, callbacks=[seen]).fit(Bag(), module)
        steps.append(seen.steps)
    assert steps[0] == steps[1]


# ---- several processes -----------------------------------------------------------------------------------------------


def check_steps(found, expected, where):
    assert set(found) <= set(expected), where
    for key, rows in found.items():
        assert rows == expected[key], (where, key)


@pytest.fixture
def reference(tmp_path):
    """Data, and the weights and steps of a run on one rank that nothing interrupts."""
    data = write_corpus(tmp_path / "small", num_documents=120)
    folder = tmp_path / "reference"
    folder.mkdir()
    weights = train(folder, data, "whole")
    return data, weights, steps_of(folder, "whole")


def check_weights(ranks, run, reference):
    for number, rank in enumerate(ranks):
        weights = torch.tensor(rank["weights"][run], dtype=torch.float64)
        torch.testing.assert_close(weights, reference, rtol=0, atol=1e-9, msg=lambda m, n=number: f"rank {n}: {m}")


@pytest.mark.slow
def test_a_run_killed_on_two_ranks_goes_on_on_one(run_ranks, tmp_path, reference):
    data, weights, expected = reference
    kill_after = random.randrange(8, 25)
    run = {"data": data, "name": "two", "accumulate": 2, "num_workers": 2, "save_every": 5, "kill_after": kill_after}
    with pytest.raises(AssertionError, match="failed"):
        run_ranks("streaming", 2, runs=[run])
    folder = tmp_path / "streaming-2"
    killed = steps_of(folder, "two", 2)
    assert max(killed)[1] == kill_after
    last = max(killed)
    del killed[last]  # perhaps not written by both ranks
    check_steps(killed, expected, f"killed after {kill_after}")
    found = train(folder, data, "one", resume=str(folder / "last.ckpt"))
    rest = steps_of(folder, "one")
    check_steps(rest, expected, f"one rank after {kill_after}")
    assert set(killed) | {last} | set(rest) == set(expected)
    torch.testing.assert_close(found, weights, rtol=0, atol=1e-9)


class Crash(L.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            raise RuntimeError("the machine is gone")


def test_two_ranks_go_on_where_one_crashed_and_a_rank_that_runs_dry_hangs_nobody(run_ranks, tmp_path, reference):
    data, weights, expected = reference
    crash_after = random.randrange(8, 25)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(tmp_path, data, "crashed", save_every=3, callbacks=[Crash(crash_after)])
    # Long documents in half of a file, so that one rank has many more rows than the other.
    (tmp_path / "uneven").mkdir()
    texts = ["x" * 20] * 3 + ["y" * 900] * 12 + ["z" * 2600]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "uneven" / "data.jsonl").write_text(lines)
    uneven = {"data": str(tmp_path / "uneven"), "num_streams": 2, "shuffle": False, "windowing": "windows"}
    whole = train(tmp_path, name="whole", **uneven)

    resumed = {"data": data, "name": "resumed", "resume": str(tmp_path / "last.ckpt")}
    ranks = run_ranks("streaming", 2, runs=[resumed, {"name": "uneven", **uneven}])
    folder = tmp_path / "streaming-2"
    rest = steps_of(folder, "resumed", 2)
    check_steps(rest, expected, f"two ranks after {crash_after}")
    assert set(steps_of(tmp_path, "crashed")) | set(rest) == set(expected)
    check_weights(ranks, 0, weights)

    assert steps_of(folder, "uneven", 2) == steps_of(tmp_path, "whole")
    held = [[json.loads(line)[2] for line in (folder / f"uneven-rank{n}.jsonl").open()] for n in range(2)]
    assert len(held[0]) == len(held[1])
    assert max(sum(not rows for rows in part) for part in held) > 2  # or it shows nothing
    check_weights(ranks, 1, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_chains_of_kills_and_resumes_on_changing_layouts(run_ranks, tmp_path, seed):
    data = write_corpus(tmp_path / "corpus", num_documents=1200, seed=seed)
    (tmp_path / "reference").mkdir()
    options = {"num_streams": 8, "rows_in_step": 32}  # a micro-batch of each layout has a row of each stream at least
    weights = train(tmp_path / "reference", data, "whole", **options)
    expected = steps_of(tmp_path / "reference", "whole")
    rng = random.Random(seed)
    layouts = rng.sample([(1, 1, 0), (2, 2, 0), (4, 1, 2), (2, 1, 2), (1, 4, 2), (4, 2, 0), (8, 1, 0)], 4)
    resume, seen, at = None, set(), 0
    for number, (ranks, accumulate, workers) in enumerate([*layouts, (2, 2, 0)]):
        is_last = number == len(layouts)
        at += rng.randrange(12, 25)
        run = {"data": data, "name": f"run{number}", "accumulate": accumulate, "num_workers": workers}
        run |= {"resume": resume, "kill_after": None if is_last else at, "save_every": rng.randrange(2, 6)}
        if is_last:
            results = run_ranks("streaming", ranks, 240, runs=[{**run, **options}])
        else:
            with pytest.raises(AssertionError, match="failed"):
                run_ranks("streaming", ranks, 240, runs=[{**run, **options}])
        folder = tmp_path / f"streaming-{ranks}"
        found = steps_of(folder, f"run{number}", ranks)
        if not is_last:
            found.pop(max(found))  # perhaps not of all ranks
        check_steps(found, expected, f"run {number}: {ranks} ranks, {accumulate} micro-batches, {workers} workers")
        seen |= set(found)
        resume = str((folder / "last.ckpt").rename(tmp_path / f"run{number}.ckpt"))
        at = max(found)[1]
    assert set(expected) - seen == set() or len(set(expected) - seen) <= len(layouts)
    check_weights(results, 0, weights)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_epochs": 2}], ids=str)
def test_a_run_on_nothing_ends_with_an_error(quiet_trainer, data, length):
    with pytest.raises(ValueError, match=r"corpus gave no row in a whole epoch.*shorter than min_length=1000 tokens"):
        quiet_trainer(**length).fit(Bag(), make(data, min_length=1000))
    if "max_epochs" in length:
        with pytest.raises(ValueError, match="nothing to train or validate on"):
            quiet_trainer().validate(Bag(), make(data, validation_data=data, min_length=1000))


def test_settings_that_do_not_fit_are_refused(data):
    with pytest.raises(
        ValueError, match=r"`validation_data` must name sources of `data` \(\['a'\]\), but names \['b'\]"
    ):
        make({"a": data}, validation_data={"b": data})
    with pytest.raises(ValueError, match=r"`weights` names every source of a mixture, but got \['b'\].* \['a'\]"):
        make({"a": data}, weights={"b": 1.0})
    with pytest.raises(ValueError, match="`stop` must be one of 'all_exhausted', 'first_exhausted', 'each_once'"):
        make(data, stop="never")
    with pytest.raises(ValueError, match="`windowing` must be 'packed'.*got 'folded'"):
        make(data, windowing="folded")
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"`weights` must be above 0 and finite, but got {weight} for 'b'"):
            make({"a": data, "b": data}, weights={"a": 1, "b": weight})
    for temperature in (0, float("nan")):
        with pytest.raises(ValueError, match=f"`temperature` must be above 0, but got {temperature}"):
            make(data, temperature=temperature)
    with pytest.raises(ValueError, match=r"`stride` has a meaning for windowing='windows' and 'packed' only"):
        make(data, windowing="wrapped", stride=8)
    with pytest.raises(ValueError, match=r"`stride` \(new tokens in a window\) lies in 1..max_length=64, but got 65"):
        make(data, stride=65)
    with pytest.raises(ValueError, match="`layout` must be one of 'packed'.*got 'dense'"):
        make(data, layout="dense")
    with pytest.raises(ValueError, match="layout='padded' is for rows of one document, but windowing is 'packed'"):
        make(data, layout="padded")
    for name, least, wrong in [("max_length", 2, 1), ("num_streams", 1, 0), ("pool_tokens", 1, 0), ("seed", 0, 0.5)]:
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number, {least} or more, but got {wrong}"):
            make(data, **{name: wrong})
    with pytest.raises(ValueError, match="tokenizer='bpe' would read the whole stream"):
        make(data, tokenizer="bpe").tokenizer  # noqa: B018
    iterable = datasets.Dataset.from_dict({"text": ["a b"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"which iterable data sets do not tell: \['b'\]. Pass weights"):
        make({"a": data, "b": iterable}).setup("fit")


def test_workers_encode_where_the_tokenizer_has_run_on_threads_before(tmp_path):
    """Threads do not come along into a forked process; waiting for them would hang the run, hence the time limit."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"document {n} " * 30}) + "\n" for n in range(90)))
    code = (
        "import os, sys\n"
        "from lightning_llm.datamodules import StreamingTextDataModule\n"
        "from lightning_llm.datamodules.tokenizer import byte_tokenizer, encoder\n"
        "encoder(byte_tokenizer(), append_eos=True)(['hello world ' * 50] * 200)\n"
        "options = {'max_length': 64, 'micro_batch_size': 2, 'num_streams': 2, 'num_workers': 2}\n"
        "batches = iter(StreamingTextDataModule(sys.argv[1], 'bytes', **options).train_dataloader())\n"
        "assert next(batches)['input_ids'].shape == (2, 64)\n"
        "os._exit(0)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data.jsonl")],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        timeout=60,
        check=True,
    )
