"""For tests of the GPU's arithmetic: which device, how large, and what 16-bit numbers can be blamed for.

Roundoff u: a number is rounded by at most u of its size, 2^-8 in bfloat16 and 2^-11 in float16, so by at most u / √3 in the
mean square. Independent roundings add up in the mean square.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

REHEARSES = os.environ.get("DISTILL_REHEARSE") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not REHEARSES else "cpu")
WIDENS = DEVICE.type == "cuda"
"""Whether 16-bit factors give float32 products; else they are rounded to 16 bits."""
NARROW = [torch.bfloat16, torch.float16]
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cpu" and not REHEARSES, reason="needs a CUDA device; DISTILL_REHEARSE=1 rehearses on the CPU"),
]
Value = TypeVar("Value")


def pick(on_gpu: Value, rehearsed: Value) -> Value:
    """The size for this device."""
    return on_gpu if DEVICE.type == "cuda" else rehearsed


def dtype_id(value: object) -> str | None:
    """`bfloat16` for torch.bfloat16."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(scope="module")
def accelerated() -> Iterator[None]:
    """Commands of this process use the device, where the other tests keep them on the CPU."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cuda":
            patch.delenv("ACCELERATE_USE_CPU", raising=False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def roundoff(dtype: torch.dtype) -> float:
    """u, the largest relative error of rounding to a type."""
    return torch.finfo(dtype).eps / 2


def relative(found: Tensor, expected: Tensor) -> float:
    """Error relative to the norm."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def logit_error(dtype: torch.dtype, layers: int, spread: float) -> float:
    """Error of a logit in the mean square, in nats, by what a forward of 16-bit tensors rounds.

    A layer rounds some twelve times (two norms, query, key, value and the norms of two of them, rotations, attention, its
    output, gate, up, their product, down, two sums), and the embedding and the last norm once each. The bound takes each for
    an independent error of the whole residual stream; in truth a block's own is one of its share of the stream.

    Args:
        dtype: Of the tensors.
        layers: Of the model.
        spread: Standard deviation of the logits at a position, which turns an error of the hidden state into one of logits.
    """
    return math.sqrt(12 * layers + 2) * roundoff(dtype) / math.sqrt(3) * spread


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A copy with weights of another type; the rotary frequencies stay what they are, as in a model that was loaded."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


@torch.no_grad()
def sharpen(model: Any, ids_BT: Tensor, nats: float) -> None:
    """Scales the last norm until the mean entropy is that of a language model; a random one is nearly uniform."""
    logits_nV = model(ids_BT).logits.flatten(0, 1).float()
    low, high = 1e-3, 1e3
    for _ in range(30):
        factor = math.sqrt(low * high)
        log_p_nV = (factor * logits_nV).log_softmax(-1)
        entropy = float(-(log_p_nV.exp() * log_p_nV).sum(-1).mean())
        low, high = (factor, high) if entropy > nats else (low, factor)
    model.model.norm.weight *= low
