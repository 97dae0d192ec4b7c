"""The cards in this repository hold what was measured, or say that nothing was."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ofb_hf import SubnetSpec
from ofb_hf.release.card import MEASURED, final_results, read_results, render_card
from ofb_hf.workflow.report import markdown_table, results_rows

CARDS = Path(__file__).parents[2] / "model_cards"
PLANNED = sorted(CARDS.glob("*/paper.json"))
MADE = sorted(CARDS.glob("*/eval_results.json"))


def test_every_folder_is_one_or_the_other():
    folders = {path.name for path in CARDS.iterdir() if path.is_dir()}
    assert folders == {path.parent.name for path in (*PLANNED, *MADE)}
    assert {path.parent.name for path in PLANNED} == {f"ofb-deit-{letter}" for letter in "abcde"}
    assert all(not (path.parent / "eval_results.json").exists() for path in PLANNED)


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.parent.name)
def test_cards_without_weights_say_so_first_and_hold_the_papers_figures(path):
    paper = json.loads(path.read_text())
    card = (path.parent / "README.md").read_text()
    assert card.startswith("No weights of ours exist yet")
    row = [paper[key] for key in ("model", "parent", "top1", "top5", "params_millions", "gflops")]
    assert "| " + " | ".join(map(str, row)) + " |" in card
    assert "Reported by the paper's authors" in card
    assert ModelCard(card).data.eval_results is None
    (command,) = re.findall(r"--config (recipes/configs/\S+)", card)
    assert (CARDS.parent / command).is_file()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.parent.name)
def test_cards_of_what_was_made_repeat_what_was_measured(path):
    """The card is exactly what the template makes of the results and the subnet next to it."""
    results, card = read_results(path), (path.parent / "README.md").read_text()
    subnet = SubnetSpec.from_json((path.parent / "subnet.json").read_text())
    assert card == render_card(results, subnet, markdown_table(results_rows(results)))
    in_card = {
        result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results
    }
    assert in_card == {kind: final_results(results)[key] for key, (kind, _) in MEASURED.items()}
    assert re.fullmatch(r"[0-9a-f]{40}", results["commit"]), "made from a clean, committed source"
    assert final_results(results)["macs"] <= results["target_macs"]
    assert (path.parent / "search.png").is_file()
    assert not re.search(r"\b1 threads|steps of (dense,|finetune )", card)
