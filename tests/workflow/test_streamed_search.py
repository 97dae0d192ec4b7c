"""Searches whose images are streamed and augmented in batches: the whole command, interrupted and
not."""

import pytest
import torch
from factories import tiny_vit
from runs import PRODUCT, arguments, rows, run_search

from ofb_hf import DistillationTrainer
from ofb_hf.data import BatchAugmentation, DataArguments
from ofb_hf.training.distillation import DistillationTrainer as Trainer
from ofb_hf.training.interruption import TrainingInterrupted
from ofb_hf.workflow.inputs import load

STREAMED = ["--streaming", "true", "--augmentation", "deit", "--per_device_train_batch_size", "4"]
GRAY = BatchAugmentation((127.5,) * 3, (127.5,) * 3, 3, random_erasing=0.25, mixup=0.8, cutmix=1.0)


@pytest.mark.slow
def test_a_streamed_search_resumes_in_the_middle_of_an_epoch_to_the_same_weights(
    checkpoint, images, tmp_path, monkeypatch
):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    results = run_search(checkpoint, images, straight, *STREAMED)
    assert {path.name for path in straight.iterdir()} >= PRODUCT
    assert results["finetuned"]["macs"] <= results["target_macs"]
    original = Trainer.training_step

    def interrupting(self, *args, **kwargs):
        if self.state.global_step == 8 and self.args.output_dir.endswith("search"):
            self.interruption._receive(15, None)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupting)
        with pytest.raises(TrainingInterrupted):
            run_search(checkpoint, images, cut, *STREAMED)
    assert (cut / "search" / "checkpoint-9").is_dir()
    run_search(checkpoint, images, cut, *STREAMED, "--resume_from_checkpoint", "auto")
    for name in ("subnet.json", "search/model/model.safetensors", "model.safetensors"):
        assert (cut / name).read_bytes() == (straight / name).read_bytes(), name


class Sees(torch.nn.Module):
    """A teacher that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.model, self.seen = tiny_vit(), []
        self.config = self.model.config

    def forward(self, pixel_values):
        self.seen.append(pixel_values.clone())
        return self.model(pixel_values=pixel_values)


def train(folder, **changes):
    """A few steps on grey levels; returns trainer and teacher."""
    torch.manual_seed(0)
    data = [
        row | {"pixel_values": (row["pixel_values"] * 40 + 128).clamp(0, 255).byte()}
        for row in rows()
    ]
    teacher = Sees()
    args = arguments(folder, max_steps=4, distillation_weight=0.5, **changes)
    trainer = DistillationTrainer(
        tiny_vit().train(), args, teacher=teacher, train_dataset=data, batch_augmentation=GRAY
    )
    trainer.train()
    return trainer, teacher


@pytest.mark.slow
def test_batches_are_augmented_for_teacher_and_student_alike_and_repeatably(tmp_path, monkeypatch):
    students = []
    original = DistillationTrainer.training_losses

    def watch(self, model, pixel_values, labels):
        students.append((pixel_values.clone(), labels.clone()))
        return original(self, model, pixel_values, labels)

    monkeypatch.setattr(DistillationTrainer, "training_losses", watch)
    first, teacher = train(tmp_path / "a")
    images, labels = zip(*students, strict=True)
    assert all(torch.equal(seen, shown) for seen, shown in zip(teacher.seen, images, strict=True))
    for image, label in zip(images, labels, strict=True):
        assert image.dtype == torch.float32
        assert image.abs().max() < 6
        assert label.shape == (8, 3)
        torch.testing.assert_close(label.sum(1), torch.ones(8))
    assert len({float(image.mean()) for image in images}) == 4
    again, _ = train(tmp_path / "b")
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    other, _ = train(tmp_path / "c", seed=4)
    assert not torch.equal(other.model.classifier.weight, first.model.classifier.weight)


def test_evaluation_is_not_augmented(tmp_path):
    trainer, _ = train(tmp_path)
    data = rows(6)
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(torch.stack([row["pixel_values"] for row in data])).logits
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor([row["labels"] for row in data])
    )
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_images_reach_workers_that_are_not_forked(checkpoint, images, tmp_path, streaming):
    """Everything that prepares them is sent to the worker, and its batches are the same."""
    data_args = DataArguments(data_dir=str(images), streaming=streaming, augmentation="none")
    model, inputs = load(str(checkpoint), data_args, seed=0)

    def batches(**changes):
        args = arguments(tmp_path, **changes)
        trainer = Trainer(model, args, train_dataset=inputs.train, eval_dataset=inputs.eval)
        loaders = (trainer.get_train_dataloader(), trainer.get_eval_dataloader())
        return [batch for loader in loaders for batch in loader]

    here = batches()
    workers = batches(dataloader_num_workers=1, dataloader_multiprocessing_context="forkserver")
    assert len(here) == len(workers) > 1
    for expected, found in zip(here, workers, strict=True):
        assert torch.equal(found["labels"], expected["labels"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
