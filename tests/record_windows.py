"""Long rows of words with tags, and questions with long contexts: their data modules, and a model for them."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_llm.datamodules import QuestionAnsweringDataModule, TokenClassificationDataModule

BERT = {
    "model_type": "bert",
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TAGS = ["O", "B-LOC", "I-LOC"]
_PLACES = [["New", "York"], ["San", "Marino"], ["Upper", "Volta"]]
_FILLERS = ["is", "far", "and", "wide", "open", "or", "so"]


def _words(number):
    tokens, tags = [], []
    for place in range(number % 4 + 2):
        fillers = _FILLERS[: (number + place) % 7]
        tokens += [*fillers, *_PLACES[(number + place) % 3]]
        tags += [*["O"] * len(fillers), "B-LOC", "I-LOC"]
    return {"tokens": tokens, "ner_tags": tags}


def _question(number):
    names = ["big red Ann", "old Bob", "Eve", "Max the cat"]
    context = "in came " + "word " * (number % 7) * 2 + f"then {names[number % 4]} came" + " in" * (number % 5)
    answer = {"text": [names[number % 4]], "answer_start": [context.index(names[number % 4])]}
    if number % 6 == 5:
        answer = {"text": [], "answer_start": []}
    return {"id": f"q{number}", "question": "Who came ?", "context": context, "answers": answer}


WORDS = [_words(number) for number in range(16)]
QUESTIONS = [_question(number) for number in range(24)]


def tokens_data(cache, data=WORDS, **options):
    """Windows of 20 bytes."""
    defaults = {"tokenizer": "bytes", "max_length": 20, "long_texts": "windows", "overlap": 6, "micro_batch_size": 4}
    settings = {**defaults, "validation_fraction": 0, "cache_dir": str(cache), **options}
    return TokenClassificationDataModule(data, **settings)


def answers_data(cache, data=QUESTIONS, **options):
    """Windows of 32 bytes, ten of them the question's."""
    defaults = {"tokenizer": "bytes", "max_length": 32, "doc_stride": 12, "micro_batch_size": 4}
    return QuestionAnsweringDataModule(data, **{**defaults, "cache_dir": str(cache), **options})


WORDWISE = {"max_length": 12, "doc_stride": 3}


def word_tokenizer(pair):
    """Words for tokens, with [CLS], which stands for "no answer", where the template of pairs has it."""
    words = sorted({word for row in QUESTIONS for word in (row["question"] + " " + row["context"]).split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "[CLS]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A", pair=pair, special_tokens=[("[SEP]", 2), ("[CLS]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
