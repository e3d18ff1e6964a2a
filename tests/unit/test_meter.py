"""The meter of benchmarks: operations and memory of what runs in its block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.meter import Meter


def attend(q: Tensor, k: Tensor, v: Tensor) -> None:
    F.scaled_dot_product_attention(q, k, v).sum().backward()


def test_operations_are_those_that_pytorch_counts() -> None:
    layers = nn.Sequential(nn.Linear(8, 16, bias=False), nn.SiLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    with FlopCounterMode(display=False) as wanted:
        layers(x).sum().backward()
    with Meter() as meter:
        layers(x).sum().backward()
    assert meter.flops == wanted.get_total_flops() > 0


def test_operations_count_without_gradients() -> None:
    with torch.inference_mode(), Meter() as meter:
        nn.Linear(8, 16, bias=False)(torch.zeros(5, 8))
    assert meter.flops == 2 * 5 * 8 * 16


def test_fused_attention_counts_as_its_products_with_the_scores_made_again() -> None:
    parts = [torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3)]
    with sdpa_kernel(SDPBackend.MATH), Meter() as written_out:
        attend(*parts)
    with Meter() as fused:
        attend(*parts)
    assert fused.flops == written_out.flops + 2 * 2 * 3 * 16 * 16 * 8


def test_memory_is_that_of_storages_while_they_live() -> None:
    with Meter() as meter:
        a = torch.zeros(100)
        b = a.view(10, 10) + 1  # 100 more; the view takes nothing
        del a
        c = b[:5].clone()
    assert meter.peak == 4 * (100 + 100)
    assert c.shape == (5, 10)


def test_memory_counts_what_was_there_before_from_its_first_use() -> None:
    weight = torch.zeros(1000)
    with Meter() as meter:
        weight.add_(1)
        weight.sum()
    assert meter.peak == 4 * (1000 + 1)


def test_memory_counts_what_is_kept_for_the_backward_pass() -> None:
    x = torch.ones(100, requires_grad=True)
    with Meter() as learning:
        y = x.exp().exp().exp().sum()
    with torch.no_grad(), Meter() as using:
        x.exp().exp().exp().sum()
    assert learning.peak == 4 * (4 * 100 + 1)  # x and three results
    assert using.peak == 4 * 3 * 100  # x and two of them
    assert y.requires_grad
