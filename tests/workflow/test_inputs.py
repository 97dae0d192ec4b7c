"""What a run starts from: data in the order of the model, images that can be read, settings that
arrive."""

import io
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from factories import search_config, tiny_model, tiny_vit
from pictures import number_of, parquet, picture, write
from runs import arguments, rows
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    RegNetConfig,
    ResNetConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from ofb_hf import OFBTrainer
from ofb_hf.data import AugmentationArguments, DataArguments, ImageStream, align_labels
from ofb_hf.workflow.arguments import ModelArguments, TrainedModelArguments
from ofb_hf.workflow.inputs import load, load_classifier, load_teacher, match_by_number


def table(labels, names, without=None):
    """A parquet file of pictures 0, 1, ... with these class indices, one row without an image."""
    images = [
        None if number == without else {"bytes": picture(number), "path": None}
        for number in range(len(labels))
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    file = io.BytesIO()
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(file)
    return file.getvalue()


def saved_model(folder, names):
    """A tiny ViT that numbers its labels like this."""
    model = tiny_vit(num_labels=len(names))
    model.config.id2label, model.config.label2id = (
        dict(enumerate(names)),
        {name: i for i, name in enumerate(names)},
    )
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_differ_in_case_only_are_different(tmp_path, streaming):
    labels = [0, 1, 2, 0, 1, 2]
    content = table(labels, ["A", "a", "b"])
    folder = write(tmp_path / "data", {"train.parquet": content, "test.parquet": content})
    model = saved_model(tmp_path / "model", ["a", "A", "b"])
    args = DataArguments(data_dir=str(folder), streaming=streaming, augmentation="none")
    _, inputs = load(model, args, seed=0)
    assert [row["labels"] for row in inputs.eval] == [1, 0, 2, 1, 0, 2]
    if streaming:
        (batch,) = inputs.train.loader(6)
        assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]
    else:
        assert [inputs.train[index]["labels"] for index in range(6)] == [1, 0, 2, 1, 0, 2]
    assert inputs.data.label_names == ["a", "A", "b"]


def test_aligning_leaves_the_images_alone():
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"])})
    content = {"image": [{"bytes": picture(n), "path": None} for n in range(3)], "label": [0, 1, 1]}
    aligned = align_labels(Dataset.from_dict(content, features=features), ["y", "x"], "label")
    assert aligned["label"] == [1, 0, 0]
    assert aligned.features["label"].names == ["y", "x"]
    raw = aligned.cast_column("image", Image(decode=False))
    assert [row["image"]["bytes"] for row in raw] == [picture(n) for n in range(3)]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_to_evaluate_on_are_checked_before_anything_is_trained(
    tmp_path, checkpoint, streaming
):
    contents = [picture(n) for n in range(9)]
    broken = [content[: 40 if n in (3, 7) else None] for n, content in enumerate(contents)]
    folder = write(tmp_path, {"train.parquet": parquet(contents), "test.parquet": parquet(broken)})
    args = DataArguments(data_dir=str(folder), streaming=streaming)
    message = r"2 of 9 images to evaluate on cannot be decoded: row 3 .*; row 7 .*"
    message += "Repair them or take them out"
    model = saved_model(tmp_path / "model", ["cat", "dog", "emu"])
    with pytest.raises(ValueError, match=message):
        load(model, args, seed=0)


def test_a_broken_file_in_class_folders_is_named(images, checkpoint, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "test" / "green" / "2.png").write_bytes(b"no image")
    message = r"1 of 12 images to evaluate on .*green/2.png \(no image of a known format\)"
    with pytest.raises(ValueError, match=message):
        load(str(checkpoint), DataArguments(data_dir=str(folder)), seed=0)


def test_a_cropped_evaluation_is_that_of_the_saved_image_processor(images, checkpoint, tmp_path):
    args = DataArguments(data_dir=str(images), eval_crop_pct=0.5)
    _, inputs = load(str(checkpoint), args, seed=0)
    _, plain = load(str(checkpoint), DataArguments(data_dir=str(images)), seed=0)
    inputs.processor.save_pretrained(tmp_path)
    saved = AutoImageProcessor.from_pretrained(tmp_path)
    for index in (0, 5):
        image = inputs.data.eval[index]["image"]
        pixels = torch.as_tensor(saved(image)["pixel_values"][0])
        assert torch.equal(inputs.eval[index]["pixel_values"], pixels)
        assert not torch.equal(plain.eval[index]["pixel_values"], pixels)


def test_a_teacher_may_be_the_model_itself_however_it_is_evaluated(images, checkpoint):
    _, inputs = load(
        str(checkpoint), DataArguments(data_dir=str(images), eval_crop_pct=0.5), seed=0
    )
    assert load_teacher(str(checkpoint), inputs).config.num_labels == 3


# Processors whose sizes and numbers look alike and which make other pixels, and what they make.
OTHER_PIXELS = {
    "do_normalize": ({"do_normalize": False}, "gray levels"),
    "do_rescale": ({"do_rescale": False}, "gray levels"),
    "rescale_factor": ({"rescale_factor": 1 / 127.5}, "gray levels"),
    "image_mean": ({"image_mean": [0.485, 0.456, 0.406]}, "gray levels"),
    "size": ({"size": {"height": 20, "width": 20}}, r"\(3, 20, 20\) instead of \(3, 16, 16\)"),
}


@pytest.mark.parametrize("name", OTHER_PIXELS)
def test_a_teacher_is_refused_if_its_processor_makes_other_pixels(
    name, images, checkpoint, tmp_path
):
    changes, difference = OTHER_PIXELS[name]
    _, inputs = load(str(checkpoint), DataArguments(data_dir=str(images)), seed=0)
    teacher = shutil.copytree(checkpoint, tmp_path / "teacher")
    fields = {"size": {"height": 16, "width": 16}} | changes
    ViTImageProcessorPil(**fields).save_pretrained(teacher)
    with pytest.raises(ValueError, match=f"teacher .* makes other pixels .*{difference}"):
        load_teacher(str(teacher), inputs)


def test_a_teacher_whose_processor_makes_the_same_pixels_otherwise_is_taken(
    images, checkpoint, tmp_path
):
    _, inputs = load(str(checkpoint), DataArguments(data_dir=str(images)), seed=0)
    teacher = shutil.copytree(checkpoint, tmp_path / "teacher")
    ViTImageProcessorPil(
        size={"height": 16, "width": 16}, do_rescale=False, image_mean=127.5, image_std=127.5
    ).save_pretrained(teacher)
    assert load_teacher(str(teacher), inputs).config.num_labels == 3


CONVOLUTIONS = {
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
    "regnet": RegNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], groups_width=8),
    "convnext": ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutional_teachers_with_a_crop_pct_are_taken(name, images, checkpoint, tmp_path):
    _, inputs = load(str(checkpoint), DataArguments(data_dir=str(images)), seed=0)
    config = CONVOLUTIONS[name]
    config.id2label = dict(enumerate(["blue", "green", "red"]))
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_pct": 0.875}
    ConvNextImageProcessorPil(size={"shortest_edge": 16}, **numbers).save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path), inputs).config.model_type == name
    ConvNextImageProcessorPil(size={"shortest_edge": 24}, **numbers).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"shape \(3, 24, 24\) instead of \(3, 16, 16\)"):
        load_teacher(str(tmp_path), inputs)


def test_a_teacher_that_cannot_take_the_images_is_refused(images, checkpoint, tmp_path):
    _, inputs = load(str(checkpoint), DataArguments(data_dir=str(images)), seed=0)
    teacher = tiny_vit(image_size=24)
    teacher.config.id2label = dict(enumerate(inputs.data.label_names))
    teacher.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the teacher .* cannot take the images"):
        load_teacher(str(tmp_path), inputs)


def test_rows_without_an_image_are_named(tmp_path):
    names = ["cat", "dog", "emu"]
    files = {
        "train.parquet": table([0, 1, 2], names),
        "test.parquet": table([0, 1, 2], names, without=1),
    }
    folder = write(tmp_path, files)
    model = saved_model(tmp_path / "model", ["cat", "dog", "emu"])
    with pytest.raises(ValueError, match=r"1 of 3 images to evaluate on cannot be decoded: row 1 "):
        load(model, DataArguments(data_dir=str(folder)), seed=0)


def test_repeated_augmentation_reaches_the_stream(tmp_path):
    content = parquet([picture(n) for n in range(9)])
    folder = write(tmp_path / "data", {"train.parquet": content, "test.parquet": content})
    model = saved_model(tmp_path / "model", ["cat", "dog", "emu"])
    args = DataArguments(data_dir=str(folder), streaming=True)
    _, inputs = load(model, args, 0, AugmentationArguments(repeated_augmentation=3))
    assert isinstance(inputs.train, ImageStream)
    assert inputs.train.repeats == 3


# ------------------------------------------------------------------------- labels of other models

NEW = ["kea", "lynx", "mole", "newt"]


def test_a_new_classifier_keeps_the_encoder_and_names_the_labels_of_the_data(checkpoint):
    old = ViTForImageClassification.from_pretrained(checkpoint)
    model = load_classifier(str(checkpoint), NEW, seed=3, new_classifier=True)
    assert [model.config.id2label[number] for number in range(4)] == NEW
    assert model.config.label2id == {name: number for number, name in enumerate(NEW)}
    assert model.classifier.weight.shape == (4, old.config.hidden_size)
    for ours, theirs in zip(model.vit.parameters(), old.vit.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = load_classifier(str(checkpoint), NEW, seed=3, new_classifier=True)
    assert torch.equal(again.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_new_classifier_is_new_for_as_many_labels_as_before(family, checkpoint, swin_checkpoint):
    folder = str(checkpoint if family == "vit" else swin_checkpoint)
    old = load_classifier(folder, NEW[:3], seed=0)
    model = load_classifier(folder, NEW[:3], seed=0, new_classifier=True)
    assert list(model.config.id2label.values()) == NEW[:3]
    weight = model.classifier.weight
    assert not torch.isclose(weight, old.classifier.weight).any()
    assert 0.5 < weight.std() / model.config.initializer_range < 1.5
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(
    "old",
    [{"problem_type": "multi_label_classification"}, {"num_labels": 1}],
    ids=["several", "one"],
)
def test_a_new_classifier_replaces_a_head_of_another_kind(tmp_path, old):
    tiny_model("vit", **old).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of which one is right"):
        load_classifier(str(tmp_path), NEW, seed=0)
    model = load_classifier(str(tmp_path), NEW, seed=0, new_classifier=True)
    assert model.config.problem_type is None
    assert model.config.num_labels == 4


def test_an_encoder_gets_a_classifier(tmp_path):
    tiny_model("vit").vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"It has no head: `ofb-hf finetune --new_classifier`"):
        load_classifier(str(tmp_path), NEW, seed=0)
    model = load_classifier(str(tmp_path), NEW, seed=0, new_classifier=True)
    assert model.config.num_labels == 4


def test_a_damaged_encoder_gets_none(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layernorm.weight"))
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of its tensors are missing, such as vit\.") as refusal:
        load_classifier(str(folder), NEW, seed=0, new_classifier=True)
    assert "new_classifier" not in str(refusal.value)


def test_a_model_for_other_labels_is_refused_with_a_way_out(checkpoint):
    message = r"has 4: \['kea', .*`ofb-hf finetune --new_classifier`.* --dense_epochs N`"
    with pytest.raises(ValueError, match=message):
        load_classifier(str(checkpoint), NEW, seed=0)


def test_a_new_classifier_has_to_be_trained_before_a_search():
    with pytest.raises(ValueError, match=r"dense_epochs is 0.0: .*`ofb-hf finetune"):
        ModelArguments("a/b", new_classifier=True)
    assert ModelArguments("a/b", new_classifier=True, dense_epochs=1).new_classifier
    with pytest.raises(ValueError, match="of deit_tiny, a named shape, are random"):
        TrainedModelArguments("deit_tiny", new_classifier=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # what looks right says nothing; what contradicts does
        (
            ["tench, Tinca tinca", "great_shark", "hen"],
            "label 1 is 'great_shark' for m and 'goldfish' in the data",
        ),
        (["LABEL_0", "Great Shark", "2"], "label 1 is 'Great Shark' for m and 'goldfish'"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], "'LABEL_0' for 'tench'"),
        (["tench, Tinca tinca", "Goldfish", "great  shark"], "'tench, Tinca tinca' for 'tench'"),
    ],
)
def test_labels_matched_by_number_show_the_first_contradiction(names, message, caplog):
    data = ["tench", "goldfish", "great_shark"]
    match_by_number("m", names, data, allowed=False)
    (said,) = caplog.messages
    assert message in said
    assert "matched by number" in said


@pytest.mark.parametrize(
    ("names", "data"),
    [
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "10", "2"]),
        (["1", "2", "3"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["red", "green", "blue"], ["rot", "gruen", "blau"]),
        # digits are classes, too: a number is a name
        (["red", "green", "blue"], ["0", "1", "2"]),
        (["0", "1", "2"], ["red", "green", "blue"]),
    ],
)
def test_names_without_anything_in_common_are_refused(names, data):
    with pytest.raises(ValueError, match=r"label 0 is .* and no other name is the same"):
        match_by_number("m", names, data, allowed=False)


def test_labels_that_share_no_name_are_matched_only_if_that_is_meant(images, tmp_path, caplog):
    model = saved_model(tmp_path / "model", ["cat", "dog", "emu"])
    data = DataArguments(data_dir=str(images))
    message = (
        r"label 0 is 'cat' for .* and 'blue' in the data.*say so with --match_labels_by_number"
    )
    with pytest.raises(ValueError, match=message):
        load(model, data, seed=0)
    _, loaded = load(model, data, seed=0, match_labels_by_number=True)
    assert "label 0 is 'cat'" in caplog.text
    # and the same for a teacher
    with pytest.raises(ValueError, match=r"label 0 is 'cat' for the teacher .*--match_labels"):
        load_teacher(saved_model(tmp_path / "teacher", ["cat", "dog", "emu"]), loaded)
    assert load_teacher(model, loaded, match_labels_by_number=True).config.num_labels == 3


def numbered_folders(folder, count, streaming):
    """Class folders 0, 1, ... whose pictures have the number of their folder as pixels."""
    files = {
        f"{split}/{n}/{n}.png": picture(n) for split in ("train", "test") for n in range(count)
    }
    return DataArguments(data_dir=str(write(folder, files)), streaming=streaming)


def pairs_of(dataset):
    """The number in the pixels and the label of every row, in order."""
    return sorted((int(number_of(row["image"])), row["label"]) for row in dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_that_are_numbers_are_matched_by_their_numbers(tmp_path, streaming, caplog):
    """And not by their places in the order of text, in which 10 comes before 2."""
    data = numbered_folders(tmp_path / "data", 12, streaming)
    words = saved_model(tmp_path / "words", [f"word {chr(97 + n)}" for n in range(12)])
    with pytest.raises(ValueError, match=r"label 0 is 'word a' .* and '0' .*--match_labels_by_num"):
        load(words, data, seed=0)
    unnamed = saved_model(tmp_path / "unnamed", [f"LABEL_{n}" for n in range(12)])
    for model, allowed in ((words, True), (unnamed, False)):
        _, loaded = load(model, data, seed=0, match_labels_by_number=allowed)
        assert loaded.data.label_names == [str(n) for n in range(12)]
        assert pairs_of(loaded.data.eval) == [(n, n) for n in range(12)]
        if streaming:
            batches = ImageStream(loaded.data.train, number_of, seed=0).loader(1)
            pairs = sorted((int(one["pixel_values"]), int(one["labels"])) for one in batches)
        else:
            pairs = pairs_of(loaded.data.train)
        assert pairs == [(n, n) for n in range(12)]
    assert "label 0 is 'word a'" in caplog.text
    assert "'LABEL_0' for '0'" in caplog.text


def test_a_teacher_cannot_follow_numbers_in_another_order(tmp_path):
    data = numbered_folders(tmp_path / "data", 12, streaming=False)
    student = saved_model(tmp_path / "student", sorted(map(str, range(12))))
    _, loaded = load(student, data, seed=0)
    unnamed = saved_model(tmp_path / "unnamed", [f"LABEL_{n}" for n in range(12)])
    with pytest.raises(ValueError, match=r"calls label 0 'LABEL_0'.*in another order: \['0', '1'"):
        load_teacher(unnamed, loaded, match_labels_by_number=True)


def test_a_schedule_ends_at_the_learning_rate_that_was_asked_for(tmp_path):
    args = arguments(
        tmp_path,
        max_steps=20,
        learning_rate=1e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5},
    )
    trainer = OFBTrainer(tiny_model("vit").train(), args, search_config(), train_dataset=rows())
    trainer.train()
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["weights"] == pytest.approx(1e-5)
    assert rates["pmim_decoder"] == pytest.approx(1e-5)
