"""What a training cannot work with is refused before its first step, by name; evaluations look at
everything, and leave the model as it is."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from factories import search_config, tiny_model, tiny_vit
from invariants import assert_equal_states
from runs import arguments, rows, searcher
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForImageClassification,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from ofb_hf import (
    ClassifierTrainer,
    DistillationTrainer,
    OFBTrainer,
    TokenSearchConfig,
    TokenTrainer,
)
from ofb_hf.metrics import compute_topk, top5_indices
from ofb_hf.training import requirements
from ofb_hf.training.full_precision import to_full_precision_

TRAINERS = (ClassifierTrainer, DistillationTrainer, OFBTrainer, TokenTrainer)
METRICS = {"compute_metrics": compute_topk, "preprocess_logits_for_metrics": top5_indices}


def made(trainer_class, folder, model=None, changes=None, **kwargs):
    """A trainer of any kind for a tiny ViT."""
    # tokens are searched in three layers at least
    model = tiny_vit(num_hidden_layers=3).train() if model is None else model
    args = arguments(folder, max_steps=4, **(changes or {}))
    kwargs = {"train_dataset": rows(16)} | kwargs
    if trainer_class is OFBTrainer:
        kwargs["bi_mask_config"] = search_config("vit", target_macs=0.6)
    if trainer_class is TokenTrainer:
        kwargs["config"] = TokenSearchConfig(target_macs=0.7)
    return trainer_class(model, args, **kwargs)


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type is 'cosine_with_min_lr'"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            r"takes num_decay_steps \(has to be given\), num_stable_steps, .*; "
            r"""write '\{"num_decay_steps": NUMBER\}'""",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
            r"lr_scheduler_kwargs \{'cycles': 2\}.*no schedule.*This schedule takes num_cycles; ",
        ),
        (
            {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 0}},
            "This schedule takes no lr_scheduler_kwargs; leave them out",
        ),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"cycles": 2},
                "eval_strategy": "steps",
            },
            "documentation in transformers says which lr_scheduler_kwargs it takes",
        ),
        ({"lr_scheduler_type": "cosin"}, "is 'cosin'; did you mean cosine, .*Allowed are linear, "),
        (
            {"optim": "adam"},
            r"^optim is 'adam'; did you mean adam\w+, \w+, \w+\? All \d+ that are allowed are "
            "listed by `ofb-hf finetune --help all`.$",
        ),
        ({"save_strategy": "stpes"}, "save_strategy is 'stpes'; did you mean steps"),
        ({"log_level": "dbug"}, r"log_level is 'dbug'; did you mean debug\?"),
        ({"train_sampling_strategy": "rndom"}, r"did you mean random\?"),
        (
            {"dataloader_multiprocessing_context": "frk", "dataloader_num_workers": 1},
            r"dataloader_multiprocessing_context is 'frk'; did you mean fork",
        ),
        ({"lr_scheduler_kwargs": "{cycles: 2}"}, "takes a dictionary cannot be read"),
        ({"accelerator_config": {"nonsense": 1}}, "cannot be read.*nonsense"),
        ({"report_to": "smoke_signals"}, "report_to is 'smoke_signals'; allowed are none, all"),
        (
            {"report_to": "wandd"},
            r"report_to is 'wandd'; did you mean wandb.*Allowed are none, all",
        ),
        ({"use_liger_kernel": True}, "use_liger_kernel is True.*language models"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint is True.*SIGTERM"),
        ({"include_num_input_tokens_seen": True}, "images have none"),
        ({"label_names": ["class"]}, r"label_names is \['class'\].*'labels' alone"),
        ({"train_sampling_strategy": "group_by_length"}, "images have none"),
        ({"save_strategy": "best"}, "save_strategy is 'best'.*metric_for_best_model"),
        ({"optim": "galore_adamw"}, "optim is 'galore_adamw'.*cannot be used here.*galore_torch"),
        ({"ddp_backend": "gloo"}, "ddp_backend is 'gloo', but this is one process"),
        ({"fsdp": True}, "fsdp is on, but this is one process"),
        ({"torch_compile_mode": "brisk"}, "torch_compile_mode is 'brisk'.*Unrecognized mode"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"adam_beta1": 1.0}, r"adam_beta1 is 1\.0"),
        ({"label_smoothing_factor": 1.5}, r"label_smoothing_factor is 1\.5.*at most 1"),
        ({"seed": -1}, "seed is -1"),
        ({"save_steps": float("inf")}, "save_steps is inf"),
        ({"logging_steps": -1}, "logging_steps is -1"),
        ({"neftune_noise_alpha": -1.0}, "neftune_noise_alpha is -1"),
        ({"optim_args": "fast"}, "optim_args is 'fast'; write NAME=VALUE"),
        ({"activation_checkpointing_kwargs": "fast"}, "kwargs is 'fast'; it is a dictionary"),
    ],
)
def test_settings_are_refused_when_they_are_made(tmp_path, monkeypatch, changes, message):
    # by accelerate's launcher, and by transformers for `fsdp`
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_a_logger_without_its_package_is_refused(tmp_path, monkeypatch):
    def missing():
        raise RuntimeError("WandbCallback requires wandb to be installed.")

    monkeypatch.setitem(requirements.INTEGRATION_TO_CALLBACK, "wandb", missing)
    monkeypatch.setattr(requirements, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match="report_to is 'wandb', which cannot be used here"):
        arguments(tmp_path, report_to=["mlflow", "wandb"])


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        {"learning_rate": 0.0, "lr_scheduler_type": "polynomial"},
        {"optim": "adafactor"},
        {"label_names": None},
        {"train_sampling_strategy": "sequential"},
        {"warmup_steps": 0.1},
    ],
)
def test_settings_that_work_are_taken(tmp_path, changes):
    assert arguments(tmp_path, **changes).label_names == ["labels"]


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_plain_training_arguments_are_refused_by_every_trainer(tmp_path, trainer_class):
    with pytest.raises(TypeError, match="args is a TrainingArguments; give OFBTrainingArguments"):
        trainer_class(tiny_vit(), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_search_follows_its_phases_and_no_evaluations(tmp_path, kind):
    with pytest.raises(ValueError, match=f"lr_scheduler_type is '{kind}', which follows evalu"):
        searcher(tmp_path, lr_scheduler_type=kind, eval_strategy="steps")
    with pytest.raises(ValueError, match="neftune_noise_alpha is 5"):
        searcher(tmp_path, neftune_noise_alpha=5.0)


def test_accuracy_is_a_name_of_top1_and_unknown_metrics_are_refused(tmp_path):
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    best = {"save_steps": 1, "load_best_model_at_end": True}
    kwargs = METRICS | {"eval_dataset": rows(8, seed=5)}
    trainer = made(
        ClassifierTrainer,
        tmp_path,
        changes={"metric_for_best_model": "accuracy", **every_step, **best},
        **kwargs,
    )
    trainer.train()
    evaluated = [row for row in trainer.state.log_history if "eval_top1" in row]
    assert trainer.state.best_metric == max(row["eval_top1"] for row in evaluated)
    for changes, known in (
        ({"metric_for_best_model": "f1"}, "'f1'; an evaluation gives loss.*top1"),
        ({"metric_for_best_model": "top1", "prediction_loss_only": True}, "with prediction_loss"),
    ):
        trainer = made(ClassifierTrainer, tmp_path, changes=changes | every_step, **kwargs)
        with pytest.raises(ValueError, match=known):
            trainer.train()


# ------------------------------------------------------------------------- arguments of a Trainer


@pytest.mark.parametrize("trainer_class", [OFBTrainer, TokenTrainer])
@pytest.mark.parametrize("with_scheduler", [False, True])
def test_an_optimizer_of_the_users_own_is_refused_where_it_would_move_nothing(
    tmp_path, trainer_class, with_scheduler
):
    model = tiny_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer) if with_scheduler else None
    with pytest.raises(ValueError, match=rf"optimizers is given, but {trainer_class.__name__}"):
        made(trainer_class, tmp_path, model, optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs is given"):
        made(trainer_class, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0}))
    made(trainer_class, tmp_path, optimizers=(None, None))


def test_an_optimizer_of_the_model_itself_trains_it(tmp_path):
    model = tiny_vit().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made(ClassifierTrainer, tmp_path, model, optimizers=(optimizer, None)).train()
    assert any(not torch.equal(before[name], new) for name, new in model.state_dict().items())


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    other = torch.optim.SGD(tiny_vit().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        made(ClassifierTrainer, tmp_path, optimizers=(other, None))
    scheduler = torch.optim.lr_scheduler.ConstantLR(other)
    with pytest.raises(ValueError, match="schedule of another optimizer"):
        made(ClassifierTrainer, tmp_path, optimizers=(None, scheduler))


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("name", ["model_init", "compute_loss_func"])
def test_arguments_that_no_trainer_can_use_are_refused(tmp_path, trainer_class, name):
    with pytest.raises(ValueError, match=rf"{name} is given, but {trainer_class.__name__}"):
        made(trainer_class, tmp_path, **{name: tiny_vit})


# ------------------------------------------------------------------------------- heads and labels


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize(
    "changes",
    [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}],
)
def test_heads_without_a_softmax_are_refused(tmp_path, trainer_class, changes):
    with pytest.raises(ValueError, match="probabilities of two or more classes"):
        made(trainer_class, tmp_path, tiny_vit(**changes))


def test_one_output_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="num_labels 1"):
        made(ClassifierTrainer, tmp_path, tiny_vit(num_labels=1))


def test_a_teacher_with_a_sigmoid_is_refused(tmp_path):
    teacher = tiny_vit(problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="the teacher has num_labels 3 and problem_type 'multi"):
        made(DistillationTrainer, tmp_path, teacher=teacher)


def relabelled(change):
    return [row | {"labels": change(row["labels"])} for row in rows(16)]


class Watch(TrainerCallback):
    """Whether a step was begun."""

    begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = True


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
def test_labels_that_the_head_does_not_have_are_refused_before_the_first_step(
    tmp_path, trainer_class, split
):
    watch = Watch()
    from_one = {split: relabelled(lambda label: label + 1)}
    trainer = made(trainer_class, tmp_path, callbacks=[watch], **from_one)
    with pytest.raises(ValueError, match=rf"{split}: a label is 3, but the model has 3 labels"):
        trainer.train()
    assert not watch.begun


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("kind", [int, torch.tensor, np.int64, "column"])
@pytest.mark.parametrize("missing", [-100, -1])
def test_numbers_that_stand_for_no_class_are_refused_before_the_first_step(
    tmp_path, split, kind, missing
):
    """Losses of torch leave out -100 (`ignore_index`), so a training would go on without them."""

    def without_some(label):
        stored = missing if label == 2 else label
        return stored if kind == "column" else kind(stored)

    data = relabelled(without_some)
    count = sum(int(row["labels"]) == missing for row in data)
    if kind == "column":
        data = Dataset.from_list([row | {"pixel_values": [0.0]} for row in data])
    trainer = made(ClassifierTrainer, tmp_path, callbacks=[Watch()], **{split: data})
    message = rf"{split}: a label is {missing}, .*{count} of 16 labels are that.*Leave these images"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_without_a_label_are_counted(tmp_path):
    trainer = made(
        ClassifierTrainer, tmp_path, train_dataset=relabelled(lambda label: label or None)
    )
    with pytest.raises(
        ValueError, match=r"train_dataset: \d+ of 16 labels are None; .*Leave these"
    ):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_may_be_integers_of_any_size(tmp_path, dtype):
    labels = relabelled(lambda label: torch.tensor(label, dtype=dtype))
    trainer = made(
        ClassifierTrainer, tmp_path, train_dataset=labels, eval_dataset=labels, **METRICS
    )
    assert trainer.train().global_step == 4
    assert trainer.evaluate()["eval_loss"] > 0


def test_labels_are_looked_at_as_the_loader_will_give_them(tmp_path):
    def from_zero(batch):
        pixels = [torch.tensor(each) for each in batch["pixel_values"]]
        return {"pixel_values": pixels, "labels": [label - 1 for label in batch["label"]]}

    def collate(each):
        batch = default_data_collator(each)
        return batch | {"labels": batch["labels"] - 1}

    both = [row | {"label": row["labels"] + 7} for row in rows(16)]
    from_one = relabelled(lambda label: label + 1)
    columns = [
        {"pixel_values": row["pixel_values"].tolist(), "label": row["labels"]} for row in from_one
    ]
    cases = [
        {"train_dataset": both},
        {"train_dataset": from_one, "data_collator": collate},
        {
            "train_dataset": Dataset.from_list(columns).with_transform(from_zero),
            "changes": {"remove_unused_columns": False},
        },
    ]
    for case in cases:
        assert made(ClassifierTrainer, tmp_path, **case).train().global_step == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda label: torch.tensor(label + 1), "a label is 3"),
        (lambda label: -1 - label, "a label is -"),
        (float, "labels are torch.float32 of shape"),
        (lambda label: [label, 1 - label], r"of shape \(8, 2\)"),
        (lambda label: torch.tensor([1.0, 1.0, 0.0]), "labels of an image sum to 2"),
    ],
    ids=["too_large", "negative", "regression", "ranges", "several"],
)
def test_labels_of_other_kinds_are_refused(tmp_path, change, message):
    trainer = made(ClassifierTrainer, tmp_path, train_dataset=relabelled(change))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_probabilities_are_labels(tmp_path):
    soft = relabelled(lambda label: torch.eye(3)[label] * 0.7 + 0.1)
    trainer = made(ClassifierTrainer, tmp_path, train_dataset=soft)
    trainer.train()
    assert trainer.state.global_step == 4


# ----------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_what_cannot_make_a_step_is_refused(tmp_path, trainer_class):
    large = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    with pytest.raises(ValueError, match=r"16 training examples are too few.*drop_last"):
        made(trainer_class, tmp_path, changes=large).train()
    trainer = made(trainer_class, tmp_path)
    trainer.args.max_steps = 0
    with pytest.raises(ValueError, match="at least one step"):
        trainer.train()


class StopAfter(TrainerCallback):
    """Ends a training early, as an early-stopping callback."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.steps
        return control


def test_a_training_that_ends_early_says_so(tmp_path, caplog):
    trainer = made(ClassifierTrainer, tmp_path, callbacks=[StopAfter(2)])
    trainer.train()
    assert trainer.ended_early.startswith("the training ended after step 2 of 4")
    assert "the training ended after step 2 of 4" in caplog.text
    whole = made(ClassifierTrainer, tmp_path)
    whole.train()
    assert whole.ended_early is None


def test_nothing_is_compressed_before_anything_was_searched(tmp_path):
    trainer = searcher(tmp_path, max_steps=16)
    with pytest.raises(ValueError, match=r"nothing has been searched.*train\(\) first"):
        trainer.compress()
    trainer.train()
    trainer.compress()


def test_a_search_that_ended_while_it_observed_has_nothing_to_cut_by(tmp_path, caplog):
    trainer = searcher(tmp_path, callbacks=[StopAfter(1)], max_steps=16)
    trainer.train()
    with pytest.raises(ValueError, match=r"ended after step 1 of 16.*random scores"):
        trainer.compress()
    later = searcher(tmp_path, callbacks=[StopAfter(10)], max_steps=16)
    later.train()
    later.compress()
    assert "after step 10 of 16" in caplog.records[-1].message


def test_a_schedule_before_a_training_says_so(tmp_path, caplog):
    made(TokenTrainer, tmp_path).scheduled()
    assert "train() comes before scheduled()" in caplog.text


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_in_half_precision_is_trained_in_float32(tmp_path, caplog, dtype):
    stored = tiny_vit().to(dtype)
    as_float = tiny_vit().to(dtype).float()
    for model in (stored, as_float):
        made(ClassifierTrainer, tmp_path, model.train(), changes={"ema_decay": 0.9}).train()
    assert_equal_states(stored.state_dict(), as_float.state_dict())
    assert "they are trained in float32" in caplog.text


@pytest.mark.parametrize("trainer_class", [OFBTrainer, TokenTrainer])
def test_a_search_gives_back_the_stored_type(tmp_path, trainer_class):
    model = tiny_vit(num_hidden_layers=4).bfloat16().train()
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = made(trainer_class, tmp_path, model)
    trainer.train()
    result = trainer.compress() if trainer_class is OFBTrainer else trainer.scheduled()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in result.parameters()} == {torch.bfloat16}
    assert_equal_states(model.state_dict(), given)  # a search is made of a copy
    result.save_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == "bfloat16"
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    assert_equal_states(again.state_dict(), result.state_dict())


def test_half_precision_below_adapters_stays():
    model = tiny_vit().bfloat16()
    model.requires_grad_(False)
    model.classifier.float().requires_grad_(True)
    to_full_precision_(model)
    assert model.vit.layernorm.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_last_batch_that_is_left_out_of_training_is_evaluated(tmp_path, batch_size):
    settings = {"dataloader_drop_last": True, "per_device_eval_batch_size": batch_size}
    trainer = made(ClassifierTrainer, tmp_path, changes=settings, **METRICS)
    assert len(trainer.predict(rows(12)).label_ids) == 12
    assert len(trainer.get_train_dataloader()) == 2
    assert trainer.args.dataloader_drop_last


@pytest.mark.parametrize("field", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_half_precision_leaves_the_model_as_it_was(tmp_path, field):
    model = tiny_model("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.dtype))
    trainer = made(ClassifierTrainer, tmp_path, model, {field: True}, **METRICS)
    trainer.evaluate(rows(8))
    assert set(seen) == {torch.bfloat16 if field == "bf16_full_eval" else torch.float16}
    assert_equal_states(model.state_dict(), before)


def test_another_data_set_is_evaluated_on_its_own_rows(tmp_path):
    """Also where the loader of the one before has workers that go on."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    first, second = rows(8), rows(6, seed=1)
    trainer = made(ClassifierTrainer, tmp_path, changes=workers, eval_dataset=first)
    plain = made(ClassifierTrainer, tmp_path, eval_dataset=first)
    for dataset in (None, second, None):
        expected = plain.evaluate(dataset)["eval_loss"]
        assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_settings_draw_no_random_numbers(tmp_path):
    before = torch.get_rng_state()
    arguments(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("column", ["label", "labels"])
def test_labels_in_a_column_are_known_before_the_start(tmp_path, column):
    table = Dataset.from_dict({"pixel_values": [row["pixel_values"].tolist() for row in rows(8)]})
    table = table.add_column(column, [1, 2, 3, 1, 2, 3, 1, 2]).with_format("torch")
    trainer = made(ClassifierTrainer, tmp_path, train_dataset=table)
    with pytest.raises(ValueError, match="train_dataset: a label is 3"):
        trainer.train()


class Stream:
    """A data set that makes its own loader."""

    def __len__(self):
        return 16

    def loader(self, batch_size, rank, world_size, num_workers, drop_last, **options):
        self.options = options
        collate = options.pop("collate_fn", default_data_collator)
        return DataLoader(rows(16), batch_size, collate_fn=collate)


def test_a_collator_reaches_a_data_set_that_makes_its_own_loader(tmp_path):
    seen = []

    def collate(batch):
        seen.append(len(batch))
        return default_data_collator(batch)

    made(ClassifierTrainer, tmp_path, train_dataset=Stream()).train()
    assert seen == []
    made(ClassifierTrainer, tmp_path, train_dataset=Stream(), data_collator=collate).train()
    assert seen == [8] * 4
    in_order = {"train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match="makes its own loader"):
        made(ClassifierTrainer, tmp_path, changes=in_order, train_dataset=Stream()).train()


def test_rows_of_other_data_sets_are_checked_in_batches(tmp_path):
    class Pairs(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return {"pixel_values": image, "labels": label}

    pairs = Pairs(torch.randn(8, 3, 16, 16), torch.full((8,), 3))
    with pytest.raises(ValueError, match="a label is 3, but the model has 3 labels"):
        made(ClassifierTrainer, tmp_path, train_dataset=pairs).train()


def test_the_metric_of_one_of_several_data_sets_may_tell_the_best_model(tmp_path):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
    }
    datasets = {"near": rows(8), "far": rows(4)}

    def trainer_of(metric):
        return made(
            ClassifierTrainer,
            tmp_path,
            changes=changes | {"metric_for_best_model": metric},
            eval_dataset=datasets,
        )

    trainer = trainer_of("eval_far_loss")
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    with pytest.raises(ValueError, match="'loss'; an evaluation gives near_loss, "):
        trainer_of("loss").train()
