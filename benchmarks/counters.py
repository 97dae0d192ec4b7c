"""Compare `count_macs` with general counters of PyTorch models.

    pip install --no-deps --target counters fvcore iopath yacs portalocker termcolor tabulate \\
        thop ptflops calflops
    PYTHONPATH=counters python benchmarks/counters.py

Counted is one image of 224 pixels, with random weights. Every counter runs in a process of its own,
because some of them replace functions of PyTorch; one that is not installed is left out. Printed is
by how much its count differs from `count_macs`, or for single attentions from the arithmetic of
their definition; a counter that reports FLOPs is divided by two.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import io
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from ofb_hf import OFBViTForImageClassification, count_macs
from ofb_hf.models.shapes import SHAPES
from ofb_hf.tokens import published_schedule

TOKENS, WIDTH, HEADS, CHANNELS = 197, 192, 3, 64  # of an attention of DeiT-T


class Attention(nn.Module):
    """An attention whose values may be narrower than its queries.

    Args:
        value_channels: of each head.
    """

    def __init__(self, value_channels: int):
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * CHANNELS)
        self.key = nn.Linear(WIDTH, HEADS * CHANNELS)
        self.value = nn.Linear(WIDTH, HEADS * value_channels)
        in_layers = TOKENS * WIDTH * HEADS * (2 * CHANNELS + value_channels)
        self.macs = in_layers + TOKENS**2 * HEADS * (CHANNELS + value_channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (B, heads, N, value channels) for tokens (B, N, width)."""
        heads = [
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, heads, N, channels)
            for layer in (self.query, self.key, self.value)
        ]
        return F.scaled_dot_product_attention(*heads)


def classifier(shape: str, attention: str) -> nn.Module:
    """Return a classifier of a named shape with an implementation of attention."""
    config = SHAPES[shape].config([str(label) for label in range(1000)])
    return AutoModelForImageClassification.from_config(config, attn_implementation=attention)


def scheduled() -> nn.Module:
    """Return a DeiT-T with a published token schedule."""
    dense = classifier("deit_tiny", "sdpa")
    return OFBViTForImageClassification.from_dense(dense, published_schedule(dense.config, 0.8))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "DeiT-T, SDPA": lambda: classifier("deit_tiny", "sdpa"),
    "DeiT-T, eager": lambda: classifier("deit_tiny", "eager"),
    "DeiT-T, tokens": scheduled,
    "Swin-T, SDPA": lambda: classifier("swin_tiny", "sdpa"),
    "attention": lambda: Attention(CHANNELS),
    "narrow values": lambda: Attention(CHANNELS // 2),
}


def by_torch(model: nn.Module, inputs: Tensor) -> float:
    """Count with `torch.utils.flop_counter`."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops() / 2


def by_fvcore(model: nn.Module, inputs: Tensor) -> float:
    """Count with fvcore, whose "flop" is a MAC."""
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(model, inputs).total()


def by_thop(model: nn.Module, inputs: Tensor) -> float:
    """Count with thop."""
    from thop import profile

    return profile(copy.deepcopy(model), (inputs,), verbose=False)[0]


def by_ptflops(model: nn.Module, inputs: Tensor) -> float:
    """Count with the default backend of ptflops."""
    from ptflops import get_model_complexity_info

    settings = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    return get_model_complexity_info(model, tuple(inputs.shape[1:]), **settings)[0]


def by_calflops(model: nn.Module, inputs: Tensor) -> float:
    """Count with calflops."""
    from calflops import calculate_flops

    settings = {"output_as_string": False, "print_results": False, "print_detailed": False}
    return calculate_flops(model, args=[inputs], **settings)[1]


# Name of the distribution -> how it counts MACs.
COUNTERS = {
    "torch": by_torch,
    "fvcore": by_fvcore,
    "thop": by_thop,
    "ptflops": by_ptflops,
    "calflops": by_calflops,
}


def difference(counter: str, name: str) -> float:
    """Return by how much a counter differs for a model, in percent."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    is_classifier = not isinstance(model, Attention)
    expected = count_macs(model) if is_classifier else model.macs
    inputs = torch.zeros((1, 3, 224, 224) if is_classifier else (1, TOKENS, WIDTH))
    # they print whatever their settings say
    with contextlib.redirect_stdout(io.StringIO()):
        counted = COUNTERS[counter](model, inputs)
    return 100 * counted / expected - 100


def main() -> None:
    """Count and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=2, metavar=("COUNTER", "MODEL"), help="count this one only")
    one = parser.parse_args().one
    if one:
        print(json.dumps(difference(*one)))
        return
    print(" " * 24 + "".join(f"{name:>18}" for name in MODELS))
    for counter in COUNTERS:
        try:
            version = importlib.metadata.version(counter)
        except importlib.metadata.PackageNotFoundError:
            print(f"{counter:24}not installed")
            continue
        cells = []
        for name in MODELS:
            words = [sys.executable, __file__, "--one", counter, name]
            done = subprocess.run(words, capture_output=True, text=True)
            lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
            cells.append(lines[-1][:16] if done.returncode else f"{float(lines[-1]):+.1f} %")
        print(f"{counter + ' ' + version:24}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
