"""The example of docs/ADD_A_MODEL_FAMILY.md is a family: it keeps every promise of one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from contract import (
    KINDS,
    assert_basis,
    assert_copy,
    assert_costs,
    assert_masks,
    assert_search,
    randomized,
)
from factories import FAMILIES, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    IJepaConfig,
    IJepaForImageClassification,
)

import ofb_hf
from ofb_hf.cost.counting import count_macs
from ofb_hf.families.description import UnsupportedArchitectureError
from ofb_hf.families.registry import FAMILIES as REGISTERED
from ofb_hf.families.subnet import SubnetSpec
from ofb_hf.tokens.schedules import require_class_token

PAGE = Path(__file__).resolve().parents[2] / "docs/ADD_A_MODEL_FAMILY.md"
MODELS = (*FAMILIES, "example")


# What the page says about the lists: the process edits them as a person would edit their files.
LISTED = """
import importlib, sys, types
from pathlib import Path

# the lists are read when the package is imported, so they are edited before
package = types.ModuleType("ofb_hf")
package.__path__ = [sys.argv[1]]
sys.modules["ofb_hf"] = package
models = importlib.import_module("ofb_hf.models")
del sys.modules["ofb_hf"]
model_blocks, description_blocks = (Path(name).read_text("utf-8") for name in sys.argv[2:])
module = types.ModuleType("ijepa_family")
sys.modules["ijepa_family"] = module
exec(model_blocks, vars(module))
names = ("OFBIJepaConfig", "OFBIJepaModel", "OFBIJepaForImageClassification")
models.REGISTERED += (tuple(getattr(module, name) for name in names),)
models.__all__ += names
for name in names:
    setattr(models, name, getattr(module, name))

from ofb_hf import *
assert OFBIJepaModel is module.OFBIJepaModel
assert OFBViTForImageClassification and OFBTrainer and count_macs

from transformers import AutoModel, AutoModelForImageClassification
config = OFBIJepaConfig(
    hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=72,
    image_size=16, patch_size=4, num_labels=3,
)
assert type(AutoModel.from_config(config)) is OFBIJepaModel
model = AutoModelForImageClassification.from_config(config)
assert type(model) is OFBIJepaForImageClassification

exec(description_blocks, vars(module))
from ofb_hf.families.registry import FAMILIES
FAMILIES[module.IJepaConfig] = module.IJEPA
supernet = install_bi_masks(model)
supernet.decisions.settle_()
assert count_macs(compress(supernet)) <= count_macs(model) / 2
"""


def page_blocks() -> list[str]:
    """The code of the page, block by block."""
    text = PAGE.read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The family of the page, listed as a third one for the time of this module."""
    file = tmp_path_factory.mktemp("example") / "ijepa_family.py"
    file.write_text("\n\n".join(page_blocks()), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("ijepa_family", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ijepa_family", module)
        spec.loader.exec_module(module)
        patch.setitem(REGISTERED, IJepaConfig, module.IJEPA)
        AutoConfig.register("ofb_ijepa", module.OFBIJepaConfig)
        AutoModelForImageClassification.register(
            module.OFBIJepaConfig, module.OFBIJepaForImageClassification
        )
        yield module.IJEPA


@pytest.fixture
def stock(request, example):
    """A tiny stock classifier of each family, the example's included."""
    if request.param != "example":
        return randomized(tiny_model(request.param))
    config = IJepaConfig(
        hidden_size=40,
        num_hidden_layers=3,
        num_attention_heads=5,
        intermediate_size=72,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return randomized(IJepaForImageClassification(config))


every_family = pytest.mark.parametrize("stock", MODELS, indirect=True)


@every_family
def test_a_copy_computes_what_the_stock_model_computes(stock):
    assert_copy(stock)
    assert_costs(stock)
    assert count_macs(stock) == count_macs(stock.config)


@every_family
@pytest.mark.parametrize("what", KINDS)
def test_masked_units_act_as_if_they_were_not_there(stock, what):
    for seed in range(3):
        assert_masks(stock, what, seed)


@every_family
def test_the_equivalent_basis_computes_the_same(stock):
    assert_basis(stock)


@every_family
def test_a_search_ends_under_its_budget_and_loads_again(stock, tmp_path):
    assert_search(stock, tmp_path)


@pytest.mark.parametrize("stock", ["example"], indirect=True)
def test_a_family_without_token_reductions_is_refused_with_an_explanation(stock):
    with pytest.raises(UnsupportedArchitectureError, match=r"IJepaConfig.*class token"):
        require_class_token(stock.config)
    with pytest.raises(UnsupportedArchitectureError, match=r"token_schedule.*ijepa.*vit"):
        count_macs(stock, SubnetSpec({}, [[9, 9]] * 3))


def test_a_listed_family_comes_with_the_package(tmp_path):
    """In a process of its own: the lists of this one have been read already."""
    files = []
    for number, block in enumerate(page_blocks()):
        file = tmp_path / f"block{number}.py"
        file.write_text(block, encoding="utf-8")
        files.append(str(file))
    package = Path(ofb_hf.__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    process = subprocess.run(
        [sys.executable, "-c", LISTED, str(package), *files],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
