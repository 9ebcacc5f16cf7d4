"""Embeddings: a vector for each text, near to those of texts that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from lightning_llm.chunked_rows import embed_in_chunks
from lightning_llm.compatibility import check_length
from lightning_llm.head_loss import LossKernel, unwrapped
from lightning_llm.loss import TokenLoss
from lightning_llm.tasks.base import Task
from lightning_llm.tasks.embedding_losses import contrastive_loss, contrastive_scores, cosine_loss, triplet_loss
from lightning_llm.tasks.head import model_inputs
from lightning_llm.tasks.metrics import Means, TaskMetrics
from lightning_llm.tasks.pooling import Pooled, Pooling, pool, read_pooling, write_pooling

EmbeddingLoss = Literal["contrastive", "cosine", "triplet"]


class Embedding(Task):
    """Train a text encoder, or a decoder with ``pooling="last"``, on pairs and triplets of texts.

    A batch has one row per example and a group of columns for each of its texts, padded to a length of its own:
    ``anchor_input_ids``, ``anchor_attention_mask`` and further inputs of the model in the same way, (rows, seq);
    ``positive_...``, the text that belongs to the anchor; optionally ``negative_...`` (or ``negative_1_...``,
    ``negative_2_...``), texts that do not. For ``loss="cosine"`` also ``labels`` (rows,) float, the similarity of
    anchor and positive. To embed texts, ``predict`` takes such batches, or plain ``input_ids`` and ``attention_mask``.

    - ``contrastive``: each anchor's positive among all positives and negatives *of the batch*
      (:func:`~lightning_llm.tasks.embedding_losses.contrastive_loss`; sentence-transformers'
      MultipleNegativesRankingLoss). A batch is therefore never cut; see ``chunk_size``.
    - ``cosine``: squared difference of the cosine and ``labels``. Rows are the weight, and any cut is exact.
    - ``triplet``: the negative's cosine is to be below the positive's by ``margin``. Likewise.

    Args:
        loss_kernel: As for every task; there is no large vocabulary here.
        loss: As above.
        pooling: ``mean``, ``cls``, ``max`` or ``last``; if None, as a sentence-transformers folder says, else ``mean``.
        normalize: Whether ``predict`` gives vectors of length 1; if None, as such a folder says, else True. Losses
            compare by cosine in any case.
        scale: Of cosines in the contrastive loss, the inverse of its temperature.
        symmetric: Also each positive's anchor among all anchors.
        across_ranks: Contrast with the texts of all ranks, in training.
        chunk_size: Rows embedded at once: the contrastive gradient of the whole batch in the memory of a chunk, for
            one more forward (:func:`~lightning_llm.chunked_rows.embed_in_chunks`). DynamicBatchScaler lowers it.
        margin: Of ``triplet``.

    Raises:
        ValueError: For an option out of its range.
    """

    name = "embedding"
    auto_class = "AutoModel"

    def __init__(
        self,
        loss_kernel: LossKernel = "chunked",
        *,
        loss: EmbeddingLoss = "contrastive",
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        scale: float = 20.0,
        symmetric: bool = False,
        across_ranks: bool = False,
        chunk_size: int | None = None,
        margin: float = 0.2,
    ) -> None:
        super().__init__(loss_kernel)
        if loss not in get_args(EmbeddingLoss):
            raise ValueError(f"`loss` must be one of {', '.join(get_args(EmbeddingLoss))}, but got {loss!r}.")
        if pooling is not None and pooling not in get_args(Pooling):
            raise ValueError(f"`pooling` must be one of {', '.join(get_args(Pooling))}, but got {pooling!r}.")
        if scale <= 0:
            raise ValueError(f"`scale` must be above 0, but got {scale}.")
        if chunk_size is not None and (isinstance(chunk_size, bool) or chunk_size < 1):
            raise ValueError(f"`chunk_size` must be a number of rows, at least 1, but got {chunk_size!r}.")
        if loss != "contrastive" and (symmetric or across_ranks or chunk_size is not None):
            raise ValueError(
                f"`symmetric`, `across_ranks` and `chunk_size` are for the contrastive loss; with loss={loss!r} each "
                f"row stands alone, and a batch may be cut at will."
            )
        self.loss_name = loss
        self.needs_whole_batches = loss == "contrastive"
        self.pooled = Pooled(pooling or "mean", normalize is not False)
        self._given = (pooling, normalize)
        self.scale, self.symmetric, self.across_ranks, self.margin = scale, symmetric, across_ranks, margin
        self.chunk_size = chunk_size

    def configure(
        self,
        config: PretrainedConfig,
        labels: Sequence[str] | int | None = None,
        *,
        datamodule: Any = None,
        is_built: bool = False,
    ) -> None:
        """Find out how embeddings are made, and write it into the configuration, which goes where the model goes.

        Raises:
            ValueError: For encoder-decoders.
        """
        super().configure(config, labels, datamodule=datamodule, is_built=is_built)
        any_config: Any = config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"Embeddings are made by an encoder or a decoder alone, but {type(config).__name__} is of both. Pass "
                f"an encoder (BERT, ModernBERT, ...) or a decoder with task_options={{'pooling': 'last'}}."
            )
        pooling, normalize = self._given
        known = getattr(config, "embedding_pooling", None), getattr(config, "embedding_normalize", None)
        folder = getattr(config, "_name_or_path", None)
        if None in known and (pooling is None or normalize is None) and folder:
            known = read_pooling(str(folder)) or known
        self.pooled = Pooled(pooling or known[0] or "mean", _first(normalize, known[1], True))
        any_config.embedding_pooling, any_config.embedding_normalize = self.pooled

    def built(self, model: nn.Module, copy: Callable[[], nn.Module]) -> None:
        """Freeze what embeddings do not pass through: BERT's pooler would never get a gradient."""
        pooler = getattr(unwrapped(model), "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    def check(self, batch: Mapping[str, Any], config: PretrainedConfig) -> None:
        """Refuse batches without texts, of texts that do not go together, and texts that are too long."""
        texts = texts_of(batch)
        if not texts:
            raise KeyError(
                f"An embedding batch needs `anchor_input_ids` and `positive_input_ids` (and masks), or, to be embedded "
                f"only, `input_ids`, but got the keys {sorted(batch)}."
            )
        for name, columns in texts.items():
            check_length(config, columns["input_ids"].shape[-1], f"a batch of {name or 'text'}s")
        rows = {name: len(columns["input_ids"]) for name, columns in texts.items()}
        if len(set(rows.values())) > 1:
            raise ValueError(f"Each example has one row in all columns, but there are {rows}.")

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> TokenLoss:
        """Sum the loss over the rows."""
        return self._loss(self._pairs(model, batch), batch)

    def num_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Rows of the data."""
        columns = next(iter(texts_of(batch).values()))["input_ids"]
        return torch.ones(len(columns), dtype=torch.int64, device=columns.device)[_real_rows(batch)].sum()

    def score(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """``embeddings`` (rows, dim); of pairs ``anchor_embeddings``, ``positive_embeddings`` and their ``cosine``."""
        embeddings = self._embeddings(model, texts_of(batch))
        scores = {f"{name}_embeddings" if name else "embeddings": values for name, values in embeddings.items()}
        if self.pooled.normalize:
            scores = {name: F.normalize(values, dim=-1) for name, values in scores.items()}
        if {"anchor", "positive"} <= set(embeddings):
            scores["cosine"] = F.cosine_similarity(embeddings["anchor"], embeddings["positive"])
        return scores

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Pooled states of the batch's first text, (rows, dim)."""
        return self.embed(model, next(iter(texts_of(batch).values())))

    def embed(self, model: nn.Module, columns: Mapping[str, Any]) -> Tensor:
        """Pooled states of rows, (rows, dim), not normalized."""
        hidden: Tensor = model(**model_inputs(model, columns)).last_hidden_state
        return pool(hidden, columns.get("attention_mask"), self.pooled.pooling)

    def metrics(self, source_names: Sequence[str] = ()) -> TaskMetrics:
        """The loss; how often a positive is nearest, and its mean reciprocal rank; or correlations with labels."""
        from torchmetrics import regression as r

        if self.loss_name == "contrastive":
            return TaskMetrics({"means": Means(["loss", "accuracy", "mrr"])})
        if self.loss_name == "triplet":
            return TaskMetrics({"means": Means(["loss", "accuracy"])})
        means = {"loss": Means(["loss"])}
        return TaskMetrics({**means, "pearson": r.PearsonCorrCoef(), "spearman": r.SpearmanCorrCoef()})

    def evaluate(self, model: nn.Module, batch: Mapping[str, Any], metrics: TaskMetrics) -> None:
        """Add a batch."""
        texts = self._pairs(model, batch)
        anchor, positive, *negatives = texts.values()
        loss = self._loss(texts, batch)
        if self.loss_name == "cosine":
            cosines = F.cosine_similarity(anchor, positive)
            target = batch["labels"][_real_rows(batch)]
            metrics.update(means={"loss": loss}, preds=cosines, target=target.to(cosines))
            return
        if self.loss_name == "triplet":
            right = F.cosine_similarity(anchor, positive) > F.cosine_similarity(anchor, negatives[0])
            metrics.update(means={"loss": loss, "accuracy": TokenLoss(right.sum(), loss.num_tokens)})
            return
        scores = contrastive_scores(anchor, [positive, *negatives], self.scale)
        rank = 1 + (scores > scores.diagonal()[:, None]).sum(1)
        sums = {"accuracy": (rank == 1).sum(), "mrr": rank.double().reciprocal().sum()}
        means = {name: TokenLoss(total, loss.num_tokens) for name, total in sums.items()}
        metrics.update(means={"loss": loss, **means})

    def shrink_chunk_size(self, rows: int) -> int | None:
        """Halve the chunks of a batch of so many rows; other ranks, if they wait for this one's, must not do without.

        Returns:
            Rows in a chunk from now on; None, and nothing was changed, if there cannot be fewer.
        """
        size = min(self.chunk_size or rows, rows)
        if size <= 1 or not self.needs_whole_batches or self._gathers():
            return None
        self.chunk_size = size // 2
        return self.chunk_size

    def write_beside(self, folder: Path, config: PretrainedConfig) -> None:
        """What sentence-transformers reads."""
        write_pooling(folder, self.pooled, int(config.get_text_config().hidden_size))

    # ---- details -------------------------------------------------------------------------------------------------

    def _gathers(self) -> bool:
        return self.across_ranks and torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1

    def _loss(self, texts: Mapping[str, Tensor], batch: Mapping[str, Any]) -> TokenLoss:
        anchor, positive, *negatives = texts.values()
        if self.loss_name == "contrastive":
            options: dict[str, Any] = {"scale": self.scale, "symmetric": self.symmetric}
            return contrastive_loss(anchor, positive, negatives, **options, across_ranks=self._gathers())
        if self.loss_name == "triplet":
            return triplet_loss(anchor, positive, negatives[0], self.margin)
        return cosine_loss(anchor, positive, batch["labels"][_real_rows(batch)])

    def _pairs(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Embeddings of anchor, positive and negatives, in this order, without rows that fill up a rank's batch."""
        texts = texts_of(batch)
        order = sorted(texts, key=lambda name: (name != "anchor", name != "positive"))  # stable
        ordered = {name: texts[name] for name in order}
        _check_pairs(self.loss_name, list(ordered), batch)
        kept = _real_rows(batch)
        return {name: values[kept] for name, values in self._embeddings(model, ordered).items()}

    def _embeddings(self, model: nn.Module, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.chunk_size is None:
            return {name: self.embed(model, columns) for name, columns in texts.items()}
        return dict(zip(texts, embed_in_chunks(model, self.embed, list(texts.values()), self.chunk_size), strict=True))


def texts_of(batch: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The columns of each text of a row by name; the name is empty for plain ``input_ids``.

    Example:
        >>> texts_of({"anchor_input_ids": 1, "anchor_attention_mask": 2, "positive_input_ids": 3, "row_ids": 4})
        {'anchor': {'input_ids': 1, 'attention_mask': 2}, 'positive': {'input_ids': 3}}
        >>> texts_of({"input_ids": 1, "row_ids": 2})
        {'': {'input_ids': 1}}
    """
    names = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids") and batch[key] is not None]
    texts = {
        name: {key.removeprefix(f"{name}_"): value for key, value in batch.items() if _is_of(key, name, names)}
        for name in names
    }
    if not texts and batch.get("input_ids") is not None:
        texts[""] = {key: value for key, value in batch.items() if key not in ("labels", "row_ids")}
    return texts


def _is_of(key: str, name: str, names: Sequence[str]) -> bool:
    """``negative_1_input_ids`` is a column of ``negative_1``, not of ``negative``."""
    return key.startswith(f"{name}_") and not any(
        len(other) > len(name) and key.startswith(f"{other}_") for other in names
    )


def _check_pairs(loss: str, names: Sequence[str], batch: Mapping[str, Any]) -> None:
    if list(names[:2]) != ["anchor", "positive"] or not all(name.startswith("negative") for name in names[2:]):
        raise KeyError(
            f"Embeddings are trained on `anchor_input_ids`, `positive_input_ids` and, optionally, "
            f"`negative_input_ids`, but got the keys {sorted(batch)}."
        )
    if loss == "cosine" and not (isinstance(batch.get("labels"), Tensor) and batch["labels"].ndim == 1):
        raise KeyError("loss='cosine' needs `labels` (rows,), the similarity of each anchor and its positive.")
    if loss == "contrastive" and batch.get("labels") is not None:
        raise ValueError(
            "The batch has `labels`, but in the contrastive loss every positive belongs to its anchor. Pass "
            "task_options={'loss': 'cosine'} for similarities, or leave `labels` out."
        )
    if loss == "triplet" and len(names) != 3:
        raise KeyError(f"loss='triplet' needs anchor, positive and one negative, but got {', '.join(names)}.")


def _real_rows(batch: Mapping[str, Any]) -> Tensor | slice:
    """The rows that are of the data: a rank that has none left gets a row with the id -1."""
    row_ids = batch.get("row_ids")
    return row_ids != -1 if isinstance(row_ids, Tensor) else slice(None)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
