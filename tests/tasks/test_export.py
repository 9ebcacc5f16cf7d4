"""A trained head in a Hugging Face folder answers in ``pipeline`` as it does in the module, and keeps its names."""

import json

import pytest
import torch
from task_models import BART, BERT, CASES, DISTILBERT, TAGS, VIT, WAV2VEC2, padded
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    pipeline,
)

from lightning_llm import LLMModule
from lightning_llm.callbacks import HuggingFaceCheckpoint

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "in", "on", "mat", "park", "ann", "bob", "went", "to", "rome"]


def word_tokenizer(**special):
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", **special}
    vocab = {word: index for index, word in enumerate([*special.values(), "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    cls, sep = (("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"]))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=40, **special)


TEXTS = ["the cat sat on the mat", "ann went to rome", "a dog ran in the park", "bob sat"]


def trained(make_trainer, folder, module, rows, collate, tokenizer):
    loader = DataLoader(rows, 2, collate_fn=collate)
    export = HuggingFaceCheckpoint(str(folder), tokenizer=tokenizer, monitor=None)
    make_trainer(max_epochs=2, callbacks=[export]).fit(module, loader)
    module.eval()
    return folder / "last"


def module_of(config, task, **options):
    torch.manual_seed(0)
    return LLMModule(dict(config), task, learning_rate=1e-2, lr_schedule="constant", warmup=0, **options)


def test_text_classification(quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    module = module_of(BERT, "sequence-classification", labels=["bad", "fair", "good"])
    rows = [{**tokenizer(text), "labels": index % 3} for index, text in enumerate(TEXTS)]
    folder = trained(quiet_trainer, tmp_path, module, rows, DataCollatorWithPadding(tokenizer), tokenizer)
    scores = module.predict_step(DataCollatorWithPadding(tokenizer)([tokenizer(text) for text in TEXTS]), 0)
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert config["problem_type"] == "single_label_classification"
    found = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)(TEXTS)
    for row, answers in enumerate(found):
        by_name = {answer["label"]: answer["score"] for answer in answers}
        wanted = dict(zip(["bad", "fair", "good"], scores["probabilities"][row].tolist(), strict=True))
        assert by_name == pytest.approx(wanted, rel=1e-4)


def test_text_classification_with_several_labels_and_with_a_number(quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    several = {"labels": ["x", "y"], "task_options": {"problem_type": "multi_label_classification"}}
    for name, options, label in (("several", several, [1.0, 0.0]), ("number", {"labels": 1}, 2.5)):
        module = module_of(DISTILBERT, "sequence-classification", **options)
        collate = DataCollatorWithPadding(tokenizer)
        rows = [{key: value for key, value in tokenizer(text).items() if key != "token_type_ids"} for text in TEXTS]
        labelled = [{**row, "labels": label} for row in rows]
        folder = trained(quiet_trainer, tmp_path / name, module, labelled, collate, tokenizer)
        scores = module.predict_step(collate(rows), 0)
        found = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)(TEXTS)
        wanted = scores["probabilities"] if name == "several" else scores["values"][:, None]
        for row, answers in enumerate(found):
            by_name = sorted((answer["label"], answer["score"]) for answer in answers)
            assert [score for _, score in by_name] == pytest.approx(wanted[row].tolist(), rel=1e-4)


def test_token_classification(quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    module = module_of(BERT, "token-classification", labels=TAGS)
    people, places = ("ann", "bob"), ("rome", "park")
    rows = []
    for text in TEXTS:
        tags = [1 if word in people else 3 if word in places else 0 for word in text.split()]
        rows.append({**tokenizer(text), "labels": [-100, *tags, -100]})
    collate = DataCollatorForTokenClassification(tokenizer)
    folder = trained(quiet_trainer, tmp_path, module, rows * 20, collate, tokenizer)
    scores = module.predict_step(collate(rows), 0)
    named = pipeline("token-classification", model=str(folder), device="cpu", ignore_labels=[])
    for row, text in enumerate(TEXTS):
        found = [answer for answer in named(text) if answer["word"] in WORDS]
        classes = scores["predictions"][row, 1 : 1 + len(found)].tolist()
        assert [answer["entity"] for answer in found] == [TAGS[index] for index in classes]
        best = scores["probabilities"][row, 1 : 1 + len(found)].amax(-1).tolist()
        assert [float(answer["score"]) for answer in found] == pytest.approx(best, rel=1e-4)
    assert [answer["entity"] for answer in named("ann ran to rome") if answer["entity"] != "O"] == ["B-PER", "B-LOC"]


def test_fill_mask(quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    module = module_of(BERT, "masked-lm")
    rows = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        masked = [*ids[:2], tokenizer.mask_token_id, *ids[3:]]
        rows.append({"input_ids": masked, "labels": [-100, -100, ids[2], *[-100] * (len(ids) - 3)]})
    collate = DataCollatorForTokenClassification(tokenizer)  # pads labels too
    folder = trained(quiet_trainer, tmp_path, module, rows * 40, collate, tokenizer)
    batch = collate(rows)
    predictions = module.predict_step(batch, 0)["predictions"][:, 2]
    fill = pipeline("fill-mask", model=str(folder), device="cpu", top_k=1)
    texts = ["the [MASK] sat on the mat", "ann [MASK] to rome", "a [MASK] ran in the park", "bob [MASK]"]
    assert [answer[0]["token"] for answer in fill(texts)] == predictions.tolist()
    assert predictions.tolist() == [row["labels"][2] for row in rows]  # it has learned them


def test_question_answering(quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    module = module_of(DISTILBERT, "question-answering")
    rows = []
    for index, text in enumerate(TEXTS):
        encoded = {key: value for key, value in tokenizer("the cat", text).items() if key != "token_type_ids"}
        rows.append({**encoded, "start_positions": 4 + index % 2, "end_positions": 5})
    collate = DataCollatorWithPadding(tokenizer)
    folder = trained(quiet_trainer, tmp_path, module, rows, collate, tokenizer)
    batch = collate(rows)
    scores = module.predict_step(batch, 0)
    with torch.no_grad():
        output = AutoModelForQuestionAnswering.from_pretrained(folder)(batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(output.start_logits, scores["start_logits"], atol=1e-6)
    assert torch.allclose(output.end_logits, scores["end_logits"], atol=1e-6)


def test_text_from_text(quiet_trainer, tmp_path):
    tokenizer = word_tokenizer()
    generate = {"max_new_tokens": 6, "num_beams": 2}

    config = {**BART, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    module = module_of(config, "seq2seq", task_options={"generate": generate})
    rows = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"][1:]} for text in TEXTS[1::2]]
    rows = [{key: value for key, value in row.items() if key != "token_type_ids"} for row in rows]
    collate = DataCollatorForSeq2Seq(tokenizer)
    folder = trained(quiet_trainer, tmp_path, module, rows * 40, collate, tokenizer)
    module.task.tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = collate([dict(row) for row in rows])
    scores = module.predict_step(batch, 0)
    assert scores["token_ids"].shape == (2, 7)
    assert scores["texts"] == TEXTS[1::2]  # it has learned to copy
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokens = loaded.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **generate)
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == scores["texts"]
    assert module.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **generate).equal(tokens)
    metrics = module.task.metrics()
    module.task.evaluate(module.model, batch, metrics)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found["rouge1_fmeasure"] == found["rougeL_fmeasure"] == pytest.approx(1.0)
    assert found["chrf"] == pytest.approx(1.0)
    assert found["bleu"] == pytest.approx(1.0)


def test_image_classification(quiet_trainer, tmp_path):
    from transformers import ViTImageProcessorPil

    image = pytest.importorskip("PIL.Image")
    import numpy as np

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    images = [image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)) for i in range(6)]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    module = module_of(VIT, "image-classification", labels=["cat", "dog", "cow"])
    rows = [{"pixel_values": pixels[index], "labels": torch.tensor(index % 3)} for index in range(6)]
    folder = trained(quiet_trainer, tmp_path, module, rows, None, processor)
    scores = module.predict_step({"pixel_values": pixels}, 0)
    found = pipeline("image-classification", model=str(folder), device="cpu", top_k=3)(images)
    for row, answers in enumerate(found):
        by_name = {answer["label"]: answer["score"] for answer in answers}
        wanted = dict(zip(["cat", "dog", "cow"], scores["probabilities"][row].tolist(), strict=True))
        assert by_name == pytest.approx(wanted, rel=1e-4)


def test_audio_classification(quiet_trainer, tmp_path):
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True)
    sounds = [torch.randn(200 + 20 * index).numpy() for index in range(4)]
    module = module_of(WAV2VEC2, "audio-classification", labels=["yes", "no"])
    encoded = extractor(sounds, sampling_rate=16000, padding=True, return_tensors="pt")
    rows = [{key: value[index] for key, value in encoded.items()} for index in range(4)]
    rows = [{**row, "labels": torch.tensor(index % 2)} for index, row in enumerate(rows)]
    folder = trained(quiet_trainer, tmp_path, module, rows, None, extractor)
    found = pipeline("audio-classification", model=str(folder), device="cpu")(sounds[3])
    scores = module.predict_step(extractor(sounds[3:], sampling_rate=16000, return_tensors="pt"), 0)
    wanted = dict(zip(["yes", "no"], scores["probabilities"][0].tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in found} == pytest.approx(wanted, rel=1e-4)


def test_a_base_model_gets_a_fresh_head_and_a_head_of_another_size_is_replaced(tmp_path):
    torch.manual_seed(0)
    sizes = {key: value for key, value in BERT.items() if key != "model_type"}
    base = BertModel(BertConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    module = LLMModule(str(tmp_path / "base"), "sequence-classification", labels=["a", "b", "c"])
    module.configure_model()
    assert torch.equal(module.model.bert.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight)
    assert module.model.classifier.weight.shape == (3, 16)
    module.model.save_pretrained(tmp_path / "three")
    same = LLMModule(str(tmp_path / "three"), "sequence-classification")
    same.configure_model()
    assert same.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(same.model.classifier.weight, module.model.classifier.weight)
    other = LLMModule(str(tmp_path / "three"), "sequence-classification", labels=5)
    other.configure_model()
    assert other.model.classifier.weight.shape == (5, 16)
    assert torch.equal(other.model.bert.pooler.dense.weight, module.model.bert.pooler.dense.weight)


def test_a_checkpoint_of_lightning_brings_names_and_problem_type_back(quiet_trainer, tmp_path):
    case = CASES["some classes"]

    module = LLMModule(
        dict(case.config), case.task, lr_schedule="constant", warmup=0, **{**case.options, "labels": TAGS[:4]}
    )
    trainer = quiet_trainer(max_epochs=1, precision="64-true")
    trainer.fit(module, DataLoader(padded(case.rows(4)), 2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = LLMModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.config.id2label == dict(enumerate(TAGS[:4]))
    assert loaded.task.problem_type == loaded.config.problem_type == "multi_label_classification"
    kind = AutoModelForSequenceClassification.from_config(loaded.config)
    assert type(loaded.model) is type(kind)
