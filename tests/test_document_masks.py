"""Masks that keep packed documents apart in encoders, against each document by itself."""

import pytest
import torch
from packed_models import ENCODERS, build, documents, gradients, pack
from transformers import AutoConfig

from lightning_llm.document_masks import document_ids, packed_attention_mask, packed_encoder_inputs

POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]])


def test_a_document_begins_where_positions_do_not_count_on():
    assert document_ids(POSITIONS).tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]]
    assert document_ids(torch.tensor([[4, 5, 6, 4, 5]])).tolist() == [[0, 0, 0, 1, 1]]


def test_sdpa_gets_booleans_and_eager_numbers_to_add():
    ids = document_ids(POSITIONS)
    same = torch.stack([row[:, None] == row for row in ids])[:, None]
    config = AutoConfig.for_model("bert", attn_implementation="sdpa")
    assert torch.equal(packed_attention_mask(config, POSITIONS), same)
    config = AutoConfig.for_model("bert", attn_implementation="eager")
    for dtype in (torch.float32, torch.bfloat16):
        mask = packed_attention_mask(config, POSITIONS, dtype)
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, same)
        assert (mask[~same] == torch.finfo(dtype).min).all()


def test_modernbert_gets_a_mask_for_each_type_of_layer():
    config = AutoConfig.for_model("modernbert", local_attention=2, attn_implementation="sdpa")
    masks = packed_attention_mask(config, torch.tensor([[0, 1, 2, 3, 0]]))
    assert masks["full_attention"][0, 0, 0].tolist() == [True, True, True, True, False]
    assert masks["sliding_attention"][0, 0, 0].tolist() == [True, True, False, False, False]
    assert masks["sliding_attention"][0, 0, 4].tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_packed_loss_and_gradients_of_encoders_equal_those_of_separate_documents(model_type, attention):
    """To 1e-12 in float64; ModernBERT takes eager attention's softmax in float32, so there to 1e-6."""
    tolerance = 1e-6 if (model_type, attention) == ("modernbert", "eager") else 1e-12
    model, rows = build(model_type, attention).eval(), documents()
    generator = torch.Generator().manual_seed(1)
    weights = [[torch.rand(len(d), 61, generator=generator, dtype=torch.float64) for d in row] for row in rows]
    flat = [pair for row in zip(rows, weights, strict=True) for pair in zip(*row, strict=True)]
    separate = sum((model(input_ids=d[None]).logits[0].log_softmax(-1) * w).sum() for d, w in flat)
    batch = pack(rows)

    def packed_total(**inputs):
        logits = model(**inputs).logits.log_softmax(-1)
        used = [logits[i, : sum(map(len, row))] for i, row in enumerate(rows)]
        return sum((part * torch.cat(w)).sum() for part, w in zip(used, weights, strict=True))

    packed = packed_total(**packed_encoder_inputs(model, batch))
    assert abs(packed / separate - 1) <= tolerance
    wanted = gradients(model, separate)
    assert (gradients(model, packed) - wanted).abs().max() <= tolerance * wanted.abs().max()
    leaking = packed_total(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    assert abs(leaking / separate - 1) > 1e-3


def test_a_row_without_positions_is_one_document():
    model = build("roberta")
    assert set(packed_encoder_inputs(model, {"input_ids": POSITIONS})) == {"input_ids"}


def test_unknown_models_decoders_and_attention_are_refused():
    for model_type, options in (("deberta-v2", {}), ("llama", {}), ("bert", {"is_decoder": True})):
        config = AutoConfig.for_model(model_type, **options)
        with pytest.raises(ValueError, match=rf"encoders bert, .*'{model_type}'.*verify_packing.*one document a row"):
            packed_attention_mask(config, POSITIONS)
    config = AutoConfig.for_model("bert", attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"'sdpa' and 'eager', but the model has 'flash_attention_2'"):
        packed_attention_mask(config, POSITIONS)
