"""The CLS row alone, from a query and keys and values projected apart."""

from __future__ import annotations

import pytest
import torch

from frozen_kernels import cls_attention
from support.attention_cases import exact, make_case


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_it_is_the_first_row_of_divided_attention(dtype, error):
    qkv, grad = make_case(2, 3, 7, 3, 16)
    qkv = qkv.to(dtype)
    grad[:, 1:] = 0
    truth = exact(qkv, grad, 3, "space")
    query, kv = qkv[:, :1, 0].clone().requires_grad_(), qkv[:, :, 1:].clone().requires_grad_()
    out = cls_attention(query, kv)
    assert out.shape == (2, 1, 48) and out.dtype == dtype
    out.backward(grad[:, :1].to(dtype))
    found = {"out": out, "query": query.grad, "key": kv.grad[:, :, 0], "value": kv.grad[:, :, 1]}
    expected = {**truth, "out": truth["out"][:, :1], "query": truth["query"][:, :1]}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=error)
