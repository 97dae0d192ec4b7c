"""Compare two checkouts of this repository: do they compute the same weights, bit for bit?

    python benchmarks/same_weights.py --against CHECKOUT [--cases vit swin] [--demo]

Every case is a tiny training run with fixed seeds, in its own process with one thread: searches of
a ViT and of a Swin with both presets, on one process and on two ranks, with depth, with tokens,
with tied layers, cut at the end, and with micro-batches; a search for tokens alone; training from
a teacher with an average of the weights. The hash covers the name, shape and values of every tensor
of the resulting model. `--demo` adds the demonstration (`make demo`), which takes minutes.

To show that a refactoring changes no result, compare it with its parent commit:

    git worktree add ../parent HEAD~1
    python benchmarks/same_weights.py --against ../parent
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PHASES = {
    "importance_hold": 0.3,
    "warmup": 0.2,
    "one_hot_begin": 0.5,
    "one_hot_end": 0.75,
    "retire_begin": 0.5,
    "settle_at": 0.75,
}
# Candidates that divide nothing, so that an index off by one shows.
CANDIDATES = {
    "vit": {
        "embedding_candidates": [13, 24, 31, 40],
        "head_candidates": [2, 3, 5],
        "head_dim_candidates": [3, 5, 8],
        "mlp_candidates": [17, 29, 50, 72],
    },
    "swin": {
        "embedding_candidates": [7, 13, 20, 31, 40],
        "head_candidates": [1, 2, 3, 4],
        "head_dim_candidates": [3, 7, 10],
        "mlp_candidates": [11, 29, 36, 50, 72],
    },
}
# Name -> family, fields of the search's config, training arguments, ranks.
SEARCHES = {
    "vit": ("vit", PHASES, {}, 1),
    "vit, preset's phases": ("vit", {}, {"max_steps": 40}, 1),
    "vit, paper": ("vit", {"preset": "paper"}, {}, 1),
    "vit, depth": ("vit", PHASES | {"search_depth": True, "target_macs": 0.35}, {}, 1),
    "vit, tokens": ("vit", PHASES | {"search_tokens": True, "target_macs": 0.5}, {}, 1),
    "vit, tied layers": ("vit", PHASES | {"uniform_across_layers": True}, {}, 1),
    "vit, cut at the end": ("vit", PHASES | {"prune_during_search": False}, {}, 1),
    "vit, micro-batches and average": (
        "vit",
        PHASES,
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ema_decay": 0.9},
        1,
    ),
    "vit, parameters": ("vit", PHASES | {"target_macs": None, "target_params": 0.5}, {}, 1),
    "vit, two ranks": ("vit", PHASES, {}, 2),
    "swin": ("swin", PHASES, {}, 1),
    "swin, paper": ("swin", {"preset": "paper"}, {}, 1),
    "swin, depth": ("swin", PHASES | {"search_depth": True, "target_macs": 0.4}, {}, 1),
    "swin, two ranks": ("swin", PHASES, {}, 2),
}
OTHERS = ("tokens alone", "teacher and average")


def tiny_model(family: str):
    """Return a stock classifier whose random weights are large enough that errors show."""
    import torch
    from transformers import (
        SwinConfig,
        SwinForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    if family == "vit":
        config = ViTConfig(
            hidden_size=40,
            num_hidden_layers=4,
            num_attention_heads=5,
            intermediate_size=72,
            image_size=16,
            patch_size=4,
            num_labels=3,
        )
        model = ViTForImageClassification._from_config(config, attn_implementation="eager")
    else:
        config = SwinConfig(
            embed_dim=20,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=3,
            mlp_ratio=1.8,
            drop_path_rate=0.1,
            image_size=16,
            patch_size=2,
            num_labels=3,
        )
        model = SwinForImageClassification._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim in (2, 4):
                parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.4)
    return model.train()


def digest(model) -> str:
    """Return one hash over names, shapes and values of all tensors of a model."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(name.encode())
        whole.update(str(tuple(tensor.shape)).encode())
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


def run_case(name: str, output: Path) -> None:
    """Train one case in this process; rank 0 writes the hash."""
    import torch

    import ofb_hf

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    rows = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]
    family, fields, arguments, _ = SEARCHES.get(name, ("vit", {}, {}, 1))
    settings = {
        "max_steps": 24,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    args = ofb_hf.OFBTrainingArguments(str(output.parent / "run"), **settings | arguments)
    model = tiny_model(family)
    if name in SEARCHES:
        config_class = {"vit": ofb_hf.ViTBiMaskConfig, "swin": ofb_hf.SwinBiMaskConfig}[family]
        # "ours" is the name that all versions know for the preset of bi-masks
        always = {"target_macs": 0.6, "preset": "ours"}
        config = config_class(**CANDIDATES[family] | always | fields)
        trainer = ofb_hf.OFBTrainer(model, args, config, train_dataset=rows)
        trainer.train()
        result = trainer.compress()
    elif name == "tokens alone":
        model = ofb_hf.OFBViTForImageClassification.from_dense(model)
        trainer = ofb_hf.TokenTrainer(
            model, args, ofb_hf.TokenSearchConfig(target_macs=0.6), train_dataset=rows
        )
        trainer.train()
        result = trainer.scheduled()
    else:
        args.ema_decay = 0.9
        args.distillation_weight = 0.5
        trainer = ofb_hf.DistillationTrainer(
            model, args, teacher=tiny_model(family).eval(), train_dataset=rows
        )
        trainer.train()
        result = model
    if args.process_index == 0:
        output.write_text(
            json.dumps(
                {
                    "hash": digest(result),
                    "macs": ofb_hf.count_macs(result),
                    "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
                }
            ),
            encoding="utf-8",
        )


def run_in(checkout: Path, name: str) -> dict:
    """Run a case with the package of a checkout and return its result."""
    ranks = SEARCHES[name][3] if name in SEARCHES else 1
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        result = subprocess.run(
            [*command, str(Path(__file__).resolve()), "--case", name, "--output", str(output)],
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if not output.exists():
            raise RuntimeError(f"{name} failed in {checkout}:\n{result.stdout}{result.stderr}")
        return json.loads(output.read_text(encoding="utf-8"))


def run_demo(checkout: Path) -> dict:
    """Run the demonstration of a checkout and return the hash of its weights."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = str(checkout / "recipes/search_deit.py")
        subprocess.run(
            [sys.executable, recipe, "--output_dir", folder, "--overwrite_output_dir"],
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        weights = (Path(folder) / "model.safetensors").read_bytes()
        results = json.loads((Path(folder) / "eval_results.json").read_text(encoding="utf-8"))
        return {"hash": hashlib.sha256(weights).hexdigest(), "macs": results["finetuned"]["macs"]}


def results_of(checkout: Path, names: list[str], demo: bool) -> Iterator[tuple[str, dict]]:
    """Yield every case with the result that the package of a checkout computes."""
    for name in names:
        yield name, run_in(checkout, name)
    if demo:
        yield "make demo", run_demo(checkout)


def main() -> None:
    """Compare two checkouts, case by case; exit with 1 if any differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="the other checkout, or a file of --save")
    parser.add_argument("--save", type=Path, help="write the results of this checkout as JSON")
    parser.add_argument("--cases", nargs="*", default=[*SEARCHES, *OTHERS])
    parser.add_argument("--demo", action="store_true", help="also run the demonstration")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.case:
        run_case(wanted.case, wanted.output)
        return
    others = {}
    if wanted.against is not None and wanted.against.is_file():
        others = json.loads(wanted.against.read_text(encoding="utf-8"))
    elif wanted.against is not None:
        others = dict(results_of(wanted.against.resolve(), wanted.cases, wanted.demo))
    results = {}
    different = []
    for name, here in results_of(ROOT, wanted.cases, wanted.demo):
        results[name] = here
        verdict = ""
        if name in others:
            same = here["hash"] == others[name]["hash"]
            verdict = "same" if same else "DIFFERS"
            different += [] if same else [name]
        print(f"{name:34} {here['macs']:>10,} MACs  {here['hash'][:12]}  {verdict}", flush=True)
    if wanted.save:
        wanted.save.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
