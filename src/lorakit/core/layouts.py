"""How a layer stores its weight, so that methods see one matrix W (out, in) whatever the layer is.

A layout also knows the two halves of a low-rank product in the layer's own terms: `project` maps the layer's input to
R channels, `lift` maps R channels to the layer's output.

Legend: B batch, I in, O out, R rank, V rows of an embedding, K kernel height x width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lorakit.core.quantised import QuantisedLinear


@dataclass(frozen=True)
class Layout(ABC):
    """What a method may know of a layer: its two widths and how its weight maps to W (out, in)."""

    in_features: int
    out_features: int

    lookup = False  # True where the input is token ids, not numbers

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """View the stored weight as W (out, in)."""

    @abstractmethod
    def stored(self, w_OI: Tensor, like: Tensor) -> Tensor:
        """Give W (out, in) the shape in which the layer stores it (that of `like`)."""

    @abstractmethod
    def project(self, x: Tensor, a_RI: Tensor) -> Tensor:
        """Apply A to the layer's input."""

    @abstractmethod
    def lift(self, low: Tensor, b_OR: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Apply B to R channels, and add a bias; the result has the shape of the layer's output."""

    def along_output(self, bias_O: Tensor) -> Tensor:
        """Shape a vector so that it adds to the layer's output."""
        return bias_O


@dataclass(frozen=True)
class LinearLayout(Layout):
    """`nn.Linear`: the weight is stored as (out, in)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight

    def stored(self, w_OI: Tensor, like: Tensor) -> Tensor:
        return w_OI

    def project(self, x: Tensor, a_RI: Tensor) -> Tensor:
        return F.linear(x, a_RI)

    def lift(self, low: Tensor, b_OR: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(low, b_OR, bias_O)


@dataclass(frozen=True)
class Conv1DLayout(LinearLayout):
    """GPT-2's `Conv1D`: a linear layer whose weight is stored as (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, w_OI: Tensor, like: Tensor) -> Tensor:
        return w_OI.T.contiguous()


@dataclass(frozen=True)
class EmbeddingLayout(Layout):
    """`nn.Embedding`: rows of (V, out); as a matrix, in = V and the input is one-hot."""

    lookup = True

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, w_OI: Tensor, like: Tensor) -> Tensor:
        return w_OI.T.contiguous()

    def project(self, x: Tensor, a_RI: Tensor) -> Tensor:
        return F.embedding(x, a_RI.T)

    def lift(self, low: Tensor, b_OR: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.linear(low, b_OR, bias_O)


@dataclass(frozen=True)
class Conv2dLayout(Layout):
    """`nn.Conv2d` without groups: A is a convolution of the layer's own geometry, B is 1 x 1."""

    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    padding_mode: str
    border: tuple[int, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, w_OI: Tensor, like: Tensor) -> Tensor:
        return w_OI.reshape(like.shape)

    def project(self, x: Tensor, a_RI: Tensor) -> Tensor:
        kernel = a_RI.reshape(-1, self.channels, *self.kernel)
        if self.padding_mode == "zeros":
            return F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation)
        return F.conv2d(F.pad(x, self.border, mode=self.padding_mode), kernel, None, self.stride, 0, self.dilation)

    def lift(self, low: Tensor, b_OR: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return F.conv2d(low, b_OR[:, :, None, None], bias_O)

    def along_output(self, bias_O: Tensor) -> Tensor:
        return bias_O[:, None, None]


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a layer, or None where lorakit knows none.

    A subclass with a forward of its own (quantised, scaled), and a layer whose weight is a tensor with products of its
    own, are not taken for their parent: acting on them by its formula would be silently wrong. lorakit's own quantised
    layers have the layout of those that they stand for.

    >>> layout_of(nn.Linear(3, 5))
    LinearLayout(in_features=3, out_features=5)
    """
    forward = type(module).forward
    if isinstance(module, QuantisedLinear):
        kind = Conv1DLayout if module.transposed else LinearLayout
        return kind(module.in_features, module.out_features)
    if _has_strange_weight(module):
        return None
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return LinearLayout(module.in_features, module.out_features)
    if isinstance(module, nn.Embedding) and forward is nn.Embedding.forward:
        return EmbeddingLayout(module.num_embeddings, module.embedding_dim)
    if isinstance(module, nn.Conv2d) and forward is nn.Conv2d.forward and module.groups == 1:
        return _conv2d(module)
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        weight = module.get_parameter("weight")
        return Conv1DLayout(weight.shape[0], weight.shape[1])
    return None


def kind_of(module: nn.Module) -> str:
    """What a module is, for a message; of a layer that another library quantised, what can be done about it.

    >>> kind_of(nn.Linear(3, 5))
    'Linear'
    """
    kind = type(module)
    if kind.__module__.startswith("bitsandbytes."):
        return f"{kind.__name__} of bitsandbytes (lorakit.models.adopt(model) takes its codes over)"
    strange = _has_strange_weight(module)
    return f"{kind.__name__} with a weight of the type {type(module.weight).__name__}" if strange else kind.__name__


def _has_strange_weight(module: nn.Module) -> bool:
    """Whether a weight decides itself what a product with it is; PyTorch's own (a shard) are no strangers."""
    weight = module._parameters.get("weight")
    return is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith("torch.")


def _conv2d(module: nn.Conv2d) -> Conv2dLayout:
    (height, width), padding = module.kernel_size, module.padding
    return Conv2dLayout(
        in_features=module.in_channels * height * width,
        out_features=module.out_channels,
        channels=module.in_channels,
        kernel=(height, width),
        stride=(module.stride[0], module.stride[1]),
        padding=padding if isinstance(padding, str) else (padding[0], padding[1]),
        dilation=(module.dilation[0], module.dilation[1]),
        padding_mode=module.padding_mode,
        border=tuple(module._reversed_padding_repeated_twice),
    )
