"""Documents in windows: one decision each, the same loss and gradient whichever documents share a micro-batch."""

import copy

import pytest
import torch
from document_training import KINDS, LENGTHS, POOLINGS, batch_of, documents, module_of, weights_of
from safetensors.torch import load_file
from support import Positions
from transformers import AutoModelForSequenceClassification

from lightning_llm import LLMModule
from lightning_llm.callbacks import DynamicBatchScaler, HuggingFaceCheckpoint, TokenWeightedAccumulation
from lightning_llm.callbacks.steps.counting import num_samples
from lightning_llm.tasks.documents import pooled_logits

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"
ROUNDING = 1e-12


def gradient(module, batches):
    """Summed loss over micro-batches, and its gradient."""
    module.zero_grad()
    total = 0.0
    for batch in batches:
        loss = module.task.loss(module.model, batch).total
        loss.backward()
        total += loss.item()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.model.parameters()]
    return total, torch.cat([part.flatten() for part in parts])


WAYS = [
    *(("one class", pooling) for pooling in POOLINGS),
    *(("one class, roberta", "mean"), ("one class, decoder", "max"), ("some classes", "attention")),
    *(("a number", "token_mean"), ("numbers", "max")),
]


@pytest.mark.parametrize(("kind", "pooling"), WAYS)
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(kind, pooling):
    module, some = module_of(kind, pooling), documents(kind)
    whole = gradient(module, [batch_of(some)])
    for cuts in ([0, 1, 5, 14], [0, 3, 4, 9, 14], list(range(15))):
        parts = [batch_of(some[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        total, found = gradient(module, parts)
        assert total == pytest.approx(whole[0], rel=ROUNDING)
        scale = 1e-7 if "decoder" in kind else ROUNDING  # its RMS norms round to float32
        assert (found - whole[1]).norm() / whole[1].norm() < scale


def test_torn_documents_have_another_gradient():
    """The control: windows in two micro-batches, as if a document were two."""
    module, some = module_of(), documents()
    torn = [*some, {**some[5], "tokens": some[5]["tokens"][:20]}]
    torn[5] = {**some[5], "tokens": some[5]["tokens"][20:]}
    assert (gradient(module, [batch_of(torn)])[1] - gradient(module, [batch_of(some)])[1]).norm() > 1e-2


@pytest.mark.parametrize(("kind", "pooling"), WAYS)
def test_a_document_of_one_window_is_classified_as_by_the_model_itself(kind, pooling):
    module, some = module_of(kind, pooling), documents(kind, [2, 5, 8, 8, 3])
    batch = batch_of(some)
    plain = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = module.model(**plain).logits
        pooled = module.task.outputs(module.model, batch)
        assert torch.equal(pooled, own) or (pooling == "token_mean" and torch.allclose(pooled, own, rtol=1e-14))
        assert torch.equal(module.task.outputs(module.model, plain), own)
        longer = module.task.outputs(module.model, batch_of(documents(kind, [2, 5, 18, 8, 3])))
    assert torch.allclose(longer[2], own[2]) == (pooling == "first")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooled_decisions_are_those_of_a_loop_over_documents(pooling):
    module, some = module_of(pooling=pooling), documents()
    with torch.no_grad():
        together = module.task.outputs(module.model, batch_of(some))
        for number, document in enumerate(some):
            batch = batch_of([document])
            vectors = module.model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
            if pooling == "attention":
                a = module.model.window_attention
                weights = (torch.tanh(vectors @ a.weight.T + a.bias) @ a.score).softmax(0)
            elif pooling == "token_mean":
                weights = batch["new_token_mask"].sum(1).double() / len(document["tokens"])
            else:
                weights = torch.full((len(vectors),), 1 / len(vectors), dtype=torch.float64)
            wanted = {"max": vectors.amax(0), "first": vectors[0]}.get(pooling, (weights[:, None] * vectors).sum(0))
            assert torch.allclose(together[number], module.model.classifier(wanted), rtol=1e-11, atol=1e-12)


def test_a_document_is_the_sample_that_callbacks_count():
    batch = batch_of(documents())
    assert num_samples(batch) == 14 < len(batch["input_ids"])


# ---- in a Trainer -------------------------------------------------------------------------------------------------


class Scarce(LLMModule):
    """Runs out of memory with more than so many tokens at once, after forward or within backward."""

    limit, where = None, "forward"

    def training_step(self, batch, batch_idx):
        self.shapes = [*getattr(self, "shapes", []), (len(batch["labels"]), *batch["input_ids"].shape)]
        self.fails = self.limit is not None and batch["input_ids"].numel() > self.limit
        output = super().training_step(batch, batch_idx)
        if self.fails and self.where == "forward":
            raise torch.OutOfMemoryError(MESSAGE)
        if self.where == "backward":
            output["loss"].register_hook(self._fail)
        return output

    def _fail(self, gradient):
        if self.fails:
            raise torch.OutOfMemoryError(MESSAGE)
        return gradient


def fit(make_trainer, module, batches, accumulate=1, callbacks=()):
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[*callbacks])
    trainer.fit(module, Positions(batches))
    return weights_of(module), trainer


def micro_batches(some, cuts):
    return [batch_of(some[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_accumulation_and_pieces_train_as_the_whole_batch_does(quiet_trainer, pooling):
    some = documents()
    truth, _ = fit(quiet_trainer, module_of(pooling=pooling), micro_batches(some, [0, 7, 14]))
    moved = (truth - weights_of(module_of(pooling=pooling))).norm()
    weighted = TokenWeightedAccumulation

    def scarce(limit, where, **options):
        module = module_of(pooling=pooling, cls=Scarce)
        module.limit, module.where = limit, where
        scaler = DynamicBatchScaler(**options)
        found, trainer = fit(quiet_trainer, module, micro_batches(some, [0, 7, 14]), 1, [weighted(), scaler])
        assert trainer.global_step == 4
        return found, module, scaler

    found, _ = fit(
        quiet_trainer, module_of(pooling=pooling), micro_batches(some, [0, 1, 3, 7, 9, 10, 14]), 3, [weighted()]
    )
    assert (found - truth).norm() / moved < 1e-11
    for limit, where in ((130, "forward"), (150, "backward")):
        found, module, scaler = scarce(limit, where, grow_every=1)
        assert scaler.limits.num_failed > 0
        assert (found - truth).norm() / moved < 1e-11, (limit, where)
        assert all(windows >= number for number, windows, _ in module.shapes)
    found, module, _ = scarce(None, "forward", max_piece=130)
    assert (found - truth).norm() / moved < 1e-11
    assert max(windows * columns for _, windows, columns in module.shapes) <= 130
    control, _ = fit(quiet_trainer, module_of(pooling=pooling), micro_batches(some, [0, 1, 3, 7, 9, 10, 14]), 3)
    assert (control - truth).norm() / moved > 1e-3  # a mean of means


def test_a_document_that_does_not_fit_by_itself_is_a_clear_error(quiet_trainer):
    module = module_of(cls=Scarce)
    module.limit = 70  # the longest document has 12 windows of 10
    with pytest.raises(torch.OutOfMemoryError, match="with a single row of 10 columns"):
        fit(
            quiet_trainer,
            module,
            micro_batches(documents(), [0, 14]),
            1,
            [TokenWeightedAccumulation(), DynamicBatchScaler()],
        )


def test_two_ranks_train_and_measure_as_one(run_ranks):
    ranks = run_ranks("document_heads", 2, poolings=["mean", "attention"])
    for pooling in ("mean", "attention"):
        for rank in ranks:
            assert rank[pooling]["error"] < 1e-11, pooling
            assert rank[pooling]["sharded error"] < 1e-11, pooling
            assert rank[pooling]["metrics"] == pytest.approx(rank[pooling]["true metrics"], rel=1e-9), pooling
            assert rank[pooling]["without"] > 1e-3, pooling


@pytest.mark.parametrize("kind", ["one class", "some classes", "a number"])
def test_metrics_and_predictions_are_of_documents_and_do_not_depend_on_pieces(quiet_trainer, kind):
    some = documents(kind)
    batches = Positions(micro_batches(some, [0, 6, 14]))
    whole = quiet_trainer().validate(module_of(kind), batches, verbose=False)[0]
    pieces = quiet_trainer(callbacks=[DynamicBatchScaler(max_piece=60)])
    assert pieces.validate(module_of(kind), batches, verbose=False)[0] == pytest.approx(whole, rel=1e-6)
    module = module_of(kind)
    predicted = quiet_trainer(callbacks=[DynamicBatchScaler(max_piece=60)]).predict(module, batches)
    ids = torch.cat([batch["row_ids"] for batch in predicted])
    assert ids.tolist() == [document["row_id"] for document in some]
    with torch.no_grad():
        wanted = module.task.score(module.model, batch_of(some))
    for name, values in wanted.items():
        assert torch.allclose(torch.cat([batch[name] for batch in predicted]).to(values), values)
    if kind == "one class":
        labels = torch.tensor([document["label"] for document in some])
        known = labels >= 0
        right = (wanted["predictions"] == labels)[known].double().mean()
        assert whole["val/accuracy"] == pytest.approx(right.item())
    elif kind == "a number":
        labels = torch.tensor([document["label"] for document in some])
        assert whole["val/mse"] == pytest.approx((wanted["values"] - labels).square().mean().item(), rel=1e-6)


# ---- the attention's weights ---------------------------------------------------------------------------------------


def test_the_attention_is_trained_saved_and_found_again(quiet_trainer, tmp_path):
    module, batches = module_of(pooling="attention"), micro_batches(documents(), [0, 7, 14])
    before = {name: value.clone() for name, value in module.model.window_attention.state_dict().items()}
    export = HuggingFaceCheckpoint(str(tmp_path / "hf"), monitor=None)
    trainer = quiet_trainer(max_epochs=2, callbacks=[export])
    trainer.fit(module, Positions(batches))
    after = module.model.window_attention.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module.eval()
    with torch.no_grad():
        wanted = module.task.outputs(module.model, batches[0])
    again = LLMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    folder = str(tmp_path / "hf" / "last")
    exported = LLMModule(folder, "sequence-classification", dtype="float64")  # its configuration names the pooling
    exported.configure_model()
    for other in (again, exported):
        other.eval()
        assert other.task.pooling == "attention"
        with torch.no_grad():
            assert torch.equal(other.task.outputs(other.model, batches[0]), wanted)
    assert "window_attention.score" in load_file(tmp_path / "hf" / "last" / "model.safetensors")
    alone = AutoModelForSequenceClassification.from_pretrained(folder)  # a window by itself, without the attention
    assert torch.equal(alone.classifier.weight, module.model.classifier.weight)
    other = LLMModule(folder, "sequence-classification", dtype="float64", task_options={"pooling": "max"})
    other.configure_model()
    assert not hasattr(other.model, "window_attention")
    assert other.config.window_pooling == "max"


def test_a_new_attention_begins_as_the_mean():
    torch.manual_seed(0)
    fresh = LLMModule(dict(KINDS["one class"]["config"]), "sequence-classification", labels=3, dtype="float64",
                      task_options={"pooling": "attention"})  # fmt: skip
    fresh.configure_model()
    fresh.eval()
    batch = batch_of(documents())
    with torch.no_grad():
        found = fresh.task.outputs(fresh.model, batch)
        fresh.task.pooling = "mean"
        assert torch.allclose(found, fresh.task.outputs(fresh.model, batch), rtol=1e-12)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match="`pooling` must be one of mean, token_mean, max, first, attention, but got 'sum'"
    ):
        LLMModule({"model_type": "bert"}, "sequence-classification", task_options={"pooling": "sum"})
    module, batch = module_of(), batch_of(documents(lengths=LENGTHS[:3]))
    for ids in ([0, 1, 0, 2], [0, 2, 2, 2], [1, 1, 2, 3]):
        wrong = {**batch, "document_ids": torch.tensor(ids)}
        with pytest.raises(ValueError, match="every document with one window at least, in order"):
            module.task.check(wrong, module.config)
    module.task.pooling = "token_mean"
    lacking = {key: value for key, value in batch.items() if key != "new_token_mask"}
    with pytest.raises(ValueError, match="counts a document's tokens by `new_token_mask`"):
        module.training_step(lacking, 0)


def test_a_model_whose_logits_are_not_its_last_layers_is_refused():
    module, batch = module_of(), batch_of(documents())

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(module.model)

        def forward(self, input_ids, attention_mask=None):
            output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            return type(output)(logits=output.logits.sum(-1, keepdim=True))

    with pytest.raises(ValueError, match="Pooling needs a vector of 16 numbers for each of .* windows"):
        pooled_logits(Other(), batch, _run, 3, "mean")
    with pytest.raises(ValueError, match="last layer is linear with 7 outputs"):
        pooled_logits(module.model, batch, _run, 7, "mean")


def _run(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
