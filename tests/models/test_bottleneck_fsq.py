from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.config import BottleneckConfig, fsq_levels
from cola_dist.models.bottleneck.fsq import FiniteScalarQuantiser


def transparent(codes: int) -> FiniteScalarQuantiser:
    """A quantiser that passes its d scalars in and out as they are."""
    d = len(fsq_levels(codes))
    quantiser = FiniteScalarQuantiser(BottleneckConfig(kind="fsq", codes=codes, dim=d))
    with torch.no_grad():
        for layer in (quantiser.down, quantiser.up):
            layer.weight.copy_(torch.eye(d))
            layer.bias.zero_()
    return quantiser


def inputs_for(quantiser: FiniteScalarQuantiser, integers: torch.Tensor) -> torch.Tensor:
    """Scalars that are bounded to ``integers [..., d]``, or to just inside the border that rounds to them."""
    levels = quantiser.levels
    reach = (levels - 1) * (1 - 1e-3) / 2
    offset = 0.5 * (levels % 2 == 0)
    return torch.atanh(((integers + offset) / reach).clamp(-0.99999, 0.99999)) - torch.atanh(offset / reach)


@pytest.mark.parametrize(
    ("codes", "levels"),
    [(3, (3,)), (8, (8,)), (16, (4, 4)), (32, (8, 4)), (144, (6, 6, 4)), (240, (8, 6, 5)), (1000, (8, 5, 5, 5)), (4375, (7, 5, 5, 5, 5))],
)
def test_levels(codes: int, levels: tuple[int, ...]) -> None:
    assert fsq_levels(codes) == levels


@pytest.mark.parametrize("codes", [1, 2, 10, 11, 22, 34, 26 * 8])
def test_what_has_no_such_product_has_no_levels(codes: int) -> None:
    assert fsq_levels(codes) == ()


@given(st.lists(st.integers(3, 8), min_size=1, max_size=6))
def test_levels_are_the_fewest_factors(factors: list[int]) -> None:
    levels = fsq_levels(math.prod(factors))
    assert math.prod(levels) == math.prod(factors)
    assert len(levels) <= len(factors)
    assert all(3 <= level <= 8 for level in levels)
    assert list(levels) == sorted(levels, reverse=True)


def test_a_known_case_of_odd_and_even_levels() -> None:
    quantiser = transparent(15)
    out = quantiser(torch.tensor([[[[0.0, 0.0]], [[10.0, -10.0]], [[-0.4, 0.1]]]]))
    assert quantiser.levels.tolist() == [5, 3]
    assert out.actions.reshape(3, 2).tolist() == [[0.0, 0.0], [1.0, -1.0], [-0.5, 0.0]]
    assert out.codes.flatten().tolist() == [2 + 5 * 1, 4 + 5 * 0, 1 + 5 * 1]
    even = transparent(4)(torch.tensor([-10.0, -0.8, 0.0, 10.0]).reshape(1, 4, 1, 1))
    assert even.codes.flatten().tolist() == [0, 1, 2, 3]
    assert even.actions.flatten().tolist() == [-1.0, -0.5, 0.0, 0.5]
    assert [value.item() for value in out[2:]] == [0, 0, 0, 0]


@settings(deadline=None, max_examples=12)
@given(codes=st.sampled_from([3, 4, 7, 8, 15, 32, 60, 240, 343]))
def test_codes_and_values_are_the_same_grid_and_a_value_keeps_its_code(codes: int) -> None:
    quantiser = transparent(codes)
    levels = quantiser.levels.tolist()
    grid = torch.cartesian_prod(*(torch.arange(level) - level // 2 for level in levels)).reshape(codes, len(levels))
    out = quantiser(inputs_for(quantiser, grid)[:, None, None])
    assert sorted(out.codes.flatten().tolist()) == list(range(codes))
    assert len(out.actions.detach().reshape(codes, -1).unique(dim=0)) == codes
    torch.testing.assert_close(out.actions.detach().reshape(codes, -1), grid / (quantiser.levels // 2))
    again = quantiser(inputs_for(quantiser, out.actions.detach() * (quantiser.levels // 2)))
    assert torch.equal(again.codes, out.codes)
    assert torch.equal(again.actions, out.actions)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_the_nearest_grid_point_and_a_gradient_as_if_it_were_not_rounded(seed: int) -> None:
    torch.manual_seed(seed)
    quantiser = FiniteScalarQuantiser(BottleneckConfig(kind="fsq", codes=60, dim=6))
    z = (3 * torch.randn(2, 3, 2, 6)).requires_grad_()
    out = quantiser(z)
    smooth = quantiser._bounded(quantiser.down(z))
    half = quantiser.levels // 2
    torch.testing.assert_close(out.actions, quantiser.up(smooth.round() / half))
    upstream = torch.randn(2, 3, 2, 6)
    got, expected = (torch.autograd.grad(value, z, upstream, retain_graph=True)[0] for value in (out.actions, quantiser.up(smooth / half)))
    torch.testing.assert_close(got, expected)


def test_a_quantiser_is_not_built_for_codes_that_are_no_grid() -> None:
    with pytest.raises(AssertionError, match="settings refuse 22 codes"):
        FiniteScalarQuantiser(BottleneckConfig(kind="fsq", codes=22))
