"""Files of a stopped run that a power failure left empty behind their names, and kills between
phases."""

import os
import shutil
import signal

import pytest
from runs import refused, run_search
from transformers import TrainerCallback

from ofb_hf.training.classifier import ClassifierTrainer
from ofb_hf.training.interruption import TrainingInterrupted
from ofb_hf.workflow.run import Run

SAVE = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]
# Every file of a run that stopped in its finetuning, as patterns.
FILES = (
    "run_settings.json",
    "search_history.jsonl",
    *(f"search/model/{name}" for name in ("model.safetensors", "config.json", "subnet.json")),
    "search/model/digests.json",
    *(
        f"{phase}/checkpoint-{step}/{name}"
        for phase, step in (("search", 16), ("finetune", 2))
        for name in (
            "model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            "digests.json",
        )
    ),
    "search/checkpoint-16/bi_mask_config.json",
    "finetune/checkpoint-2/config.json",
)


@pytest.fixture(scope="module")
def straight(checkpoint, images, tmp_path_factory):
    """The weights of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight") / "out"
    run_search(checkpoint, images, output, *SAVE)
    return (output / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(checkpoint, images, tmp_path_factory):
    """The output folder of a run that stopped after the second of three steps of finetuning."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    original = ClassifierTrainer.__init__

    class Stops(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith("finetune") and state.global_step == 2:
                raise RuntimeError("the power went")

    def with_a_failure(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Stops())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClassifierTrainer, "__init__", with_a_failure)
        with pytest.raises(RuntimeError, match="power"):
            run_search(checkpoint, images, output, *SAVE)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_an_emptied_file_is_repaired_or_named(
    checkpoint, images, stopped, straight, tmp_path, capsys, caplog, name
):
    output = shutil.copytree(stopped, tmp_path / "out")
    assert (output / name).stat().st_size > 0
    (output / name).write_bytes(b"")
    resume = [*SAVE, "--resume_from_checkpoint", "auto"]
    if name == "run_settings.json":
        message = refused(capsys, checkpoint, images, output, *resume)
        assert f"{name} is damaged" in message
        assert "--overwrite_output_dir" in message
        return
    run_search(checkpoint, images, output, *resume)
    assert (output / "model.safetensors").read_bytes() == straight
    # What was damaged and is needed is named; the search is over, so its checkpoints are not read.
    if name.startswith(("search/model", "finetune")):
        folder, file = name.rsplit("/", 1)
        said = [line for line in caplog.messages if file in line and folder.split("/")[1] in line]
        assert said, caplog.messages
    if name == "search_history.jsonl":
        assert "has lost the rows of the phase 'search', which is finished" in caplog.text
        assert "has lost 2 rows of the phase 'finetune', from step 1 to 2" in caplog.text


@pytest.mark.slow
def test_a_signal_between_two_phases_is_an_orderly_end(
    checkpoint, images, straight, tmp_path, monkeypatch
):
    """After the search, before the finetuning, when no training is there to catch it."""
    output = tmp_path / "out"

    def receives_a_signal(run, *args):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finetune", receives_a_signal)
        with pytest.raises(TrainingInterrupted) as stopped:
            run_search(checkpoint, images, output, *SAVE)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped by SIGTERM between two phases" in (output / "FAILED.txt").read_text()
    run_search(checkpoint, images, output, *SAVE, "--resume_from_checkpoint", "auto")
    assert (output / "model.safetensors").read_bytes() == straight
    assert not (output / "FAILED.txt").exists()
