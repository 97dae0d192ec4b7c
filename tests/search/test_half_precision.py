"""fp16 with a loss scale, through shrinks. accelerate offers it on GPUs only; torch computes it on
CPUs as well."""

import pytest
import torch
from factories import FAMILIES
from runs import searcher
from transformers import TrainerCallback

STEPS = 12


@pytest.fixture
def fp16_searcher(tmp_path, monkeypatch):
    """Makes a search in fp16 autocast, with what accelerate sets up for one on a GPU."""

    def make(family, callbacks=None, scaler=None):
        trainer = searcher(
            tmp_path,
            family=family,
            callbacks=callbacks,
            max_steps=STEPS,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            ema_decay=0.9,
        )
        monkeypatch.setattr(trainer.accelerator, "native_amp", True)
        monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
        trainer.accelerator.scaler = torch.amp.GradScaler(
            "cpu", **(scaler or {"init_scale": 2.0**10})
        )
        return trainer

    return make


class Watch(TrainerCallback):
    """What the loss scale and the weights do in every step."""

    def __init__(self):
        self.skipped, self.moved = [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self._scale = optimizer.scaler.get_scale()
        self._before = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        # A fused optimizer leaves its step out by itself, so that only the scale tells.
        self.skipped.append(optimizer.scaler.get_scale() < self._scale)
        self.moved.append(
            any(not torch.equal(p, self._before[name]) for name, p in model.named_parameters())
        )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def macs(trainer):
    return [row["macs"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_in_fp16_goes_as_one_in_fp32(fp16_searcher, tmp_path, family):
    plain = searcher(
        tmp_path,
        family=family,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        ema_decay=0.9,
    )
    plain.train()
    half = fp16_searcher(family)
    half.train()
    assert losses(half) != losses(plain)  # it is another precision
    assert losses(half) == pytest.approx(losses(plain), rel=0.03)
    assert macs(half) == macs(plain)
    assert len(set(macs(half))) >= 3  # shrunk twice at least
    assert half.supernet.is_folded
    assert all(bool(parameter.isfinite().all()) for parameter in half.compress().parameters())


def test_steps_that_overflow_are_left_out_before_and_after_shrinks(fp16_searcher):
    watch = Watch()
    # A scale that jumps up and down overflows every few steps.
    jumps = {"growth_factor": 2.0**20, "backoff_factor": 2.0**-20, "growth_interval": 2}
    trainer = fp16_searcher("vit", [watch], {"init_scale": 1.0, **jumps})
    trainer.train()
    hold = round(trainer.bi_mask_config.importance_hold * STEPS)
    assert watch.moved == [
        step >= hold and not skipped for step, skipped in enumerate(watch.skipped)
    ]
    assert sum(watch.skipped) >= 2
    assert any(watch.skipped[STEPS * 3 // 4 :])  # everything is cut by then
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.compress().parameters())
