"""AudioClassificationDataModule: files, bytes and samples; what a model cannot take is named with its row."""

import io
import json

import datasets
import numpy as np
import pytest
import soundfile
import task_models
import torch
from example_training import batches_of_ranks, largest_difference, row_ids_of, step_gradients
from transformers import ASTFeatureExtractor, Wav2Vec2FeatureExtractor

from lightning_llm import LLMModule
from lightning_llm.datamodules import AudioClassificationDataModule
from lightning_llm.datamodules.examples.records import RecordError

WAV2VEC2 = {**task_models.WAV2VEC2, "num_hidden_layers": 1, "conv_kernel": [8, 4], "conv_stride": [8, 4]}
RATE = 1000
TONES = {"high": 400, "low": 40}


def tone(label, number):
    time = np.arange(400 + 37 * (number % 5)) / RATE
    return (0.5 * np.sin(2 * np.pi * TONES[label] * time + number)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """Ten recordings of each class."""
    root = tmp_path / "sounds"
    for number in range(20):
        label = list(TONES)[number % 2]
        (root / label).mkdir(parents=True, exist_ok=True)
        soundfile.write(root / label / f"{number:02}.wav", tone(label, number), RATE, subtype="FLOAT")
    return root


@pytest.fixture
def make(tmp_path, folder):
    def make(data=None, **options):
        defaults = {"sampling_rate": RATE, "micro_batch_size": 4, "validation_fraction": 0}
        data = str(folder) if data is None else data
        return AudioClassificationDataModule(data, **{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


def rows_of(folder):
    return [
        {"audio": str(path.relative_to(folder)), "label": path.parent.name} for path in sorted(folder.glob("*/*.wav"))
    ]


def whole(data):
    data.setup("fit")
    return data._dataset("train")[list(range(len(data._dataset("train"))))]


def test_batches_are_the_feature_extractors_own(make, folder):
    data = make()
    batch = whole(data)
    files = sorted(folder.glob("*/*.wav"))
    samples = [soundfile.read(file, dtype="float32")[0] for file in files]
    expected = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)(
        samples, sampling_rate=RATE, padding=True, return_tensors="pt"
    )
    assert (batch["input_values"] - expected["input_values"]).abs().max() < 1e-6
    assert torch.equal(batch["attention_mask"], expected["attention_mask"].long())
    assert [data.label_names[label] for label in batch["labels"]] == [file.parent.name for file in files]


def test_files_data_sets_bytes_and_samples_give_the_same_batches(make, folder, tmp_path):
    expected = whole(make())
    rows = rows_of(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [soundfile.read(folder / row["audio"], dtype="float32")[0] for row in rows]
    contents = [{**row, "audio": {"bytes": (folder / row["audio"]).read_bytes(), "path": None}} for row in rows]
    features = datasets.Features({"audio": datasets.Audio(), "label": datasets.ClassLabel(names=list(TONES))})
    forms = {
        "jsonl": str(folder / "rows.jsonl"),
        "bytes": contents,
        "data set": datasets.Dataset.from_list(contents).cast(features),
        "mappings": [
            {**row, "audio": {"array": array, "sampling_rate": RATE}} for row, array in zip(rows, samples, strict=True)
        ],
        "lists": [{**row, "audio": array.tolist()} for row, array in zip(rows, samples, strict=True)],
    }
    for form, data in forms.items():
        found = whole(make(data))
        assert all(torch.equal(found[name], expected[name]) for name in expected), form


def test_channels_are_averaged(make, tmp_path):
    left, right = np.linspace(-1, 1, 400), np.linspace(1, 0, 400)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    mean = ((left + right) / 2).astype(np.float32)
    data = make([{"audio": str(tmp_path / "stereo.wav"), "label": "a"}, {"audio": mean, "label": "b"}])
    values = whole(data)["input_values"]
    assert (values[0] - values[1]).abs().max() < 1e-5


def test_what_is_beyond_max_seconds_is_said(make):
    data = make(max_seconds=0.41)
    with pytest.warns(
        UserWarning, match="16 of 20 rows .* longer than max_seconds=0.41, and 1,320 samples are left out"
    ):
        batch = whole(data)
    assert batch["input_values"].shape == (20, 410)


def test_spectrograms_keep_their_shape(make):
    extractor = ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=16, max_length=40)
    rows = [{"audio": tone(label, number), "label": label} for number, label in enumerate(["high", "low"] * 2)]
    batch = whole(make(rows, sampling_rate=None, feature_extractor=extractor))
    assert batch["input_values"].shape == (4, 40, 16)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_row_comes_once_within_a_budget_of_samples(make, num_ranks):
    per_rank = batches_of_ranks(lambda: make(batching="padded", micro_batch_tokens=2000), num_ranks)
    assert sorted(row for batches in per_rank for row in row_ids_of(batches)) == list(range(20))
    filled = [batch for batches in per_rank for batch in batches if (batch["row_ids"] >= 0).all()]
    assert max(batch["input_values"].numel() for batch in filled) <= 2000


def wav_of(samples, rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.wav", "the file missing.wav of column 'audio' cannot be opened"),
        (None, "column 'audio' should hold a path or a file's bytes, but holds nothing"),
        (b"no sound", "the recording 8 bytes in column 'audio' does not open"),
        (wav_of(np.zeros(0)), "the recording in column 'audio' has no sample"),
        ([], "the recording in column 'audio' has no sample"),
        (wav_of(np.zeros(80), 8000), "has 8000 samples a second, but the model expects 1000. Convert .*-ar 1000"),
        ({"array": [0.0], "sampling_rate": 44100}, "the recording in column 'audio' has 44100 samples a second"),
        ([[0.0], [1.0]], "should hold the samples of one channel"),
        (["a"], "should hold the samples of one channel"),
    ],
)
def test_bad_recordings_are_named_before_training(make, value, message):
    good = {"audio": tone("low", 0), "label": "low"}
    with pytest.raises(RecordError, match=f"the data, row 1: .*{message}"):
        make([good, {"audio": value, "label": "low"}]).setup("fit")


def test_a_file_that_breaks_later_is_named(make, folder):
    data = make(num_workers=1)
    data.setup("fit")
    (folder / "low" / "01.wav").write_bytes(b"RIFF")
    with pytest.raises(RecordError, match=r"low/01.wav: the recording .*low/01.wav in column 'audio' does not open"):
        list(data.train_dataloader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_extractor": "folder"}, "leave out `sampling_rate`"),
        ({"max_seconds": 0}, "`max_seconds` must be above 0, but got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_missing_feature_extractor_is_named(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no feature extractor in .*preprocessor_config.json"):
        make(sampling_rate=None, feature_extractor=str(tmp_path)).setup("fit")


def test_a_model_trains_on_them_and_its_folder_reads_sounds(make, quiet_trainer, tmp_path, folder):
    from transformers import pipeline

    from lightning_llm.callbacks import HuggingFaceCheckpoint

    torch.manual_seed(0)
    data = make(validation_data=str(folder))
    export = HuggingFaceCheckpoint(dirpath=str(tmp_path / "export"))
    trainer = quiet_trainer(max_epochs=10, callbacks=[export])
    trainer.fit(LLMModule(WAV2VEC2, "audio-classification", learning_rate=1e-2, warmup=0), data)
    assert trainer.callback_metrics["val/accuracy"] == 1
    exported = next(path.parent for path in sorted((tmp_path / "export").rglob("preprocessor_config.json")))
    classify = pipeline("audio-classification", model=str(exported))
    assert classify(tone("low", 3))[0]["label"] == "low"


def test_a_ragged_cut_of_the_global_batch_does_not_change_the_gradient(make, tmp_path, folder):
    for number, file in enumerate(sorted(folder.glob("*/*.wav"))):  # of one length: padding changes what a model hears
        soundfile.write(file, tone(file.parent.name, number)[:400], RATE, subtype="FLOAT")

    def gradients(micro_batches, **options):
        torch.manual_seed(0)
        module = LLMModule(WAV2VEC2, "audio-classification")
        return step_gradients(tmp_path, module, make(global_batch_size=10, **options), micro_batches)

    first = gradients(1)
    assert largest_difference(gradients(3), first) < 1e-12
    assert largest_difference(gradients(1, seed=1), first) > 1e-3
