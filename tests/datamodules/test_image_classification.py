"""ImageClassificationDataModule: folders, paths and bytes; every kind of image in three colours, upright."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from example_training import batches_of_ranks, largest_difference, row_ids_of, step_gradients
from PIL import Image

from lightning_llm import LLMModule
from lightning_llm.datamodules import ImageClassificationDataModule
from lightning_llm.datamodules.examples.images import Augmentation, open_image
from lightning_llm.datamodules.examples.records import RecordError

VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
COLOURS = {"blue": (0, 0, 250), "red": (250, 0, 0)}


def image_of(colour, seed):
    noise = np.random.default_rng(seed).integers(0, 6, (12 + seed % 5, 10, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Ten images of each class."""
    root = tmp_path / "images"
    for number in range(20):
        colour = list(COLOURS)[number % 2]
        (root / colour).mkdir(parents=True, exist_ok=True)
        image_of(colour, number).save(root / colour / f"{number:02}.png")
    (root / "red" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def make(tmp_path, folder):
    def make(data=None, **options):
        defaults = {"image_size": 16, "micro_batch_size": 4, "validation_fraction": 0}
        data = str(folder) if data is None else data
        return ImageClassificationDataModule(data, **{**defaults, "cache_dir": str(tmp_path / "cache"), **options})

    return make


def rows_of(folder):
    return [
        {"image": str(path.relative_to(folder)), "label": path.parent.name} for path in sorted(folder.glob("*/*.png"))
    ]


def pixels(data):
    data.setup("fit")
    batch = data._dataset("train")[list(range(len(data._dataset("train"))))]
    return batch["pixel_values"], batch["labels"].tolist()


def test_a_folder_for_each_class_gives_rows_of_the_processors_pixels(make, folder):
    data = make()
    values, labels = pixels(data)
    assert data.label_names == ["blue", "red"]
    assert labels == [0] * 10 + [1] * 10
    assert values.dtype == torch.float32
    first = sorted((folder / "blue").glob("*.png"))[0]
    expected = data.image_processor(Image.open(first), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(values[0], expected)
    assert values.shape == (20, 3, 16, 16)
    resized = Image.open(first).resize((16, 16), Image.Resampling.BILINEAR)
    plain = (torch.tensor(np.array(resized)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    assert (values[0] - plain).abs().max() < 1e-5
    assert data.row_name(0) == str(first)


def test_files_data_sets_bytes_and_arrays_give_the_same_batches(make, folder, tmp_path):
    expected = pixels(make())
    rows = rows_of(folder)
    contents = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.csv").write_text("image,label\n" + "".join(f"{row['image']},{row['label']}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(contents), tmp_path / "rows.parquet")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["blue", "red"])})
    forms = {
        "jsonl": str(folder / "rows.jsonl"),
        "csv": str(folder / "rows.csv"),
        "parquet": str(tmp_path / "rows.parquet"),
        "bytes": contents,
        "data set": datasets.Dataset.from_list(contents, features=features),
        "PIL": [{**row, "image": Image.open(folder / row["image"])} for row in rows],
        "arrays": [{**row, "image": np.array(Image.open(folder / row["image"]))} for row in rows],
    }
    for form, data in forms.items():
        found = pixels(make(data))
        assert torch.equal(found[0], expected[0]), form
        assert found[1] == expected[1], form


def test_a_folder_of_splits_is_looked_through_by_split(make, folder, tmp_path):
    root = tmp_path / "splits"
    folder.rename(root / "train" if root.mkdir() is None else root)
    (root / "validation" / "red").mkdir(parents=True)
    image_of("red", 3).save(root / "validation" / "red" / "x.png")
    data = make(str(root), validation_data=str(root))
    data.setup("fit")
    assert [len(data._dataset(split)) for split in ("train", "validation")] == [20, 1]
    assert data._dataset("validation")[[0]]["labels"].tolist() == [1]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_three_colours(mode):
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    found = open_image(file.getvalue(), "row 0", "image")
    assert found.mode == "RGB"
    assert np.array(found).min() == 255


def test_an_image_is_turned_as_its_camera_says():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255  # a white line on top
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees, clockwise
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    found = np.array(open_image(file.getvalue(), "row 0", "image"))
    assert found.shape == (6, 4, 3)
    assert (found[:, -1] == 255).all()
    assert (found[:, 0] == 0).all()


def test_deep_images_are_refused():
    image = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    with pytest.raises(RecordError, match="row 3: the image of the row in column 'image' has more than 8 bits a pixel"):
        open_image(image, "row 3", "image")


def test_an_image_that_does_not_open_is_named_with_its_row(make, folder):
    broken = folder / "red" / "01.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(folder)))
    for data in (make(), make(str(folder / "rows.jsonl")), make(num_workers=1)):
        data.setup("fit")
        with pytest.raises(
            RecordError, match=rf"the image {broken} in column 'image' does not open \(.*\). Mend the file"
        ):
            list(data.train_dataloader())
    with pytest.raises(RecordError, match="rows.jsonl, line 11: the image"):
        data = make(str(folder / "rows.jsonl"))
        data.setup("fit")
        data._dataset("train")[[10]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing.png", "row 0: the file missing.png of column 'image' cannot be opened .No such file"),
        (None, "row 0: column 'image' should hold a path or a file's bytes, but holds nothing"),
        ({"bytes": None, "path": None}, "row 0: column 'image' should hold a path .* but holds nothing"),
        (3, "row 0: column 'image' should hold a path .* but holds int"),
        (b"no image", "row 0: the image 8 bytes in column 'image' does not open"),
    ],
)
def test_bad_images_are_named(make, value, message):
    data = make([{"image": value, "label": "red"}, {"image": value, "label": "blue"}])
    with pytest.raises(RecordError, match=message):
        data.setup("fit")
        data._dataset("train")[[0]]


def test_bad_labels_columns_and_empty_classes_are_named(make, folder):
    (folder / "green").mkdir()
    with pytest.raises(ValueError, match="No training row of .*images has the class 'green' in its column 'label'"):
        make().setup("fit")
    rows = rows_of(folder)
    (folder / "green").rmdir()
    with pytest.raises(RecordError, match="the data, row 1: column 'label' should hold the name"):
        make([rows[0], {**rows[0], "label": None}]).setup("fit")
    with pytest.raises(RecordError, match=r"no column 'picture'; .* image_column=..., label_column=..."):
        make(rows, image_column="picture").setup("fit")
    with pytest.raises(RecordError, match="the data, row 0: the file blue/00.png of column 'image' cannot be opened"):
        make(rows).setup("fit")  # rows in memory have no folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_processor": "folder"}, "leave out image_size and the others"),
        ({"batching": "padded", "micro_batch_tokens": 8}, "leave out batching='padded'"),
        ({"random_crop": 0}, "`random_crop` is a share of the image's area"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_missing_image_processor_is_named(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no image processor in .*preprocessor_config.json"):
        make(image_size=None, image_processor=str(tmp_path)).setup("fit")


def test_an_image_processor_is_loaded_from_its_folder(make, tmp_path):
    make(image_size=[8, 12]).image_processor.save_pretrained(tmp_path / "processor")
    data = make(image_size=None, image_processor=str(tmp_path / "processor"))
    assert pixels(data)[0].shape == (20, 3, 8, 12)


def test_augmented_images_follow_from_seed_epoch_and_row_alone(make):
    options = {"random_flip": True, "random_crop": 0.3, "validation_fraction": 0.2}

    def by_row(per_rank):
        return {
            row: values
            for batches in per_rank
            for batch in batches
            for row, values in zip(batch["row_ids"].tolist(), batch["pixel_values"], strict=True)
            if row >= 0
        }

    one = by_row(batches_of_ranks(lambda: make(**options), 1))
    other = by_row(batches_of_ranks(lambda: make(**options, micro_batch_size=3, num_workers=1), 2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[row], other[row]) for row in one)
    data = make(**options)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.set_epoch(1)
    later = by_row([list(loader)])
    assert any(not torch.equal(one[row], later[row]) for row in one)
    plain = make(validation_fraction=0.2)
    plain.setup("fit")
    for batch, expected in zip(data.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_a_crop_keeps_its_share_and_a_flip_mirrors():
    image = Image.fromarray(np.arange(20 * 30, dtype=np.uint16).reshape(20, 30).astype(np.uint8))
    for row in range(200):
        width, height = Augmentation(crop=0.5)(image, row, 0).size
        assert 0.3 < width * height / 600 <= 1
    flips = [np.array_equal(np.array(Augmentation(flip=True)(image, row, 0)), np.array(image)) for row in range(400)]
    assert 140 < sum(flips) < 260
    mirrored = np.array(Augmentation(flip=True)(image, flips.index(False), 0))
    assert np.array_equal(mirrored, np.array(image)[:, ::-1])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_row_comes_once_on_any_ranks(make, num_ranks):
    per_rank = batches_of_ranks(lambda: make(micro_batch_size=3), num_ranks)
    assert sorted(row for batches in per_rank for row in row_ids_of(batches)) == list(range(20))


def test_a_model_trains_on_them_and_its_folder_reads_images(make, quiet_trainer, tmp_path, folder):
    from transformers import pipeline

    from lightning_llm.callbacks import HuggingFaceCheckpoint

    torch.manual_seed(0)
    data = make(validation_data=str(folder), num_workers=1)
    export = HuggingFaceCheckpoint(dirpath=str(tmp_path / "export"))
    trainer = quiet_trainer(max_epochs=8, callbacks=[export], enable_checkpointing=False)
    module = LLMModule(VIT, "image-classification", learning_rate=1e-2, warmup=0)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/accuracy"] == 1
    exported = next(path.parent for path in sorted((tmp_path / "export").rglob("preprocessor_config.json")))
    classify = pipeline("image-classification", model=str(exported))
    assert classify(str(folder / "red" / "01.png"))[0]["label"] == "red"


def test_a_ragged_cut_of_the_global_batch_does_not_change_the_gradient(make, tmp_path):
    def gradients(micro_batches, **options):
        torch.manual_seed(0)
        module = LLMModule(VIT, "image-classification")
        return step_gradients(tmp_path, module, make(global_batch_size=10, **options), micro_batches)

    whole = gradients(1)
    assert largest_difference(gradients(3), whole) < 1e-12
    assert largest_difference(gradients(1, seed=1), whole) > 1e-3


def test_a_missing_package_is_named_with_its_extra(make, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Images need a further package: pip install 'lightning-llm\[images\]'"):
        make()
