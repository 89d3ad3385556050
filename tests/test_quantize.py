"""int8 computation against float32 with the same weights."""

import copy

import pytest
import torch
from helpers.tiny_models import perturb, random_batch, tiny_ar, tiny_nar
from torch import nn

from valle.model.config import ARConfig
from valle.model.quantize import Int8Linear, convert, from_int8, to_int8
from valle.serve.app_args import AppArgs


@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_equals_the_dequantized_float_layer(bias: bool) -> None:
    """Within the bf16 rounding of inputs and products."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 100, bias=bias)
    x = torch.randn(2, 7, 256)
    with torch.inference_mode():
        exact = copy.deepcopy(layer)
        exact.weight.copy_(from_int8(to_int8({"weight": layer.weight}))["weight"])
        expected, output = exact(x), Int8Linear(layer)(x)
    error = (output - expected).norm() / expected.norm()
    assert 0 < error < 0.005
    assert output.shape == expected.shape and output.dtype == torch.float32


def test_convert_to_int8_changes_the_ar_model_little_and_the_nar_model_to_bf16() -> None:
    ar = tiny_ar(config=ARConfig(width=64, n_heads=2, n_layers=3, dropout=0.0))
    perturb(ar, 0.1)
    batch = random_batch(30, 40)
    with torch.inference_mode():
        expected = ar(batch).log_softmax(-1)
        quantized = convert(copy.deepcopy(ar), "int8")(batch).log_softmax(-1)
    assert 0 < (quantized - expected).abs().mean() < 0.02
    assert {p.dtype for p in convert(tiny_nar(), "int8").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{"use_gpu": True}, {"compiled": True}])
def test_app_args_refuse_int8_on_gpu_or_compiled(options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="precision: int8 is for CPUs"):
        AppArgs.model_validate({"precision": "int8", **options})
