"""The help is fast, short, and complete on request; mistyped and idle settings are refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import run_code
from transformers import TrainingArguments

import ofb_hf_command
from ofb_hf import __version__, cli
from ofb_hf.workflow import arguments, idle_settings, inputs
from ofb_hf.workflow.command_line import command_line, parse
from ofb_hf.workflow.flag_help import OF_THE_LINE, TRANSFORMERS, Command, CommandParser
from ofb_hf.workflow.idle_settings import READ, RULES, is_read

ROOT = Path(__file__).parents[2]
DEFINED = [value for value in vars(cli).values() if isinstance(value, Command)]
CPU = ["--use_cpu", "--report_to", "none"]
# What runs where neither model nor data are named.
DEMOS = {"search": {}, "search-tokens": cli.TOKEN_DEMO}


def run(capsys, *words):
    """Run `ofb-hf`; return what it prints, on stdout and stderr, and its exit status."""
    with pytest.raises(SystemExit) as stop:
        ofb_hf_command.main(list(words))
    printed = capsys.readouterr()
    return printed.out, printed.err, stop.value.code


# ----------------------------------------------------------------------------- the list of commands


def test_help_lists_every_command_with_examples(capsys):
    out, err, status = run(capsys, "--help")
    assert (err, status) == ("", 0)
    for name, command in ofb_hf_command.COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out
        assert len(command.summary) <= 80
    assert out.count("\n  ofb-hf ") == 4
    assert run(capsys, "-h") == (out, err, status)
    assert run(capsys) == ("", out, 2)


def test_every_command_is_a_function_and_has_a_help_of_its_own():
    assert sorted(command.name for command in DEFINED) == sorted(ofb_hf_command.COMMANDS)
    for name, command in ofb_hf_command.COMMANDS.items():
        module, function = command.function.split(":")
        assert module == "ofb_hf.cli"
        assert callable(getattr(cli, function)), name
    for command in DEFINED:
        assert command.description.startswith(ofb_hf_command.COMMANDS[command.name].summary)
        assert max(map(len, command.description.splitlines())) <= 100


def test_help_imports_neither_the_package_nor_torch():
    """Importing them takes seconds; benchmarks/help_time.py compares."""
    code = "import sys, ofb_hf_command as c; print(c.help_text()); print(c.version())\n"
    code += "print(*(m for m in ('ofb_hf', 'torch', 'transformers') if m in sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.stdout == f"{ofb_hf_command.help_text()}\n{__version__}\n\n", process.stderr


def test_the_version_and_mistyped_commands(capsys):
    assert run(capsys, "--version") == (f"ofb-hf {__version__}\n", "", 0)
    out, err, status = run(capsys, "serch", "--target_macs", "0.5")
    assert (out, status) == ("", 2)
    assert err == "error: `ofb-hf` has no command 'serch'; did you mean `ofb-hf search`?\n"
    assert "`ofb-hf search-tokens`" in run(capsys, "search_tokens")[1]
    assert "the commands are plan, latency-table," in run(capsys, "zzz")[1]


@pytest.mark.parametrize("flag", ["--bogus", "-v", "--hub_token=hf_secret", "--target_macs"])
def test_a_flag_without_a_command_is_an_unknown_flag(flag, capsys):
    out, err, status = run(capsys, flag, "0.5")
    assert (out, status) == ("", 2)
    assert err.startswith(
        f"error: unknown flag {flag.partition('=')[0]}; `ofb-hf` alone has --help"
    )
    assert "no command" not in err
    assert "hf_secret" not in err


@pytest.mark.slow
def test_the_package_runs_as_a_module(tmp_path):
    code = """
import runpy, sys
sys.argv[1:] = ["--version"]
runpy.run_module("ofb_hf", run_name="__main__", alter_sys=True)
"""
    assert run_code(tmp_path, code) == (0, f"ofb-hf {__version__}\n")


# ------------------------------------------------------------------------------------------- flags


def test_the_help_of_a_search_is_short_and_says_where_the_rest_is(capsys):
    out, _, status = run(capsys, "search", "--help")
    assert status == 0
    titles = ["model and data", "budget", "training", "finetuning", "output"]
    places = [out.index(f"\n{title}:\n") for title in titles]
    assert places == sorted(places)
    shown = [line for line in out.splitlines() if line.startswith("  --")]
    assert 10 <= len(shown) <= 15
    assert "`ofb-hf search --help all` shows all" in out
    assert "--pmim_weight" not in out
    everything, _, status = run(capsys, "search", "--help", "all")
    assert status == 0
    for title in (*titles, "search space", "decision", "masked image modelling", TRANSFORMERS):
        assert f"\n{title}" in everything
    assert "--pmim_weight X" in everything
    assert "default: true" in everything


@pytest.mark.parametrize("command", DEFINED, ids=lambda command: command.name)
def test_every_flag_stands_in_one_group_of_the_whole_help(command):
    parser = CommandParser(command, "ofb-hf")
    flags, groups = parser.flags(), parser.groups(everything=True)
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(parser.shown())
    assert f"shows all {len(grouped)} flags" in parser.format_help() or not command.essentials
    own = set(flags) - set(TrainingArguments.__dataclass_fields__)
    assert not own & set(groups.get(TRANSFORMERS, ()))
    for names in parser.groups(everything=False).values():
        assert set(names) <= set(flags)
    for everything in (False, True):
        lines = parser.format_help(everything).splitlines()
        assert max(map(len, lines)) <= 100
    assert all(action.help for name, action in flags.items() if name in own)


@pytest.mark.parametrize("name", sorted(ofb_hf_command.COMMANDS))
def test_help_needs_neither_model_nor_data(name, capsys):
    out, err, status = run(capsys, name, "--help")
    assert (err, status) == ("", 0)
    assert out.startswith(f"usage: ofb-hf {name} [--config FILE.yaml]")


def test_a_recipe_says_its_own_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes/search_deit.py"), "--help"])
    with pytest.raises(SystemExit):
        cli.search()
    assert capsys.readouterr().out.startswith("usage: recipes/search_deit.py [--config")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--targt_macs", "0.5"], "unknown setting --targt_macs (did you mean --target_macs?)"),
        (["--target-mac=0.5"], "unknown setting --target_mac (did you mean --target_macs?)"),
        (["--hub_tokn=hf_secret"], "unknown setting --hub_tokn (did you mean --hub_token?)"),
        (["--qqqq", "1"], "unknown setting --qqqq; `ofb-hf search --help all`"),
        (["photos"], "'photos' follows no flag"),
        (["--optim", "adam"], "--optim is 'adam'; did you mean adam"),
        (["--optim", "adam"], "that are allowed are listed by `ofb-hf search --help all`."),
        (["--save_strategy", "stpes"], "'stpes'; did you mean steps? Allowed are no, steps, "),
    ],
)
def test_unknown_flags_are_refused_with_a_suggestion(words, message, capsys):
    _, err, status = run(capsys, "search", *words)
    assert status == 2
    assert message in err
    assert "hf_secret" not in err


MISTYPED = [
    ("plan", ["vit_digits"], "digits_vit"),
    ("plan", ["digit_vit"], "digits_vit"),
    ("latency-table", ["deit-smal"], "deit_small"),
    ("export", ["digitsvit", "--output_dir", "out"], "digits_vit"),
    ("verify", ["swin_digits"], "digits_swin"),
    ("search", ["--model_name_or_path", "vit_digits"], "digits_vit"),
    (
        "search",
        ["--model_name_or_path", "digits_vit", "--teacher_name_or_path", "deit_smal"],
        "deit",
    ),
    ("search-tokens", ["--model_name_or_path", "vit_digits"], "digits_vit"),
    ("finetune", ["--model_name_or_path", "vit_digits"], "digits_vit"),
    ("finetune", ["--model_name_or_path", "a/b", "--teacher_name_or_path", "vit_digits"], "digits"),
    ("evaluate", ["--model_name_or_path", "vit_digits"], "digits_vit"),
]


@pytest.mark.parametrize(("name", "words", "meant"), MISTYPED, ids=str)
def test_a_mistyped_shape_is_answered_with_the_nearest_one(
    name, words, meant, capsys, tmp_path, monkeypatch
):
    """And is looked for on no Hub, whose retries take minutes."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is loaded")

    for function in ("load_image_processor", "load_image_data", "load_complete_classifier"):
        monkeypatch.setattr(inputs, function, refuse)
    wrong = next(word for word in reversed(words) if not word.startswith("--") and word != "out")
    _, err, status = run(capsys, name, *words_of(name, " ".join(words)))
    assert status == 2
    assert f"error: {wrong!r} is no folder, no Hub name (OWNER/NAME) and none of the named" in err
    assert f"; did you mean {meant}" in err
    assert list(tmp_path.iterdir()) == []


def test_a_name_like_no_shape_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"'resnet50' is no folder.*; check the spelling"):
        inputs.require_findable("resnet50")
    inputs.require_findable("owner/name")
    inputs.require_findable(str(ROOT))


def test_a_teacher_with_random_weights_is_refused():
    with pytest.raises(ValueError, match="the teacher is digits_vit, a named shape with random"):
        inputs.require_possible_teacher("digits_vit")
    inputs.require_possible_teacher(None)
    inputs.require_possible_teacher("owner/name")


def test_unknown_settings_of_a_file_are_refused_with_a_suggestion(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("finetune_epoch: 3\n")
    _, err, status = run(capsys, "search", "--config", str(tmp_path / "run.yaml"))
    assert status == 2
    assert "run.yaml: unknown setting --finetune_epoch (did you mean --finetune_epochs?)" in err


# ------------------------------------------------------------------------ settings that do nothing

DRY = "--model_dir out --dry_run --output_dir sent"
NOTHING = [
    ("search", "--data_dir photos --dense_learning_rate 1e-3", "--dense_epochs"),
    ("search", "--finetune_epochs 0 --finetune_learning_rate 1e-3", "nothing is finetuned"),
    ("search", "--finetune_max_steps 0 --finetune_distillation_weight 1", "nothing is finetuned"),
    ("search-tokens", "--finetune_learning_rate 1e-3", "nothing is finetuned"),
    ("search", "--finetune_epochs 3 --finetune_max_steps 5", "--finetune_max_steps takes its"),
    ("search", "--token_pictures 3", "add --search_tokens"),
    ("search", "--hub_model_id a/b", "add --push_to_hub"),
    ("search", "--hub_token hf_secret", "add --push_to_hub"),
    ("search", "--hub_private_repo true", "add --push_to_hub"),
    ("search-tokens", "--hub_revision main", "add --push_to_hub"),
    ("finetune", "--hub_always_push", "add --push_to_hub"),
    ("search", "--push_to_hub --hub_strategy end", "folder is pushed once"),
    ("search", "--mixup 0.8", "only --augmentation deit"),
    ("finetune", "--random_erasing 0.5 --augmentation light", "only --augmentation deit"),
    ("search", "--augmentation deit --color_jitter 0.4", "--auto_augment takes its place"),
    ("search", "--augmentation deit --cutmix 0 --mixup_switch_prob 0.4", "mixup and cutmix"),
    ("search", "--eval_share 0.2", "held out"),
    ("search", "--data_dir photos --eval_split test --eval_share 0.2", "held out"),
    ("search", "--overwrite_output_dir --resume_from_checkpoint auto", "give one of the two"),
    ("search", "--distillation_type hard --distillation_temperature 3", "has no temperature"),
    (
        "search",
        "--distillation_weight 0 --finetune_epochs 0 --teacher_name_or_path big",
        "no phase learns from a teacher",
    ),
    (
        "search",
        "--preset paper --finetune_distillation_weight 0 --distillation_temperature 3",
        "no phase learns from a teacher",
    ),
    ("finetune", "--distillation_temperature 3", "no phase learns from a teacher"),
    ("plan", "--model_name_or_path checkpoint --num_labels 10", "has its own labels"),
    ("latency-table", "--model_name_or_path checkpoint --num_labels 10", "has its own labels"),
    ("evaluate", "--augmentation light", "trains nothing"),
    ("evaluate", "--learning_rate 1e-3", "trains nothing"),
    ("verify", "--ema_decay 0.9", "trains nothing"),
    ("verify", "--push_to_hub", "trains nothing"),
    ("evaluate", "--distillation_type hard", "trains nothing"),
    ("evaluate", "--per_device_train_batch_size 8", "trains nothing"),
    ("evaluate", "--warmup_steps 3 --lr_scheduler_type cosine", "trains nothing"),
    ("verify", "--output_dir out", "trains nothing"),
    ("verify", "--eval_strategy epoch", "trains nothing"),
    ("plan", "--model_name_or_path digits_vit --learning_rate 1e-3", "a plan says"),
    ("plan", "--model_name_or_path digits_vit --push_to_hub", "a plan says"),
    (
        "plan",
        "--model_name_or_path digits_vit --preset bi_mask --retire_threshold 0.3",
        "a plan says",
    ),
    ("search", "--do_train", "scripts of transformers"),
    ("finetune", "--do_eval --do_predict", "scripts of transformers"),
    ("search", "--max_steps 3 --num_train_epochs 5", "--max_steps takes its place"),
    ("finetune", "--max_steps 3 --num_train_epochs 5", "--max_steps takes its place"),
    ("search-tokens", "--learning_rate 1e-3", "--token_learning_rate is its rate"),
    ("search-tokens", "--finetune_epochs 1 --learning_rate 1e-3", "--finetune_learning_rate"),
    ("search-tokens", "--data_dir photos --weight_decay 0.1", "moves no weights"),
    ("search-tokens", "--data_dir photos --adam_beta1 0.8", "moves no weights"),
    ("search-tokens", "--data_dir photos --adam_beta2 0.8", "moves no weights"),
    ("search-tokens", "--data_dir photos --optim adamw_torch", "moves no weights"),
    ("search", "--finetune_epochs 0 --data_dir photos --optim_args a=1", "an optimizer of its own"),
    ("publish", f"{DRY} --private", "--dry_run sends nothing"),
    ("publish", f"{DRY} --commit_message new", "--dry_run sends nothing"),
    ("latency-table", "--model_name_or_path digits_vit --device cuda --num_threads 2", "the GPU"),
]


def words_of(name, flags):
    """Return the words of a command line, on the CPU where the command has that flag."""
    return [*flags.split(), *([] if name in ("latency-table", "publish", "export") else CPU)]


def command_of(name):
    """Return the command of that name."""
    (command,) = [command for command in DEFINED if command.name == name]
    return command


@pytest.mark.parametrize(("name", "flags", "reason"), NOTHING)
def test_settings_that_do_nothing_are_refused(name, flags, reason, monkeypatch):
    monkeypatch.setattr(arguments.torch.cuda, "is_available", lambda: "--device cuda" in flags)
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        parse(command_of(name), words_of(name, flags), DEMOS.get(name))
    message = str(refusal.value)
    assert any(f"{word} is given, but " in message for word in flags.split() if word[:2] == "--")
    assert "hf_secret" not in message


@pytest.mark.parametrize("name", READ)
def test_commands_that_train_nothing_refuse_every_setting_that_they_do_not_read(name):
    """By a list of what they read: a flag that a class gets in future is refused, too."""
    command = command_of(name)
    flags = set(CommandParser(command, "").flags()) - set(OF_THE_LINE)
    read, reason = READ[name]
    assert read <= flags
    assert len(flags - read) > 50
    whole_help = CommandParser(command, "").format_help(everything=True)
    for flag in sorted(flags):
        parts = [idle_settings.Settings(**{flag: "given"})]
        shown = re.search(rf"^  --{flag}( |$)", whole_help, re.MULTILINE)
        assert bool(shown) == is_read(name, flag) == (flag in read)
        if flag in read:
            continue
        with pytest.raises(ValueError, match=rf"^--{flag} is given, but {reason}; leave it out"):
            idle_settings.require_effect(name, {flag}, parts)


def test_they_are_refused_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--finetune_epochs", "0", "--finetune_learning_rate", "1e-3", "--mixup", "0.8"]
    _, err, status = run(capsys, "search", "--model_name_or_path", "no/such-model", *flags, *CPU)
    assert status == 2
    assert err.count("is given, but ") == 2  # all at once, on one line
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_rule_is_tested():
    refused = " ".join(f"{flags} {reason}" for _, flags, reason in NOTHING)
    assert all(any(f"--{name}" in refused for name in rule.names) for rule in RULES)
    known = {name for command in DEFINED for name in CommandParser(command, "").flags()}
    assert {name for rule in RULES for name in rule.names} <= known


SOMETHING = [
    ("search", "--dense_epochs 3 --dense_learning_rate 1e-3"),
    ("search", "--finetune_epochs 3 --finetune_learning_rate 1e-3"),
    ("search", "--finetune_max_steps 3 --finetune_learning_rate 1e-3"),
    ("search", "--finetune_epochs 0 --finetune_max_steps 3"),
    ("search", "--search_tokens --token_pictures 3"),
    ("search", "--token_pictures 0"),
    ("search-tokens", "--token_pictures 3"),
    ("search", "--push_to_hub --hub_model_id a/b --hub_private_repo true"),
    ("search", "--augmentation deit --mixup 0.8 --auto_augment none --color_jitter 0.4"),
    ("search", "--mixup 0 --random_erasing 0"),
    ("search", "--data_dir photos --eval_share 0.2"),
    ("search", "--data_dir photos --eval_split train --eval_share 0.2"),
    ("search", "--distillation_weight 0 --teacher_name_or_path big"),
    ("search", "--preset paper --teacher_name_or_path big --distillation_temperature 3"),
    ("search-tokens", "--distillation_temperature 3"),
    ("finetune", "--teacher_name_or_path big --distillation_temperature 3"),
    ("search-tokens", "--finetune_epochs 1 --weight_decay 0.1 --optim adamw_torch"),
    ("search-tokens", "--dense_epochs 1 --adam_beta1 0.8 --adam_beta2 0.9 --optim_args a=1"),
    ("search", "--max_steps 3"),
    ("search", "--max_steps -1 --num_train_epochs 5"),
    ("finetune", "--optim_args a=1"),
    ("publish", f"{DRY} --repo_id a/b --create_pr --revision new"),
    ("publish", "--model_dir out --repo_id a/b --private --commit_message new"),
    ("latency-table", "--model_name_or_path digits_vit --device cpu --num_threads 2"),
    (
        "plan",
        "--model_name_or_path digits_vit --num_labels 10 --preset bi_mask --settle_at 0.3 --bf16",
    ),
    ("plan", "--model_name_or_path digits_vit --learning_rate 0 --save_strategy no"),
    ("evaluate", "--per_device_eval_batch_size 8 --eval_strategy no --warmup_steps 0"),
    ("evaluate", "--data_dir photos --train_split training --image_column picture"),
]


@pytest.mark.parametrize(("name", "flags"), SOMETHING)
def test_settings_that_do_something_are_taken(name, flags):
    command = command_of(name)
    parts = parse(command, words_of(name, flags), DEMOS.get(name))
    assert len(parts) == len(command.classes)


def test_a_file_may_hold_settings_that_the_command_line_turns_off(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("finetune_epochs: 3\nfinetune_learning_rate: 1.0e-3\ndense_learning_rate: 1\n")
    words = ["--config", str(file), "--finetune_epochs", "0", "--data_dir", "photos", *CPU]
    *_, finetuning, _ = parse(cli.SEARCH, words)
    assert (finetuning.is_wanted, finetuning.finetune_learning_rate) == (False, 1e-3)
    # the demonstration's file holds such settings, too
    *_, finetuning, _ = parse(cli.SEARCH, ["--finetune_epochs", "0", "--dense_epochs", "0"], {})
    assert not finetuning.is_wanted


# ----------------------------------------------------------------------------- the command in cards


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/home/me/.venv/bin/ofb-hf", "search", "--seed", "3"], "ofb-hf search --seed 3"),
        (["/home/me/recipes/search_deit.py", "--seed", "3"], "recipes/search_deit.py --seed 3"),
        ([f"{ROOT}/ofb_hf/__main__.py", "plan", "x"], "python -m ofb_hf plan x"),
        (["/home/me/mine.py", "--data_dir", "/home/me/photos"], "mine.py --data_dir photos"),
        (["ofb-hf", "search", "--hub_token", "hf_secret"], "ofb-hf search --hub_token HIDDEN"),
    ],
)
def test_the_command_in_a_card_names_the_program_and_no_folder(argv, shown, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == shown
