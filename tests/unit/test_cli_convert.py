"""frozen-fast convert-checkpoint on a real file of the released form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import frozen_fast
from frozen_fast.cli.main import main
from frozen_fast.errors import UserError
from support.released import ReleasedModel, write_released_checkpoint

TEXT = {"input_ids": torch.tensor([[2, 90, 91, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReleasedModel, Path]:
    torch.manual_seed(0)
    model = ReleasedModel().eval()
    return model, write_released_checkpoint(tmp_path_factory.mktemp("released") / "x.pth.tar", model)


def test_the_folder_gives_the_released_embeddings(
    released: tuple[ReleasedModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, source = released
    folder = tmp_path / "converted"
    assert main(["convert-checkpoint", str(source), str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    model = frozen_fast.DualEncoder.from_pretrained(folder)
    video_BTCHW = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        video_BD, text_BD = plain(video_BTCHW, TEXT)
        torch.testing.assert_close(model.encode_video(video_BTCHW, normalize=False), video_BD, atol=1e-4, rtol=0)
        torch.testing.assert_close(model.encode_text(TEXT, normalize=False), text_BD, atol=1e-4, rtol=0)


def test_safetensors_carry_the_released_names_both_ways(released: tuple[ReleasedModel, Path], tmp_path: Path) -> None:
    plain, source = released
    assert main(["convert-checkpoint", str(source), str(tmp_path / "folder")]) == 0
    written = load_file(tmp_path / "folder" / "model.safetensors")
    assert set(written) == set(plain.state_dict())
    assert all(torch.equal(written[name], value) for name, value in plain.state_dict().items())
    file = tmp_path / "weights.safetensors"
    save_file({f"module.{name}": value.contiguous() for name, value in plain.state_dict().items()}, file)
    model = frozen_fast.DualEncoder.from_pretrained(file)
    video_BTCHW = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        expected = frozen_fast.DualEncoder.from_pretrained(source).encode_video(video_BTCHW)
        assert torch.equal(model.encode_video(video_BTCHW), expected)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^checkpoint: got .*weights.safetensors, which cannot be read"):
        frozen_fast.DualEncoder.from_pretrained(file)


def test_frames_and_expansion_are_applied(released: tuple[ReleasedModel, Path], tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    arguments = ["convert-checkpoint", str(released[1]), str(folder), "--frames", "8", "--expansion", "nearest"]
    assert main(arguments) == 0
    embed_1TD = frozen_fast.DualEncoder.from_pretrained(folder).video_model.temporal_embed
    assert embed_1TD.shape[1] == 8
    torch.testing.assert_close(embed_1TD[:, 0], embed_1TD[:, 1])


def test_what_is_no_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    for source in (tmp_path / "x.pth", tmp_path / "missing.pth"):
        assert main(["convert-checkpoint", str(source), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and source.name in error
        assert not (tmp_path / "out").exists()
