"""load_model: the kind of a folder, of a released file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import frozen_fast
from frozen_fast.errors import UserError
from frozen_fast.models.experts.expert_model import CollaborativeExperts, MixtureOfExperts
from support.expert_models import PlainExpertModel, random_tokens, random_videos, write_upstream_checkpoint

EXPERTS = {"audio": (5, 3), "face": (6, 0)}
TEXT = (6, 4, 1)


def test_a_released_file_and_our_folder_give_one_model(tmp_path: Path) -> None:
    for kind, design, found in (
        ("collaborative_experts", "ce", CollaborativeExperts),
        ("moee", "moee", MixtureOfExperts),
    ):
        path = write_upstream_checkpoint(tmp_path / "model.pth", PlainExpertModel(design, EXPERTS, text=TEXT))
        model = frozen_fast.load_model(path, kind, experts=list(EXPERTS), compatible=False)
        assert type(model) is found and not model.training
        model.save_pretrained(tmp_path / kind)
        tokens, video = {"tokens": random_tokens(3, 6, 1)}, random_videos(EXPERTS, 2, 2)
        again = frozen_fast.load_model(tmp_path / kind)
        assert torch.equal(again.similarity(tokens, video), model.similarity(tokens, video))


def test_what_is_refused(tmp_path: Path) -> None:
    path = write_upstream_checkpoint(tmp_path / "model.pth", PlainExpertModel("ce", EXPERTS, text=TEXT))
    with pytest.raises(UserError, match="kind: got none for the file .*; allowed: frozen, collaborative_experts"):
        frozen_fast.load_model(path)
    with pytest.raises(UserError, match="kind: got 'colaborative_experts' .did you mean 'collaborative_experts'"):
        frozen_fast.load_model(path, "colaborative_experts")
    frozen_fast.load_model(path, "collaborative_experts").save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match="kind: got 'moee' for .*, which contains a collaborative_experts"):
        frozen_fast.load_model(tmp_path / "folder", "moee")
    with pytest.raises(UserError, match="load_model option: got 'expert'"):
        frozen_fast.load_model(path, "frozen", expert=[])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="config.json cannot be read"):
        frozen_fast.load_model(tmp_path / "empty")


def test_a_folder_of_checkpoints_is_answered_with_their_names(tmp_path: Path) -> None:
    for step in (3, 12):
        (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    with pytest.raises(UserError, match="it contains .*step_00000003, .*step_00000012"):
        frozen_fast.load_model(tmp_path / "run" / "checkpoints")
