"""Collaborative Experts and its ablations against plain loops over the equations, and the released parameter counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frozen_fast.errors import UserError
from frozen_fast.evaluation import retrieval_metrics
from frozen_fast.models.experts.batch_norm import BatchNorm
from frozen_fast.models.experts.expert_model import CollaborativeExperts, ConcatenatedExperts, MixtureOfExperts
from frozen_fast.models.experts.expert_set import Expert, ExpertSizes, in_alphabetical_order
from support.expert_models import (
    AVERAGED_WIDTHS,
    VLAD_WIDTHS,
    PlainExpertModel,
    random_tokens,
    random_videos,
    write_upstream_checkpoint,
)

EXPERTS = {"audio": (5, 3), "face": (6, 0), "ocr": (4, 2), "scene.densenet161.0": (7, 0)}
TEXT = (6, 4, 1)
KIND = {"ce": CollaborativeExperts, "no_gating": CollaborativeExperts, "moee": MixtureOfExperts}


def plain_and_ours(design: str, folder: Path, *, uniform: bool = False, zip_layout: bool = False, **options):
    torch.manual_seed(3)
    plain = PlainExpertModel(design, EXPERTS, text=TEXT, uniform=uniform).randomise(5)
    path = write_upstream_checkpoint(folder / "trained_model.pth", plain, zip_layout=zip_layout)
    return plain, KIND.get(design, ConcatenatedExperts).from_pretrained(path, **options)


@pytest.mark.parametrize("design", ["ce", "no_gating", "moee", "concat"])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("zip_layout", [False, True])
def test_similarities_are_those_of_the_equations(design: str, uniform: bool, zip_layout: bool, tmp_path: Path) -> None:
    plain, ours = plain_and_ours(design, tmp_path, uniform=uniform, zip_layout=zip_layout)
    tokens = random_tokens(9, TEXT[0], 1)
    video = random_videos(EXPERTS, 6, 2)
    assert any(bool(torch.isnan(x).any()) for x in video.values())
    with torch.no_grad():
        want = plain.eval()(tokens, video)
        got = ours.similarity({"tokens": tokens}, dict(reversed(video.items())))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert want.std() > 0.02


@pytest.mark.parametrize("design", ["ce", "no_gating", "moee"])
def test_training_mode_gives_the_same_values_gradients_and_statistics(design: str, tmp_path: Path) -> None:
    plain, ours = plain_and_ours(design, tmp_path)
    plain, ours = plain.double().train(), ours.double().train()
    tokens = random_tokens(9, TEXT[0], 1).double()
    video = {name: x.double() for name, x in random_videos(EXPERTS, 6, 2).items()}
    weights = torch.randn(9, 6, dtype=torch.float64)
    plain_sims = plain(tokens, video)
    our_sims = ours.similarity({"tokens": tokens}, video)
    torch.testing.assert_close(our_sims.double(), plain_sims.double(), rtol=0, atol=1e-6)
    (weights * plain_sims).sum().backward()
    (weights * our_sims).sum().backward()
    text_gradient = torch.cat([unit.fc.weight.grad for unit in plain.ce.text_GU])
    torch.testing.assert_close(ours.text_linear.weight.grad, text_gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        ours.pooling["audio"].clusters.grad, plain.pooling["audio"].clusters.grad, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        ours.text_pooling.batch_norm.running_var, plain.text_pooling.batch_norm.running_var, rtol=1e-6, atol=1e-8
    )
    if design == "ce":
        for index, (norm, linear) in enumerate(((0, 2), (3, 5))):
            theirs = plain.ce.g_reason_shared[norm]
            for part in ("running_mean", "running_var"):
                mine = getattr(ours.video_gate.pair_norms[index], part)
                torch.testing.assert_close(mine, getattr(theirs, part), rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(
                ours.video_gate.shared_linear[index].weight.grad,
                plain.ce.g_reason_shared[linear].weight.grad,
                rtol=1e-4,
                atol=1e-6,
            )
        torch.testing.assert_close(
            ours.video_gate.pair_linear.weight.grad, plain.ce.g_reason_1.weight.grad, rtol=1e-4, atol=1e-6
        )


def test_gating_in_parallel_is_another_model(tmp_path: Path) -> None:
    plain, ours = plain_and_ours("ce", tmp_path, gating="parallel")
    tokens, video = random_tokens(9, TEXT[0], 1), random_videos(EXPERTS, 6, 2)
    with torch.no_grad():
        got = ours.similarity({"tokens": tokens}, video)
        torch.testing.assert_close(got, plain.eval()(tokens, video, parallel=True), rtol=0, atol=2e-6)
        assert (got - plain(tokens, video)).abs().max() > 1e-4


def test_masked_padding_does_not_depend_on_its_length(tmp_path: Path) -> None:
    _, released = plain_and_ours("ce", tmp_path)
    masked = CollaborativeExperts.from_pretrained(tmp_path / "trained_model.pth", mask_padding=True)
    tokens, video = random_tokens(4, TEXT[0], 1), random_videos(EXPERTS, 3, 2, missing=0.0)
    zeros = {name: torch.zeros(3, 4, x.shape[2]) for name, x in video.items() if x.dim() == 3}
    longer = {name: torch.cat([x, zeros[name]], 1) if name in zeros else x for name, x in video.items()}
    with torch.no_grad():
        short, long = (masked.similarity({"tokens": tokens}, x) for x in (video, longer))
        torch.testing.assert_close(short, long, rtol=0, atol=1e-6)
        short, long = (released.similarity({"tokens": tokens}, x) for x in (video, longer))
        assert (short - long).abs().max() > 1e-3


def test_compatible_concatenation_scores_zero_where_the_text_is_longer(tmp_path: Path) -> None:
    wide = {"audio": (5, 3), "face": (6, 0)}
    tokens, video = random_tokens(4, 6, 1), random_videos(wide, 3, 2)
    for text, zero in (((6, 4, 0), True), ((6, 2, 0), False)):
        plain = PlainExpertModel("concat", wide, text=text).eval()
        path = write_upstream_checkpoint(tmp_path / "trained_model.pth", plain)
        with torch.no_grad():
            for compatible in (False, True):
                ours = CollaborativeExperts.from_pretrained(path, compatible=compatible)
                got = ours.similarity({"tokens": tokens}, video)
                want = torch.zeros(4, 3) if compatible and zero else plain(tokens, video)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_video_without_any_expert_scores_zero(tmp_path: Path) -> None:
    _, ours = plain_and_ours("ce", tmp_path)
    video = random_videos(EXPERTS, 3, 2, missing=0.0)
    for x in video.values():
        x[1] = float("nan")
    with torch.no_grad():
        got = ours.similarity({"tokens": random_tokens(4, TEXT[0], 1)}, video)
    assert (got[:, 1] == 0).all() and (got[:, [0, 2]] != 0).all()


def test_a_folder_gives_the_same_model_back(tmp_path: Path) -> None:
    for design in ("ce", "no_gating", "moee", "concat"):
        _, model = plain_and_ours(design, tmp_path)
        model.save_pretrained(tmp_path / design)
        again = type(model).from_pretrained(tmp_path / design)
        assert again.architecture() == model.architecture()
        assert set(again.state_dict()) == set(model.state_dict())
        tokens, video = random_tokens(9, TEXT[0], 1), random_videos(EXPERTS, 6, 2)
        with torch.no_grad():
            torch.testing.assert_close(
                again.similarity({"tokens": tokens}, video), model.similarity({"tokens": tokens}, video), rtol=0, atol=0
            )


def test_names_come_from_the_file_or_from_the_option(tmp_path: Path) -> None:
    plain = PlainExpertModel("ce", EXPERTS, text=TEXT)
    named = CollaborativeExperts.from_pretrained(write_upstream_checkpoint(tmp_path / "named.pth", plain))
    assert named.sizes.names == tuple(EXPERTS)
    path = write_upstream_checkpoint(tmp_path / "nameless.pth", plain, config=False)
    with pytest.raises(UserError, match="experts: got none, nor does the checkpoint contain them; allowed: 4 names"):
        CollaborativeExperts.from_pretrained(path)
    assert CollaborativeExperts.from_pretrained(path, experts=list(EXPERTS)).sizes == named.sizes
    with pytest.raises(UserError, match="experts: got 2 names; allowed: 4"):
        CollaborativeExperts.from_pretrained(path, experts=["audio", "face"])
    with pytest.raises(UserError, match="ocr as number 2.*allowed: the model's order"):
        CollaborativeExperts.from_pretrained(path, experts=["audio", "ocr", "face", "scene.densenet161.0"])


def test_a_checkpoint_of_another_kind_or_with_unknown_weights_is_refused(tmp_path: Path) -> None:
    ce = write_upstream_checkpoint(tmp_path / "ce.pth", PlainExpertModel("ce", EXPERTS, text=TEXT))
    with pytest.raises(UserError, match="kind: got 'moee' for .*ce.pth, which contains a collaborative_experts"):
        MixtureOfExperts.from_pretrained(ce)
    moee = write_upstream_checkpoint(tmp_path / "moee.pth", PlainExpertModel("moee", EXPERTS, text=TEXT))
    assert isinstance(CollaborativeExperts.from_pretrained(moee), MixtureOfExperts)
    extra = {"ce.h_reason.0.weight": torch.zeros(3)}
    path = write_upstream_checkpoint(tmp_path / "more.pth", PlainExpertModel("ce", EXPERTS, text=TEXT), extra=extra)
    with pytest.raises(UserError, match="which has unknown ce.h_reason.0.weight"):
        CollaborativeExperts.from_pretrained(path)
    with pytest.raises(UserError, match="gating: got 'parallel' for a moee; allowed: 'in_order'"):
        MixtureOfExperts.from_pretrained(moee, gating="parallel")
    with pytest.raises(UserError, match="load_model option: got 'expert'"):
        MixtureOfExperts.from_pretrained(moee, expert=["a"])


def test_wrong_inputs_are_named(tmp_path: Path) -> None:
    _, ours = plain_and_ours("ce", tmp_path)
    tokens, video = {"tokens": random_tokens(4, TEXT[0], 1)}, random_videos(EXPERTS, 3, 2)
    with pytest.raises(ValueError, match=r"text: got \[4, 7, 5\]; allowed: {'tokens': \[Q, L, 6\]}"):
        ours.similarity({"tokens": random_tokens(4, 5, 1)}, video)
    with pytest.raises(ValueError, match="text: got list; allowed"):
        ours.similarity(["a dog"], video)
    with pytest.raises(ValueError, match="video: got no expert 'face'"):
        ours.similarity(tokens, {"audio": video["audio"]})
    with pytest.raises(ValueError, match=r"video: got face of shape \[3, 9\]; allowed: \[V, 6\]"):
        ours.similarity(tokens, {**video, "face": torch.zeros(3, 9)})
    with pytest.raises(ValueError, match="video: got 2 videos of face; allowed: 3"):
        ours.similarity(tokens, {**video, "face": torch.zeros(2, 6)})


def test_grouped_batch_norm_is_one_call_per_group() -> None:
    ours, plain = BatchNorm(4), torch.nn.BatchNorm1d(4)
    x = torch.randn(8, 5, 4) * torch.tensor([1.0, 2, 3, 4, 5])[None, :, None]
    want = torch.stack([plain(x[:, group]) for group in range(5)], dim=1)
    torch.testing.assert_close(ours.grouped(x), want)
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    torch.testing.assert_close(ours.eval().grouped(x), torch.stack([plain.eval()(x[:, g]) for g in range(5)], dim=1))


IMAGE = ("imagenet.resnext101_32x48d.0", "imagenet.senet154.0", "scene.densenet161.0")
BASE = (*IMAGE, "face", "i3d.i3d.0", "ocr", "r2p1d.r2p1d-ig65m.0")
REFINED = (*IMAGE, "r2p1d.r2p1d-ig65m-kinetics.0", "r2p1d.r2p1d-ig65m.0")
SOUND = ("audio", "speech")
MSRVTT = {"ocr": 43, "audio": 8, "speech": 19}
MOEE = {"ocr": 20, "audio": 27, "speech": 45}
DIDEMO = {"ocr": 13, "audio": 16, "speech": 55}
LSMDC = {"ocr": 30, "audio": 3, "speech": 5}
ACTIVITYNET = {"ocr": 44, "audio": 6, "speech": 100}


def sizes(names: tuple[str, ...], clusters: dict[str, int], text: tuple[int, int, int], face: int = 512) -> ExpertSizes:
    widths = {**AVERAGED_WIDTHS, **VLAD_WIDTHS, "face": face}
    experts = [Expert(name=name, width=widths[name], clusters=clusters.get(name, 0)) for name in names]
    return ExpertSizes(
        experts=in_alphabetical_order(experts), text_width=text[0], text_clusters=text[1], ghost_clusters=text[2]
    )


FULL = sizes((*BASE, *SOUND), MSRVTT, (768, 28, 1))
COUNTS = [
    ("msrvtt ce", FULL, CollaborativeExperts, {}, 183_448_607),
    ("msrvtt ce 384", FULL, CollaborativeExperts, {"width": 384}, 88_618_655),
    ("msrvtt ce 512", FULL, CollaborativeExperts, {"width": 512}, 119_507_743),
    ("msrvtt ce 640", FULL, CollaborativeExperts, {"width": 640}, 151_117_727),
    ("msrvtt ce 1024", FULL, CollaborativeExperts, {"width": 1024}, 250_273_055),
    ("msrvtt ce - cg", FULL, CollaborativeExperts, {"gating": "none"}, 181_070_111),
    ("msrvtt ce - mw", FULL, CollaborativeExperts, {"mixture": "uniform"}, 183_448_607 - 193_545),
    ("msrvtt ce - mw, p, cg", FULL, MixtureOfExperts, {"mixture": "uniform"}, 246_219_775),
    ("msrvtt moee", sizes((*BASE, *SOUND), MOEE, (768, 50, 2)), MixtureOfExperts, {}, 400_410_129),
    ("msrvtt concat", sizes((*BASE, *SOUND), MSRVTT, (768, 39, 1)), ConcatenatedExperts, {}, 369_717),
    ("msvd ce", sizes(BASE, {"ocr": 75}, (768, 12, 0)), CollaborativeExperts, {}, 84_043_645),
    ("msvd moee", sizes(BASE, {"ocr": 75}, (768, 12, 0)), MixtureOfExperts, {}, 131_374_381),
    ("didemo ce", sizes((*BASE, *SOUND), DIDEMO, (768, 8, 0)), CollaborativeExperts, {}, 79_285_025),
    ("lsmdc ce", sizes((*BASE, *SOUND), LSMDC, (300, 43, 0), face=128), CollaborativeExperts, {}, 116_857_599),
    ("activitynet ce", sizes((*BASE, *SOUND), ACTIVITYNET, (768, 39, 0)), CollaborativeExperts, {}, 260_678_403),
    ("msrvtt ce+", sizes((*REFINED, *SOUND), MSRVTT, (1600, 28, 1)), CollaborativeExperts, {}, 262_731_071),
    ("msvd ce+", sizes(REFINED, {}, (1600, 12, 0)), CollaborativeExperts, {}, 87_791_645),
    ("didemo ce+", sizes((*REFINED, *SOUND), DIDEMO, (1600, 8, 0)), CollaborativeExperts, {}, 99_513_997),
    ("lsmdc ce+", sizes((*REFINED, *SOUND), LSMDC, (1600, 43, 0)), CollaborativeExperts, {}, 388_242_661),
    ("activitynet ce+", sizes((*REFINED, *SOUND), ACTIVITYNET, (1600, 39, 0)), CollaborativeExperts, {}, 376_019_529),
]


@pytest.mark.parametrize(("name", "sizes", "model", "keywords", "count"), COUNTS, ids=[row[0] for row in COUNTS])
def test_released_parameter_counts(name: str, sizes: ExpertSizes, model: type, keywords: dict, count: int) -> None:
    with torch.device("meta"):
        built = model(sizes, **keywords)
    assert sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad) == count


def test_the_released_concatenation_has_the_published_median_ranks() -> None:
    """Constant similarities on MSR-VTT full, 2,990 videos and 59,794 captions: the README's row Concat."""
    captions = [20] * 2984 + [19] * 6
    video_of_query = torch.arange(2990).repeat_interleave(torch.tensor(captions))
    assert len(video_of_query) == 59_794
    constant = torch.zeros(1, dtype=torch.int8).expand(59_794, 2990)
    metrics = retrieval_metrics(constant, video_of_query)
    assert metrics["t2v/MdR"] == 1495.5 and metrics["v2t/MdR"] == 29897.5
