import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig

from frozen_fast import DualEncoder
from frozen_fast.errors import UserError
from frozen_fast.models.released.frozen import text_config
from frozen_fast.models.released.torch_pickle import ALLOWED, Inert, LazyTensor, load_torch_pickle
from support.released import ReleasedModel, released_temporal_embedding, write_released_checkpoint
from support.towers import make_text_tower

TEXT = {
    "input_ids": torch.tensor([[2, 90, 91, 92, 3], [2, 95, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ReleasedModel, Path]]:
    root = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    models = {text: ReleasedModel(text=text).eval() for text in ("distilbert", "bert")}
    return {text: (model, write_released_checkpoint(root / f"{text}.pth.tar", model)) for text, model in models.items()}


@pytest.mark.parametrize("text", ["distilbert", "bert"])
@pytest.mark.parametrize(
    ("frames", "expansion"), [(None, "zero"), (1, "zero"), (4, "zero"), (8, "zero"), (8, "nearest"), (8, "bilinear")]
)
def test_embeddings_equal_the_released_model(
    checkpoints: dict[str, tuple[ReleasedModel, Path]], text: str, frames: int | None, expansion: str
) -> None:
    plain, path = checkpoints[text]
    ours = DualEncoder.from_pretrained(path, num_frames=frames, expansion=expansion)
    frames = frames or 4
    assert ours.learned_frames == frames and not ours.training
    learned = plain.video_model.temporal_embed
    video = torch.randn(2, frames, 3, 32, 32)
    try:
        expanded = released_temporal_embedding(learned.detach(), frames, expansion)
        plain.video_model.temporal_embed = torch.nn.Parameter(expanded)
        with torch.no_grad():
            video_BD, text_BD = plain(video, TEXT)
    finally:
        plain.video_model.temporal_embed = learned
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_video(video, normalize=False), video_BD, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.encode_text(TEXT, normalize=False), text_BD, rtol=0, atol=1e-5)
        unit = torch.nn.functional.normalize(video_BD, dim=-1)
        torch.testing.assert_close(ours.encode_video(video), unit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zip_layout", [True, False])
def test_every_form_of_the_file_gives_the_same_weights(
    checkpoints: dict[str, tuple[ReleasedModel, Path]], tmp_path: Path, prefix: str, zip_layout: bool
) -> None:
    plain, _ = checkpoints["distilbert"]
    path = write_released_checkpoint(tmp_path / "x.pth", plain, prefix=prefix, zip_layout=zip_layout)
    state, expected = DualEncoder.from_pretrained(path).state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_bare_state_dict_and_old_counters_are_read(
    checkpoints: dict[str, tuple[ReleasedModel, Path]], tmp_path: Path
) -> None:
    plain, _ = checkpoints["distilbert"]
    state = OrderedDict(plain.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(64)[None]
    torch.save(state, tmp_path / "bare.pth")
    loaded = DualEncoder.from_pretrained(tmp_path / "bare.pth").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())


def test_half_precision_and_shared_storages_are_read(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    content = {"whole": base, "view": base.view(3, 4).T, "part": base[5:7], "half": base.half(), "none": base[:0]}
    for zip_layout in (True, False):
        path = tmp_path / f"{zip_layout}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zip_layout)
        loaded = load_torch_pickle(path)
        for name, value in content.items():
            assert isinstance(loaded[name], LazyTensor)
            assert torch.equal(loaded[name].read(), value)
            assert loaded[name].read().dtype == value.dtype


def test_captions_need_a_tokenizer(checkpoints: dict[str, tuple[ReleasedModel, Path]], tmp_path: Path) -> None:
    _, path = checkpoints["distilbert"]
    with pytest.raises(UserError, match="tokenizer: got none"):
        DualEncoder.from_pretrained(path).encode_text(["a dog"])
    folder = make_text_tower(tmp_path / "tower")
    ours = DualEncoder.from_pretrained(path, tokenizer=str(folder))
    assert ours.text_model.tokenizer.max_tokens == 64, "as many as this text tower takes"
    assert ours.encode_text(["a dog", ""]).shape == (2, 256)


def test_the_base_models_text_tower_is_known_without_a_hub() -> None:
    shapes = {
        "text_model.embeddings.word_embeddings.weight": (30522, 768),
        "text_model.embeddings.position_embeddings.weight": (512, 768),
        "text_model.transformer.layer.0.ffn.lin1.weight": (3072, 768),
        **{f"text_model.transformer.layer.{index}.sa_layer_norm.bias": (768,) for index in range(6)},
    }
    config = text_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert config.to_dict() == DistilBertConfig().to_dict()


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("video_model.blocks.1.timeattn.qkv.weight", "lacks video_model.blocks.1.timeattn.qkv.weight"),
        ("video_model.temporal_embed", "video_model.temporal_embed is missing"),
        ("video_model.cls_token", "lacks video_model.cls_token"),
        ("vid_proj.0.weight", "vid_proj.0.weight is missing"),
        ("text_model.embeddings.word_embeddings.weight", "word_embeddings.weight is missing"),
    ],
)
def test_missing_weights_are_named(
    checkpoints: dict[str, tuple[ReleasedModel, Path]], tmp_path: Path, drop: str, message: str
) -> None:
    path = write_released_checkpoint(tmp_path / "x.pth", checkpoints["distilbert"][0], drop=(drop,))
    with pytest.raises(UserError, match=message):
        DualEncoder.from_pretrained(path)


def test_unknown_and_misshapen_weights_are_named(
    checkpoints: dict[str, tuple[ReleasedModel, Path]], tmp_path: Path
) -> None:
    state = dict(checkpoints["distilbert"][0].state_dict())
    torch.save({"state_dict": {**state, "video_model.head.weight": torch.zeros(2)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match="has unknown video_model.head.weight"):
        DualEncoder.from_pretrained(tmp_path / "more.pth")
    torch.save({"state_dict": {**state, "video_model.norm.bias": torch.zeros(2)}}, tmp_path / "shape.pth")
    with pytest.raises(UserError, match=r"video_model.norm.bias has shape \[2\]; allowed: \[128\]"):
        DualEncoder.from_pretrained(tmp_path / "shape.pth")


# Hostile and damaged files ---------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.args


def payloads(marker: Path) -> dict[str, object]:
    return {
        "system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(marker)!r}, 'w')"),
        "import": Calls(__import__, "antigravity"),
        "open": Calls(open, str(marker), "w"),
        "getattr": Calls(getattr, marker, "touch"),
        "nested": [{"config": Calls(os.system, f"touch {marker}")}],
    }


@pytest.mark.parametrize("zip_layout", [True, False])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "import", "open", "getattr", "nested"])
def test_a_hostile_pickle_does_nothing(tmp_path: Path, kind: str, zip_layout: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    payload = payloads(marker)[kind]
    content = {"state_dict": {"video_model.cls_token": torch.zeros(1)}, "config": payload}
    torch.save(content, path, _use_new_zipfile_serialization=zip_layout)
    loaded = load_torch_pickle(path)
    inner = loaded["config"][0]["config"] if kind == "nested" else loaded["config"]
    assert isinstance(inner, Inert)
    with pytest.raises(UserError):
        DualEncoder.from_pretrained(path)
    assert not marker.exists() and "antigravity" not in sys.modules


def write_zip(path: Path, data: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in records.items():
            archive.writestr(f"archive/data/{name.removeprefix('s')}", content)
    return path


def assembled(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


@pytest.mark.parametrize("name", [f"{module}\n{name}" for module, name in ALLOWED])
def test_a_file_cannot_write_into_what_it_can_reach(tmp_path: Path, name: str) -> None:
    reach = b"c" + name.encode() + b"\n"
    state = b"}U\x05dtypeU\x03bads"
    for data in (assembled(reach, state, b"b"), assembled(reach, b"N", state, b"\x86b")):
        before = dict(ALLOWED)
        with pytest.raises(UserError, match="not a readable torch checkpoint .*attribute"):
            load_torch_pickle(write_zip(tmp_path / "x.pth", data))
        assert before == ALLOWED


def test_unknown_names_are_never_imported(tmp_path: Path) -> None:
    (tmp_path / "planted_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        loaded = load_torch_pickle(write_zip(tmp_path / "x.pth", assembled(b"cplanted_module\nThing\n)R")))
    finally:
        sys.path.remove(str(tmp_path))
    assert isinstance(loaded, Inert) and "planted_module" not in sys.modules


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (5,), (1,)), (4, (1,), (1,)), (0, (2, 2), (4, 1)), (-1, (1,), (1,)), (0, (2,), (-1,)), (0, (2, 2), (1,))],
)
def test_a_tensor_past_its_storage_is_refused(tmp_path: Path, offset: int, shape: tuple, stride: tuple) -> None:
    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if obj is storage else None

    buffer = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Pickler(buffer, 2).dump(Calls(rebuild, storage, offset, shape, stride, False, OrderedDict()))
    path = write_zip(tmp_path / "x.pth", buffer.getvalue(), s0=bytes(16))
    with pytest.raises(UserError, match="a tensor"):
        load_torch_pickle(path)


def damaged(path: Path, kind: str, source: Path) -> Path:
    whole = source.read_bytes()
    contents = {
        "empty": b"",
        "text": b"this is no checkpoint\n" * 50,
        "half": whole[: len(whole) // 2],
        "tail": whole[:-10],
        "pickle": pickle.dumps({"state_dict": {}}),
    }
    path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "half", "tail", "pickle"])
@pytest.mark.parametrize("zip_layout", [True, False])
def test_damaged_files_are_named_on_one_line(
    checkpoints: dict[str, tuple[ReleasedModel, Path]], tmp_path: Path, kind: str, zip_layout: bool
) -> None:
    plain, _ = checkpoints["distilbert"]
    source = write_released_checkpoint(tmp_path / "whole.pth", plain, zip_layout=zip_layout)
    with pytest.raises(UserError, match="checkpoint: got") as caught:
        DualEncoder.from_pretrained(damaged(tmp_path / "damaged.pth", kind, source))
    assert "\n" not in str(caught.value)


def test_other_kinds_of_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        DualEncoder.from_pretrained(tmp_path / "nothing.pth")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="a zip, but not one that torch.save wrote"):
        DualEncoder.from_pretrained(tmp_path / "other.zip")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="contains no state_dict"):
        DualEncoder.from_pretrained(tmp_path / "list.pth")
