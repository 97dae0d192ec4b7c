"""Which equivalent bases a family allows: where a network may be rotated without changing it.

Heads: queries and keys of a head meet in a product, values and the output projection in another, so
any invertible map may stand between them. A residual stream: any rotation may act on it that keeps
the mean over channels, if every norm only reads it. A family says which of these it allows, in the
terms of this file; `pruning.equivalent_basis` does the mathematics.
"""

from dataclasses import dataclass

# Why the last stream of a network without a head keeps its basis.
WITHOUT_HEAD = "the model has no classification head, so its channels are what the model gives out"


@dataclass(frozen=True)
class HeadBasis:
    """An attention whose heads may change their basis.

    Args:
        name: of the submodule.
        module: path of the attention, which calls the four layers.
        num_heads, head_dim: its current size.
        queries, keys, values, output: module paths of its four linear layers.
    """

    name: str
    module: str
    num_heads: int
    head_dim: int
    queries: str
    keys: str
    values: str
    output: str


@dataclass(frozen=True)
class NormReaders:
    """A LayerNorm over a residual stream and the linear layers that read it.

    Args:
        norm: its module path.
        readers: module paths of the linear layers; nothing but these reads the norm.
        tiles: how many tokens it normalizes side by side (4 in Swin's patch merging). Their means
            over channels are then part of what it computes.
        padded: whether zeros may be appended to its output before the readers see it (Swin's
            windows). The readers' biases act on these zeros, so the norm's shift cannot move there.
    """

    norm: str
    readers: tuple[str, ...]
    tiles: int = 1
    padded: bool = False


@dataclass(frozen=True)
class StreamBasis:
    """A residual stream that may be rotated.

    Args:
        name: of the submodule that owns its channels.
        writers: module paths of the linear and convolution layers that add to it.
        tensors: parameters that are added to it, channels last.
        norms: every norm that reads it, with its readers.
    """

    name: str
    writers: tuple[str, ...]
    tensors: tuple[str, ...]
    norms: tuple[NormReaders, ...]


@dataclass(frozen=True)
class Bases:
    """What may change its basis in one model.

    Args:
        heads: the attentions.
        streams: the residual streams.
        fixed: submodule -> why its stream has to keep its basis.
    """

    heads: tuple[HeadBasis, ...]
    streams: tuple[StreamBasis, ...]
    fixed: dict[str, str]
