"""NdLinear and its MLP against their definitions."""

import math

import pytest
import torch
from harness import ND, tiny_model
from torch import Tensor, nn

from neogpt.model import GPT, SIZES, GPTConfig
from neogpt.ndlinear import NdLinear


def algorithm_1(layer: NdLinear, x: Tensor) -> Tensor:
    """The paper's algorithm, literally: bring each mode to the end, flatten, multiply, bring it back."""
    n = len(layer.modes)
    for i, linear in enumerate(layer.modes, 1):
        x = x.transpose(i, n)
        shape = x.shape[:-1]
        flat = x.reshape(-1, x.size(-1))
        y = flat @ linear.weight.T + linear.bias
        x = y.reshape(*shape, -1).transpose(i, n)
    return x


@pytest.mark.parametrize("d, h", [((5,), (7,)), ((3, 4), (5, 2)), ((2, 3, 4), (4, 3, 2)), ((2, 3, 2, 3), (3, 2, 4, 2))])
def test_ndlinear_equals_the_papers_algorithm(d: tuple[int, ...], h: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = NdLinear(d, h), torch.randn(6, *d)
    torch.testing.assert_close(layer(x), algorithm_1(layer, x), rtol=0, atol=1e-6)
    assert layer(x).shape == (6, *h)


def test_mlp_equals_its_literal_order() -> None:
    mlp = tiny_model(3, **ND).transformer.h[0].mlp
    for p in mlp.parameters():  # biases too, which are initialized to 0
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 16)
    literal = mlp.c_proj(nn.functional.gelu(mlp.c_fc(x[..., None]), approximate="tanh"))[..., 0]
    torch.testing.assert_close(mlp(x), literal, rtol=0, atol=1e-6 * literal.abs().max().item())


@pytest.mark.parametrize("size", ["demo", "gpt2"])
def test_initial_output_is_as_large_as_the_dense_mlps(size: str) -> None:
    torch.manual_seed(4)
    shape = SIZES[size] | dict(n_layer=1)  # one block is enough
    nd = shape | dict(mlp="ndlinear", mlp_width=2 * shape["n_embd"], mlp_modes=2)
    x = torch.randn(64, shape["n_embd"])
    dense, ours = (GPT(GPTConfig(**s)).transformer.h[0].mlp(x).std().item() for s in (shape, nd))
    assert 0.5 * dense / math.sqrt(2) < ours < 2 * dense / math.sqrt(2)  # half the width: 1/√2


def test_every_parameter_has_a_gradient() -> None:
    raw, idx = tiny_model(6, **ND), torch.randint(257, (4, 33))
    raw(idx[:, :-1], idx[:, 1:]).backward()
    assert [name for name, p in raw.named_parameters() if not p.grad.any()] == []
    w = raw.transformer.h[0].mlp.c_fc.modes[1].weight
    assert len(set(w.flatten().tolist())) == len(set(w.grad.flatten().tolist())) == 3  # the modes differ


@pytest.mark.parametrize("changed", [dict(mlp="nd"), dict(mlp_modes=0), dict(mlp_width=-1), dict(mlp_width=1.5)])
def test_invalid_shapes_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed))):
        tiny_model(**ND | changed)
    with pytest.raises(ValueError):  # a mode is missing
        NdLinear((2, 3), (4,))
