"""Write the measured claims of the README from recorded figures."""

from .results import Result, card

# Method in search_quality.json -> its name in the README; `search` was the preset "bi_mask" there.
METHODS = {
    "search": 'bi-masks (`preset="bi_mask"`)',
    "taylor": "one-shot first-order pruning",
    "l1": "one-shot magnitude pruning",
    "uniform": "uniform scaling",
    "torch_pruning": "torch-pruning",
    "paper": 'the published recipe (`preset="paper"`)',
}


def readme_claims() -> str:
    """Return the README's block of measured figures."""
    return "\n\n".join([card_claims(), comparison(), "\n".join(bullets())])


def card_claims() -> str:
    """Return the table of the CIFAR-10 checkpoints with cards in this repository."""
    lines = [
        "A ViT with 1.2 M parameters on a CIFAR-10 subset (5,000 test images), two epochs each of "
        "search and\nfinetuning on half of the training images:",
        "",
        "| model | top-1 % | MACs | parameters |",
        "| --- | ---: | ---: | ---: |",
    ]
    dense = card("ofb-cifar10-0.5")["dense"]
    lines.append(f"| dense | {dense['top1']:.2f} | 1.000 | {dense['params']:,} |")
    for budget in ("0.5", "0.3"):
        name = f"ofb-cifar10-{budget}"
        small = card(name)["finetuned"]
        fraction = small["macs"] / dense["macs"]
        label = f"[budget {budget}](model_cards/{name}/README.md)"
        cells = f"{small['top1']:.2f} | {fraction:.3f} | {small['params']:,}"
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines)


def comparison() -> str:
    """Return the table that compares methods after equal training."""
    first = Result.load("search_quality_first")
    quality = Result.load("search_quality")
    dense = quality.text("top-1 %", budget=1.0, method="dense")
    budgets = (0.5, 0.3, 0.2, 0.12)
    lines = [
        "The same checkpoint and test images, half an epoch of training in total (means of 3 to 5 "
        "seeds; standard\nerror 0.7 points). The first two rows learn from the dense model alone; "
        "the others from labels as well, and\nthe dense model with that training has "
        f"{dense} %.",
        "",
        "| method, top-1 % | " + " | ".join(f"{budget} of the MACs" for budget in budgets) + " |",
        "| --- |" + " ---: |" * len(budgets),
    ]
    labels = {
        "search": 'this package (`preset="default"`)',
        "taylor_fitted": "one-shot first-order pruning, fitted as here (1 seed)",
    }
    rows = [("search_quality_first", method, label) for method, label in labels.items()]
    rows += [("search_quality", method, label) for method, label in METHODS.items()]
    for table, method, label in rows:
        source = first if table == "search_quality_first" else quality
        cells = [_figure(source, "top-1 %", budget, method) for budget in budgets]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    cells = [_figure(quality, "best", budget, "random") for budget in budgets]
    lines.append(f"| best of eight random subnets | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(source: Result, column: str, budget: float, method: str) -> str:
    """Return a figure of a table, "-" where it has no such row."""
    rows = [row for row in source.records() if (row["budget"], row["method"]) == (budget, method)]
    return source.text(column, budget=budget, method=method) if rows else "-"


def bullets() -> list[str]:
    """Return the other claims, one list item each."""
    tokens = Result.load("token_reduction")
    name = "model, fraction of the MACs"
    learned = {name: "learned, 0.5"}
    swin = Result.load("swin_half")
    units = Result.load("planted_units")
    noisy = Result.load("planted_units_noise").records()
    removed = sorted(row["useless removed"] for row in noisy)
    kept = sorted(row["useful kept"] for row in noisy)
    blocks = Result.load("planted_blocks").records()[0]
    budget = {"budget / cost of the useful units": 1.02}
    return [
        f"- **Tokens alone**, without training any weight: {tokens.text('top-1 %', **learned)} % "
        f"at half of the MACs and {tokens.text('speed, of dense', **learned)} times the images\n"
        f"  per second; the dense model has {tokens.text('top-1 %', **{name: 'dense'})} % (2,500 "
        "test images, one CPU thread).",
        f"- **Swin**, small and trained for 10 epochs only: {swin.text('top-1 %', model='dense')} "
        f"% dense, {swin.text('top-1 %', model='after finetuning')} % at half of its MACs after "
        "further training\n  (one seed, an earlier version of the search).",
        f"- **Planted task** (some units disabled before dense training): the search removes "
        f"{units.text('useless removed', **budget)} of them and keeps\n  "
        f"{units.text('useful kept', **budget)} of the useful ones; if the useless ones have a "
        f"small effect, it removes {removed[0]} to {removed[-1]} % and keeps\n  {kept[0]} to "
        f"{kept[-1]} %. Of six blocks it leaves out exactly the two without effect in "
        f"{blocks['seeds with exactly these two blocks left out']} of {blocks['seeds']} seeds.",
    ]
