"""Symmetric InfoNCE: value against a written-out sum, gradients of the chunked form, numeric range, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from frozen_fast.errors import UserError
from frozen_fast.losses import contrastive_loss, gathered_contrastive_loss


def draw(clips: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video, text = torch.randn(2, clips, width, generator=generator, dtype=torch.float64).to(dtype)
    return video.requires_grad_(), text.requires_grad_()


def written_out(video: Tensor, text: Tensor, temperature: float) -> float:
    """Equations 1 and 2 of the paper, one scalar at a time."""

    def unit(row: list[float]) -> list[float]:
        length = math.sqrt(sum(x * x for x in row))
        return [x / length for x in row]

    videos, texts = [unit(r) for r in video.tolist()], [unit(r) for r in text.tolist()]
    sim = [[math.exp(sum(a * b for a, b in zip(v, t, strict=True)) / temperature) for t in texts] for v in videos]
    clips = range(len(sim))
    video_to_text = -sum(math.log(sim[i][i] / sum(sim[i][j] for j in clips)) for i in clips) / len(sim)
    text_to_video = -sum(math.log(sim[i][i] / sum(sim[j][i] for j in clips)) for i in clips) / len(sim)
    return video_to_text + text_to_video


@pytest.mark.parametrize(("clips", "width", "temperature"), [(1, 3, 0.05), (2, 1, 0.5), (7, 5, 0.05), (16, 8, 1.0)])
def test_value_is_the_sum_of_both_directions(clips: int, width: int, temperature: float) -> None:
    video, text = draw(clips, width)
    assert contrastive_loss(video, text, temperature).item() == pytest.approx(
        written_out(video, text, temperature), abs=1e-9
    )


def test_default_temperature_is_the_papers() -> None:
    video, text = draw(6, 4)
    assert contrastive_loss(video, text).item() == pytest.approx(written_out(video, text, 0.05), abs=1e-9)


def test_embeddings_are_normalised_inside() -> None:
    video, text = draw(6, 4)
    scaled = contrastive_loss(video * 37.0, text * 0.01)
    torch.testing.assert_close(scaled, contrastive_loss(video, text))


def test_collapsed_embeddings_give_twice_log_b() -> None:
    same = torch.ones(8, 4)
    assert contrastive_loss(same, same).item() == pytest.approx(2 * math.log(8), rel=1e-6)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("chunk_rows", [0, 1, 3, 8, 11, 100])
def test_gathered_form_equals_plain_form_on_one_process(local: bool, chunk_rows: int) -> None:
    video, text = draw(11, 6)
    plain = contrastive_loss(video, text, 0.05)
    expected = torch.autograd.grad(plain, (video, text))
    loss, value = gathered_contrastive_loss(video, text, 0.05, local=local, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, plain.detach(), rtol=1e-12, atol=1e-12)
    assert not value.requires_grad
    for got, want in zip(torch.autograd.grad(loss, (video, text)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    video, text = draw(5, 3)
    assert torch.autograd.gradcheck(lambda v, t: contrastive_loss(v, t, 0.3), (video, text))
    assert torch.autograd.gradcheck(lambda v, t: gathered_contrastive_loss(v, t, 0.3, chunk_rows=2)[0], (video, text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_input_is_computed_in_fp32_under_autocast(dtype: torch.dtype) -> None:
    video, text = draw(12, 16, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = contrastive_loss(video, text)
        gathered, _ = gathered_contrastive_loss(video, text, chunk_rows=5)
    assert plain.dtype == gathered.dtype == torch.float32
    expected = contrastive_loss(video.detach().double(), text.detach().double())
    for loss in (plain, gathered):
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    gathered.backward()
    assert video.grad is not None and video.grad.dtype == dtype


def test_chunks_keep_no_logits_for_the_backward_pass() -> None:
    clips, chunk_rows = 64, 4
    video, text = draw(clips, 8)
    sizes: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        gathered_contrastive_loss(video, text, chunk_rows=0)
        at_once, sizes = max(sizes), []
        gathered_contrastive_loss(video, text, chunk_rows=chunk_rows)
    assert at_once >= clips * clips
    assert max(sizes, default=0) <= clips * 16  # newer versions of PyTorch keep nothing of a recomputed chunk


@pytest.mark.parametrize(
    ("video_shape", "text_shape", "options", "message"),
    [
        ((4, 3), (5, 3), {}, r"\[4, 3\] and \[5, 3\]; allowed: the same \[B, D\]"),
        ((4, 3), (4, 2), {}, r"\[4, 3\] and \[4, 2\]"),
        ((0, 3), (0, 3), {}, r"\[0, 3\] and \[0, 3\]"),
        ((4,), (4,), {}, r"\[4\] and \[4\]"),
        ((4, 3), (4, 3), {"temperature": 0.0}, r"loss.temperature: got 0.0; allowed: above 0"),
        ((4, 3), (4, 3), {"temperature": float("nan")}, r"loss.temperature: got nan"),
    ],
)
def test_mistakes_are_named(video_shape: tuple, text_shape: tuple, options: dict, message: str) -> None:
    for loss in (contrastive_loss, gathered_contrastive_loss):
        with pytest.raises(UserError, match=message):
            loss(torch.ones(video_shape), torch.ones(text_shape), **options)


def test_negative_chunk_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss.chunk_rows: got -1; allowed: 0 or more"):
        gathered_contrastive_loss(torch.ones(2, 2), torch.ones(2, 2), chunk_rows=-1)
