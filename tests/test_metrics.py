"""Evaluation metrics are ratios of sums."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from support import Positions, pad_rows, ragged_rows, store_of
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler
from lightning_llm.datamodules import TextDataModule
from lightning_llm.datamodules.rows import RowDataset, make_rows
from lightning_llm.loss import TokenLoss
from lightning_llm.metrics import LanguageModelingMetrics, distinct_names
from lightning_llm.tasks import CausalLM

WORDS = ("bits_per_word", "word_perplexity")


def rows_in(layout, lengths, windowing):
    """Rows of 16 tokens of random documents of these lengths."""
    store = store_of(lengths)
    table = make_rows(store.offsets, np.arange(len(lengths)), 16, windowing)
    return RowDataset(store, table, 0, store.token_bytes, layout=layout)


def gpt2(config):
    """A random GPT-2 in float64."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).double().eval()


def test_metrics_do_not_depend_on_how_the_data_was_cut():
    nll = torch.rand(40, dtype=torch.float64) * 5
    num_bytes = torch.randint(1, 6, (40,)).double()
    results = []
    for sizes in ([40], [1] * 40, [3, 17, 20]):
        metrics = LanguageModelingMetrics()
        for part, part_bytes in zip(nll.split(sizes), num_bytes.split(sizes), strict=True):
            metrics.update(TokenLoss(part.sum(), torch.tensor(len(part))), part_bytes)
        results.append(metrics.compute())
    mean = nll.mean().item()
    for values in results:
        assert values["loss"].item() == pytest.approx(mean, rel=1e-14)
        assert values["perplexity"].item() == pytest.approx(math.exp(mean), rel=1e-13)
        assert values["bits_per_byte"].item() == pytest.approx(nll.sum().item() / math.log(2) / num_bytes.sum().item())


def test_bits_per_byte_is_reported_only_where_bytes_are_known():
    metrics = LanguageModelingMetrics()
    metrics.update(TokenLoss(torch.tensor(3.0), torch.tensor(2)))
    assert set(metrics.compute()) == {"loss", "perplexity"}


def test_sums_stay_exact_where_float32_would_stop_counting():
    metrics = LanguageModelingMetrics()
    metrics.update(TokenLoss(torch.tensor(2.0**24), torch.tensor(2**24)))
    metrics.update(TokenLoss(torch.tensor(1.0), torch.tensor(1)))
    assert metrics.num_tokens.item() == 2**24 + 1
    metrics.half()
    assert metrics.num_tokens.dtype == torch.float64


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_their_type_when_the_module_around_them_is_cast(cast):
    """Lightning casts the whole LightningModule for precision='bf16-true'."""
    module = torch.nn.ModuleDict({"metrics": LanguageModelingMetrics()})
    module.to(dtype=cast)
    for _ in range(3):
        module["metrics"].update(TokenLoss(torch.tensor(2.0**24 + 2), torch.tensor(2**24 + 1)))
        module["metrics"].to(dtype=cast)
    assert module["metrics"].num_tokens.dtype == torch.float64
    assert module["metrics"].num_tokens.item() == 3 * (2**24 + 1)
    module["metrics"].reset()
    assert module["metrics"].num_tokens.dtype == torch.float64


def rows_of(num_rows, num_sources, seed=0):
    """Nats, label tokens, bytes and words of rows, and the source of each; some rows are empty and have none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (num_rows,), generator=generator)
    nats = torch.rand(num_rows, generator=generator, dtype=torch.float64) * 5 * tokens
    sources = torch.randint(0, num_sources, (num_rows,), generator=generator)
    return nats, tokens, tokens * 4 + (tokens > 0), tokens // 2, sources.where(tokens > 0, -1)


def fill(metrics, rows, sizes):
    for nats, tokens, num_bytes, num_words, sources in zip(*(x.split(sizes) for x in rows), strict=True):
        metrics.update(TokenLoss(nats, tokens), num_bytes, num_words, sources)
    return {name: value.item() for name, value in metrics.compute().items()}


def test_words_give_bits_per_word_and_word_perplexity():
    nats, tokens, num_bytes, num_words, _ = rows_of(30, 1)
    metrics = LanguageModelingMetrics()
    metrics.update(TokenLoss(nats.sum(), tokens.sum()), num_bytes, num_words)
    values = metrics.compute()
    nats_per_word = nats.sum().item() / num_words.sum().item()
    assert values["bits_per_word"].item() == pytest.approx(nats_per_word / math.log(2), rel=1e-14)
    assert values["word_perplexity"].item() == pytest.approx(math.exp(nats_per_word), rel=1e-13)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 17, 20]])
def test_each_source_has_the_values_it_has_alone_and_the_total_those_without_sources(sizes):
    rows = rows_of(40, 3)
    *sums, sources = rows
    values = fill(LanguageModelingMetrics(["web", "code", "books"]), rows, sizes)
    for number, name in enumerate(["web", "code", "books"]):
        alone = LanguageModelingMetrics()
        nats, tokens, num_bytes, num_words = (x[sources == number].sum() for x in sums)
        alone.update(TokenLoss(nats, tokens), num_bytes, num_words)
        for ratio, value in alone.compute().items():
            assert values.pop(f"{ratio}/{name}") == pytest.approx(value.item(), rel=1e-12)
    plain = LanguageModelingMetrics()
    plain.update(TokenLoss(sums[0].sum(), sums[1].sum()), sums[2], sums[3])
    assert values == pytest.approx({name: value.item() for name, value in plain.compute().items()}, rel=1e-12)


def test_source_without_label_tokens_is_left_out():
    metrics = LanguageModelingMetrics(["web", "code", "books"])
    metrics.update(TokenLoss(torch.tensor([3.0, 0.0]), torch.tensor([2, 0])), source_ids=torch.tensor([2, 0]))
    assert set(metrics.compute()) == {"loss", "perplexity", "loss/books", "perplexity/books"}


def test_batches_without_sources_count_in_the_total_alone():
    metrics = LanguageModelingMetrics(["web"])
    metrics.update(TokenLoss(torch.tensor([3.0]), torch.tensor([2])), source_ids=torch.tensor([0]))
    metrics.update(TokenLoss(torch.tensor(5.0), torch.tensor(2)))
    values = metrics.compute()
    assert (values["loss"], values["loss/web"]) == (2.0, 1.5)


@pytest.mark.parametrize("source", [-1, 2])
def test_label_tokens_of_an_unknown_source_are_an_error(source):
    metrics = LanguageModelingMetrics(["web", "code"])
    metrics.update(TokenLoss(torch.tensor([3.0, 1.0]), torch.tensor([2, 7])), source_ids=torch.tensor([0, source]))
    with pytest.raises(ValueError, match=r"lie in 0..1, as there are 2 source_names \(web, code\), but rows with 7 "):
        metrics.compute()


def test_sources_need_everything_row_by_row():
    metrics = LanguageModelingMetrics(["web"])
    with pytest.raises(ValueError, match=r"of shape \(2,\), `loss.total` must have one entry per row .* shape \(\)"):
        metrics.update(TokenLoss(torch.tensor(3.0), torch.tensor(2)), source_ids=torch.tensor([0, 0]))
    rows = TokenLoss(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"`num_bytes` must have one entry per row too, but got shape \(1,\)"):
        metrics.update(rows, torch.ones(1), source_ids=torch.tensor([0, 0]))


def test_names_of_sources_are_distinct_whatever_they_are():
    names = distinct_names(["a", "a", "a-2", "a", "", "/", "x/y", "x y", "x-y"])
    assert names == ["a", "a-2", "a-2-2", "a-3", "source", "source-2", "x-y", "x-y-2", "x-y-3"]
    metrics = LanguageModelingMetrics(["own/data", "own/data"])
    metrics.update(TokenLoss(torch.tensor([3.0, 8.0]), torch.tensor([1, 2])), source_ids=torch.tensor([0, 1]))
    values = metrics.compute()
    assert (values["loss/own-data"], values["loss/own-data-2"]) == (3.0, 4.0)


def test_sums_of_sources_stay_exact_in_a_module_of_low_precision():
    module = torch.nn.ModuleDict({"metrics": LanguageModelingMetrics(["web"])})
    module.to(dtype=torch.bfloat16)
    for _ in range(3):
        loss = TokenLoss(torch.tensor([2.0]), torch.tensor([2**24 + 1]))
        module["metrics"].update(loss, source_ids=torch.tensor([0]))
        module["metrics"].to(dtype=torch.bfloat16)
    assert module["metrics"].source_sums.dtype == torch.float64
    assert module["metrics"].source_sums[0, :4].tolist() == [6.0, 3 * (2**24 + 1), 0, 0]
    module["metrics"].reset()
    assert not module["metrics"].source_sums.any()


# ---- in a Trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "padding_free", "packed"])
def test_rows_scores_add_up_to_the_loss_and_are_those_of_each_row_alone(tiny_gpt2, layout):
    model = gpt2(tiny_gpt2)
    windowing = "packed" if layout == "packed" else "windows"
    dataset = rows_in(layout, [9, 30, 2, 17, 1, 5], windowing)
    task, rows = CausalLM(), list(range(len(dataset)))
    batch = dataset[rows]
    with torch.no_grad():
        whole, scores = task.loss(model, batch), task.score(model, batch)
        alone = [task.loss(model, dataset[[row]]) for row in rows]
    assert scores["nll"].shape == (len(rows),)
    assert scores["nll"].sum().item() == pytest.approx(whole.total.item(), rel=1e-12)
    assert scores["nll"].tolist() == pytest.approx([loss.total.item() for loss in alone], rel=1e-12)
    assert scores["num_tokens"].tolist() == [loss.num_tokens.item() for loss in alone]


@pytest.mark.parametrize("layout", ["packed", "padding_free"])
def test_a_single_packed_row_is_scored_as_its_batch_counts_it(tiny_gpt2, layout):
    """Both carry the documents' boundaries; only without padding does each document have entries of its own."""
    dataset = rows_in(layout, [9, 5], "packed")
    batch = dataset[[0]]
    assert len(batch["cu_seq_lens_q"]) - 1 == (3 if layout == "packed" else 2)  # padding is a document
    scores = CausalLM().score(gpt2(tiny_gpt2), batch)
    assert scores["nll"].shape == scores["num_tokens"].shape == batch["row_ids"].shape


class Mixture(L.LightningDataModule):
    """Rows of ragged documents, each row of some source."""

    def __init__(self, batch_size=4, sources=True):
        super().__init__()
        self.rows = [
            {**row, "num_bytes": 3 * len(row["labels"]), "num_words": len(row["labels"]), "source_ids": index % 5 // 2}
            for index, row in enumerate(ragged_rows(13, seed=2))
        ]
        self.source_names = ["own/web", "code", "books"] if sources else []
        self.batch_size = batch_size

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.rows, self.batch_size, collate_fn=self.collate)

    test_dataloader = val_dataloader

    @staticmethod
    def collate(rows):
        counted = ("num_bytes", "num_words", "source_ids")
        return {**pad_rows(rows), **{key: torch.tensor([row[key] for row in rows]) for key in counted}}


def evaluated(quiet_trainer, model, datamodule, command="validate", **options):
    torch.manual_seed(0)
    module = LLMModule(model)
    trainer = quiet_trainer(precision="64-true", **options)
    (values,) = getattr(trainer, command)(module, datamodule, verbose=False)
    return module, values


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_mixture_is_evaluated_source_by_source(tiny_gpt2, quiet_trainer, command, stage):
    data = Mixture()
    module, values = evaluated(quiet_trainer, tiny_gpt2, data, command)
    for number, name in enumerate(["own-web", "code", "books"]):
        batch = data.collate([row for row in data.rows if row["source_ids"] == number])
        loss = module.task.loss(module.model, batch)
        bits = loss.total.item() / math.log(2)
        assert values.pop(f"{stage}/loss/{name}") == pytest.approx(loss.mean.item(), rel=1e-12)
        assert values.pop(f"{stage}/perplexity/{name}") == pytest.approx(loss.mean.exp().item(), rel=1e-12)
        for unit, sums in (("byte", "num_bytes"), ("word", "num_words")):
            assert values.pop(f"{stage}/bits_per_{unit}/{name}") == pytest.approx(bits / batch[sums].sum().item())
        values.pop(f"{stage}/word_perplexity/{name}")
    _, plain = evaluated(quiet_trainer, tiny_gpt2, Mixture(sources=False), command)
    assert values == pytest.approx(plain, rel=1e-12)


def test_values_of_sources_do_not_depend_on_batches_or_pieces(tiny_gpt2, quiet_trainer):
    _, first = evaluated(quiet_trainer, tiny_gpt2, Mixture(4))
    _, second = evaluated(quiet_trainer, tiny_gpt2, Mixture(13))
    _, pieces = evaluated(quiet_trainer, tiny_gpt2, Mixture(13), callbacks=[DynamicBatchScaler(max_piece=60)])
    assert first == pytest.approx(second, rel=1e-12)
    assert first == pytest.approx(pieces, rel=1e-12)


@pytest.mark.parametrize("layout", ["packed", "padding_free"])
def test_bytes_of_a_row_count_once_if_it_is_cut_between_its_documents(tiny_gpt2, quiet_trainer, layout):
    dataset = rows_in(layout, [9, 7, 2, 13, 1, 5, 8], "packed")
    values = []
    for callbacks in ([], [DynamicBatchScaler(max_piece=9)]):
        torch.manual_seed(0)
        trainer = quiet_trainer(precision="64-true", callbacks=callbacks)
        batches = Positions([dataset[[row]] for row in range(len(dataset))])
        values += trainer.validate(LLMModule(tiny_gpt2), batches, verbose=False)
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert "val/bits_per_byte" in values[0]


def test_rows_are_not_scored_one_by_one_where_sources_have_no_names(tiny_gpt2, quiet_trainer, monkeypatch):
    monkeypatch.setattr(CausalLM, "score", lambda *args: pytest.fail("scored"))
    _, values = evaluated(quiet_trainer, tiny_gpt2, Mixture(sources=False))
    assert not any(name.count("/") > 1 for name in values)


@pytest.mark.parametrize("cut", [{}, {"eval_windowing": "windows", "eval_context": 16}])
def test_sources_of_a_text_mixture_have_the_values_of_their_data_alone(tiny_gpt2, quiet_trainer, tmp_path, cut):
    folders = {}
    for name, sentence in {"web": "the quick brown fox ", "code": "def f(x): return x\n"}.items():
        folder = tmp_path / name
        folder.mkdir()
        for number in range(4):
            (folder / f"{number}.txt").write_text(sentence * (3 * number + len(name) - 2))
        folders[name] = str(folder)

    def values_of(data):
        options = {"max_length": 32, "micro_batch_size": 3, "cache_dir": str(tmp_path / "cache"), **cut}
        datamodule = TextDataModule(data, "bytes", validation_data=data, **options)
        return evaluated(quiet_trainer, {**tiny_gpt2, "vocab_size": 258}, datamodule)[1]

    mixture = values_of(folders)
    for name, folder in folders.items():
        for metric, value in values_of(folder).items():
            assert mixture.pop(f"{metric}/{name}") == pytest.approx(value, rel=1e-12)
    assert set(mixture) == {f"val/{name}" for name in ("loss", "perplexity", *WORDS, "bits_per_byte")}


def test_trainer_prints_the_values_of_each_source(tiny_gpt2, quiet_trainer, capsys):
    quiet_trainer().validate(LLMModule(tiny_gpt2), Mixture())
    printed = capsys.readouterr().out
    for name in ("val/loss", "val/bits_per_byte", "val/bits_per_word", "val/loss/code", "val/bits_per_byte/own-web"):
        assert name in printed


def test_module_follows_the_sources_of_another_mixture(tiny_gpt2, quiet_trainer):
    module, data = LLMModule(tiny_gpt2), Mixture()
    trainer = quiet_trainer()
    trainer.validate(module, data, verbose=False)
    data.source_names = ["a", "b", "c", "d"]
    (values,) = trainer.validate(module, data, verbose=False)
    assert {name for name in values if name.startswith("val/loss/")} == {"val/loss/a", "val/loss/b", "val/loss/c"}
    for names in ([], ["a"], [""]):  # a single one is the whole
        data.source_names = names
        (values,) = trainer.validate(module, data, verbose=False)
        assert not any(name.count("/") > 1 for name in values)


def test_sources_are_the_same_on_two_ranks_of_which_one_lacks_a_source(run_ranks, tiny_gpt2, quiet_trainer):
    first, second = run_ranks("ddp_sources", 2)
    assert first == second
    _, alone = evaluated(quiet_trainer, tiny_gpt2, Mixture())
    assert first == pytest.approx(alone, rel=1e-12)
    assert {"val/loss/own-web", "val/loss/code", "val/loss/books"} <= set(first)


def test_batches_that_do_not_count_bytes_do_not_change_bits_per_byte():
    metrics, counted = LanguageModelingMetrics(), LanguageModelingMetrics()
    for metric in (metrics, counted):
        metric.update(TokenLoss(torch.tensor(6.0), torch.tensor(3)), num_bytes=torch.tensor(12))
    metrics.update(TokenLoss(torch.tensor(50.0), torch.tensor(5)))
    assert metrics.compute()["bits_per_byte"] == counted.compute()["bits_per_byte"]
    assert metrics.compute()["loss"] == 7.0
