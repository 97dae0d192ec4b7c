"""The search as a training run: it shrinks, meets the budget, logs, resumes, and refuses what
cannot work."""

import json
import math
import re

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from factories import search_config, tiny_vit
from invariants import assert_equal_states
from runs import STEPS, arguments, rows, searcher
from torch import nn
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from ofb_hf import (
    OFBTrainer,
    ViTBiMaskConfig,
    count_macs,
    count_params,
    install_bi_masks,
)
from ofb_hf.training.arguments import check_search_arguments
from ofb_hf.training.history import HISTORY_FIELDS, HistoryCallback, read_history

# Whole runs: together they take too long for `make quick`.
pytestmark = pytest.mark.slow


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("preset", ["bi_mask", "paper"])
@pytest.mark.parametrize("prune_during_search", [True, False])
def test_search_meets_the_budget_and_logs_its_way(tmp_path, preset, prune_during_search):
    model = tiny_vit()
    config = search_config(preset=preset, target_macs=0.6, prune_during_search=prune_during_search)
    history = HistoryCallback(tmp_path / "history.jsonl", "search")
    trainer = searcher(tmp_path, config, model, callbacks=[history])
    before = weights(model)
    trainer.train()

    small = trainer.compress()
    assert count_macs(small) <= 0.6 * count_macs(model)
    assert count_macs(small) == count_macs(model, trainer.read_subnet())
    assert_equal_states(before, weights(model))

    history = read_history(tmp_path / "history.jsonl")
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))
    for row in history:
        assert list(row) == HISTORY_FIELDS
        assert all(math.isfinite(row[name]) for name in HISTORY_FIELDS if name != "phase")
    assert history[0]["macs"] == count_macs(model)
    assert history[0]["lam"] == pytest.approx(0.99)
    assert history[-1]["macs"] == count_macs(small)
    assert history[-1]["params"] == count_params(small)
    assert history[-1]["active_candidates"] == len(trainer.supernet.bi_masks)
    sizes = [row["macs"] for row in history]
    assert sizes == sorted(sizes, reverse=True)


def test_folded_result_equals_the_supernet_that_was_trained(tmp_path):
    trainer = searcher(tmp_path)
    trainer.train()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        masked = trainer.supernet.eval()(images).logits
        folded = trainer.compress().eval()(images).logits
    assert (masked - folded).abs().max() < 1e-5


def test_every_trainable_parameter_has_one_named_group_and_gets_a_gradient(tmp_path):
    seen, groups = {}, {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for group in kwargs["optimizer"].param_groups:
                groups[group["name"]] = group | {"params": [*group["params"]]}
            for name, parameter in kwargs["model"].named_parameters():
                seen[name] = parameter.grad is not None and bool(parameter.grad.isfinite().all())

    trainer = searcher(tmp_path, callbacks=[Look()], max_steps=2)
    parameters = sorted(id(parameter) for parameter in trainer.supernet.parameters())
    trainer.train()
    assert list(groups) == [
        "weights",
        "weights_no_decay",
        "importance",
        "architecture",
        "pmim_decoder",
    ]
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == parameters
    assert groups["architecture"]["betas"] == (0.5, 0.999)
    assert all(parameter.ndim > 1 for parameter in groups["weights"]["params"])
    assert all(seen.values()), [name for name, good in seen.items() if not good]


class KeepGradients(TrainerCallback):
    """Records what the optimizer is about to see."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        self.steps.append(
            {
                name: parameter.grad.clone()
                for name, parameter in named
                if parameter.grad is not None
            }
        )


@pytest.mark.parametrize("teacher_share", [0.0, 0.9])
def test_accumulating_gradients_equals_a_larger_batch(tmp_path, teacher_share):
    runs = []
    for index, (batch, accumulation) in enumerate([(8, 1), (2, 4)]):
        keep = KeepGradients()
        trainer = searcher(
            tmp_path / str(index),
            callbacks=[keep],
            max_steps=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            distillation_weight=teacher_share,
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        runs.append((keep.steps, losses))
    (large, large_losses), (small, small_losses) = runs
    assert large_losses == pytest.approx(small_losses, rel=2e-3)
    # Later steps differ more: Adam turns rounding of tiny gradients into steps of full size.
    for name, gradient in large[0].items():
        torch.testing.assert_close(small[0][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("stop", [3, 13, 16, 19])
def test_interrupted_and_resumed_search_equals_the_straight_one(tmp_path, stop):
    """The stops lie in the importance phase, around retirement and physical shrinks, and after the
    choice."""
    straight = searcher(tmp_path / "straight", ema_decay=0.9)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop
            return control

    settings = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": stop}
    searcher(tmp_path / "cut", callbacks=[Stop()], **settings).train()
    resumed = searcher(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))

    assert resumed.read_subnet() == straight.read_subnet()
    assert_equal_states(weights(straight.supernet), weights(resumed.supernet))
    assert not list((tmp_path / "cut").rglob("training_args.bin"))


def test_resuming_with_another_budget_is_refused(tmp_path):
    searcher(tmp_path, save_strategy="steps", save_steps=STEPS).train()
    other = searcher(tmp_path, search_config(target_macs=0.7))
    with pytest.raises(ValueError, match=r"another search.*target_macs.*0\.6.*0\.7"):
        other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))


def test_weight_average_and_moments_follow_every_shrink(tmp_path):
    shapes = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            model, optimizer = kwargs["model"], trainer.optimizer
            for name, parameter in model.named_parameters():
                assert trainer.average.average[name].shape == parameter.shape
                state_of = optimizer.state.get(parameter)
                if state_of:
                    assert (
                        state_of["exp_avg"].shape == state_of["exp_avg_sq"].shape == parameter.shape
                    )
            known = {id(parameter) for parameter in model.parameters()}
            assert all(id(parameter) in known for parameter in optimizer.state)
            shapes.append(count_macs(model.config))

    trainer = searcher(tmp_path, ema_decay=0.9)
    trainer.add_callback(Look())
    trainer.train()
    assert len(set(shapes)) > 1


def test_search_is_the_same_for_the_same_seed(tmp_path):
    first, second = searcher(tmp_path / "a"), searcher(tmp_path / "b")
    first.train()
    second.train()
    assert_equal_states(weights(first.supernet), weights(second.supernet))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_stops_at_the_first_step(tmp_path, value):
    broken = rows()
    for row in broken:
        row["pixel_values"][0, 0, 0] = value
    trainer = searcher(tmp_path)
    trainer.train_dataset = broken
    with pytest.raises(FloatingPointError, match=r"not finite after optimizer step 0.*task"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"optim": "sgd"}, "optim is 'sgd'.*allowed are 'adamw_torch', 'adamw_torch_fused'"),
        ({"distillation_weight": 1.5}, r"distillation_weight is 1\.5"),
        ({"distillation_type": "firm"}, "distillation_type is 'firm'"),
        ({"distillation_temperature": 0.0}, "distillation_temperature is 0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        searcher(tmp_path, **changes)


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallelism"),
    ],
)
def test_launchers_that_split_parameters_are_refused_with_the_way_out(
    tmp_path, monkeypatch, variable, name
):
    args = arguments(tmp_path)
    check_search_arguments(args)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*use DDP instead.*--multi_gpu"):
        check_search_arguments(args)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fsdp", ["full_shard"], "FSDP.*use DDP"),
        ("deepspeed", "zero2.json", "DeepSpeed.*use DDP"),
        ("parallelism_config", ParallelismConfig(tp_size=2), "tensor or context.*use DDP"),
        ("_n_gpu", 2, "sees 2 GPUs.*one process per GPU"),
        ("push_to_hub", True, "push_to_hub"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size is 0"),
    ],
)
def test_flags_that_a_shrinking_search_cannot_follow_are_refused(tmp_path, field, value, message):
    args = arguments(tmp_path)
    setattr(args, field, value)
    with pytest.raises(ValueError, match=message):
        check_search_arguments(args)


class Sizes(TrainerCallback):
    """MACs of the network in every step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(count_macs(kwargs["model"].config))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_compiled_search_is_the_eager_one(tmp_path, family):
    """Bit for bit with the backend that only traces; a shrink compiles anew once, other steps do
    not."""
    # Candidates retire late: every shrink takes seconds to compile.
    config = search_config(family, target_macs=0.6, retire_begin=0.7)
    settings = {"config": config, "family": family, "max_steps": 20, "save_strategy": "no"}
    eager = searcher(tmp_path / "eager", **settings)
    eager.train()
    torch._dynamo.reset()
    counters.clear()
    sizes = Sizes()
    compiled = searcher(
        tmp_path / "compiled",
        callbacks=[sizes],
        torch_compile=True,
        torch_compile_backend="eager",
        **settings,
    )
    compiled.train()
    assert_equal_states(weights(eager.supernet), weights(compiled.supernet))
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == len(set(sizes.seen)) > 1
    torch._dynamo.reset()


def test_many_shrinks_do_not_exhaust_the_compiler(tmp_path):
    """torch gives up, and runs eagerly, once it has compiled a function for some number of shapes:
    eight, and here three, so that less needs to be compiled."""
    limit = 3
    sizes = Sizes()
    # the first step runs eagerly
    config = search_config(target_macs=0.6, settle_at=0.9, importance_hold=0.05)
    settings = {"max_steps": 12, "torch_compile": True, "torch_compile_backend": "eager"}
    trainer = searcher(tmp_path, config, callbacks=[sizes], **settings)

    class RetiresOne(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            masks = [mask for mask in trainer.supernet.bi_masks if mask.active_candidates.sum() > 1]
            if masks and 1 < state.global_step < 7:
                mask = masks[state.global_step % len(masks)]
                largest = mask.candidate_sizes.where(
                    mask.active_candidates, torch.tensor(0)
                ).argmax()
                mask.retire_(torch.arange(mask.alpha.numel()).reshape(mask.alpha.shape) == largest)
                trainer.shrink()

    trainer.add_callback(RetiresOne())
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=limit):
        trainer.train()
    assert counters["stats"]["unique_graphs"] == len(set(sizes.seen)) > limit + 1
    torch._dynamo.reset()


def test_teacher_with_other_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher has 7 labels and the model 3"):
        OFBTrainer(tiny_vit(), arguments(tmp_path), search_config(), teacher=tiny_vit(num_labels=7))


def test_supernet_that_was_searched_has_no_dense_model_left_to_learn_from(tmp_path):
    first = searcher(tmp_path / "a")
    first.train()
    with pytest.raises(ValueError, match="has been searched already"):
        OFBTrainer(first.supernet, arguments(tmp_path / "b"))


def test_a_supernet_that_has_made_its_choice_is_not_searched_again(tmp_path):
    first = searcher(tmp_path / "a", max_steps=4)
    first.train()
    again = OFBTrainer(
        first.supernet,
        arguments(tmp_path / "b", max_steps=4, distillation_weight=0.0),
        train_dataset=rows(),
    )
    for trainer in (first, again):
        with pytest.raises(ValueError, match="has made its choice"):
            trainer.train()
    small = again.compress().train()
    searcher(
        tmp_path / "c",
        ViTBiMaskConfig(preset="bi_mask", target_macs=0.9, multiple_of=1),
        model=small,
        max_steps=4,
    ).train()


def test_without_pruning_shapes_stay_until_the_end(tmp_path):
    shapes = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            shapes.append(count_macs(kwargs["model"].config))

    trainer = searcher(tmp_path, search_config(target_macs=0.6, prune_during_search=False))
    trainer.add_callback(Look())
    trainer.train()
    assert set(shapes[:-1]) == {trainer.supernet.dense_macs}
    assert shapes[-1] <= trainer.supernet.target


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pmim_takes_the_dtype_of_the_model(dtype):
    supernet = install_bi_masks(tiny_vit().to(dtype), search_config())
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, ::3] = True
    output = supernet(torch.randn(2, 3, 16, 16, dtype=dtype), bool_masked_pos=masked)
    assert output.reconstruction.dtype == output.logits.dtype == dtype
    assert output.reconstruction.isfinite().all()


def test_a_config_with_a_finished_supernet_is_refused(tmp_path):
    supernet = install_bi_masks(tiny_vit(), search_config())
    with pytest.raises(ValueError, match="already has one"):
        OFBTrainer(supernet, arguments(tmp_path), search_config())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_default_teacher_is_the_dense_model(tmp_path, kind):
    model = tiny_vit()
    trainer = searcher(tmp_path, model=model, distillation_type=kind, max_steps=2)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(trainer.teacher(images).logits, model(images).logits)
    trainer.train()
    with torch.no_grad():
        assert torch.equal(trainer.teacher(images).logits, model(images).logits)


def test_evaluation_loss_is_plain_cross_entropy(tmp_path):
    model = tiny_vit()
    trainer = OFBTrainer(
        model,
        arguments(tmp_path, label_smoothing_factor=0.3),
        search_config(),
        eval_dataset=rows(10),
    )
    loss = trainer.evaluate()["eval_loss"]
    batch = rows(10)
    with torch.no_grad():
        logits = trainer.supernet.eval()(torch.stack([row["pixel_values"] for row in batch])).logits
    expected = nn.functional.cross_entropy(
        logits, torch.tensor([row["labels"] for row in batch])
    ).item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_history_of_a_resumed_run_has_no_row_twice(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(
        "".join(
            json.dumps({"step": step, "phase": phase}) + "\n"
            for phase in ("dense", "search")
            for step in (1, 2, 3)
        )
        + '{"step": 4, "pha'
    )

    class State:
        is_world_process_zero, global_step = True, 2
        log_history = ()

    HistoryCallback(path, "search").on_train_begin(None, State, None)
    assert [(row["phase"], row["step"]) for row in read_history(path)] == [
        *(("dense", step) for step in (1, 2, 3)),
        *(("search", step) for step in (1, 2)),
    ]


@pytest.mark.parametrize("settle_at", [0.75, 1.0])
def test_frozen_weights_rest_until_the_choice(tmp_path, settle_at):
    config = search_config(target_macs=0.6, freeze_weights=True, settle_at=settle_at, pmim=False)
    model = tiny_vit().train()
    trainer = searcher(tmp_path, config, model=model, max_steps=8, learning_rate=0.05)
    alphas, states = [], []
    end = trainer.end_search_step

    def look():
        if trainer.search_step.settles:
            states.append({k: v.clone() for k, v in trainer.supernet.model.state_dict().items()})
            alphas.append([mask.alpha.clone() for mask in trainer.supernet.bi_masks])
        end()

    start = [mask.alpha.clone() for mask in trainer.supernet.bi_masks]
    trainer.end_search_step = look
    trainer.train()
    (before,) = states
    kept = dict(model.named_parameters())
    same = [name for name in before if name in kept and before[name].shape == kept[name].shape]
    assert len(same) > 10
    for name in same:
        assert torch.equal(before[name], kept[name]), name
    assert any(
        one.shape != other.shape or not torch.equal(one, other)
        for one, other in zip(start, alphas[0], strict=True)
    )
    if settle_at < 1:
        trained = dict(trainer.supernet.model.named_parameters())
        assert not torch.equal(trained["classifier.bias"], kept["classifier.bias"])
