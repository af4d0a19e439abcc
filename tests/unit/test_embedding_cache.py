"""The cache of clips' features: hits to the last bit, misses on every change, links, damage, size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.config import ExperimentConfig, config_from_mapping
from frozen_fast.data.load.evaluation_loader import EvaluationLoader
from frozen_fast.errors import UserError
from frozen_fast.records.embedding_cache import EmbeddingCache, digest, shrink, weights_digest
from frozen_fast.training.parts import build_frozen_model
from frozen_fast.training.run import evaluate_checkpoint
from support.runs import make_data, tiny_mapping

SETTINGS = digest("settings")


def entry(number: int) -> tuple[dict[str, torch.Tensor], int]:
    return {"embedding": torch.full((1, 3), float(number)), "mask": torch.ones(1, 2)}, number


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    keys = [digest(number) for number in range(4)]
    first = EmbeddingCache(tmp_path / "cache", SETTINGS)
    first.put({keys[number]: entry(number) for number in (0, 1)})
    EmbeddingCache(tmp_path / "cache", SETTINGS).put({keys[2]: entry(2)})
    again = EmbeddingCache(tmp_path / "cache", SETTINGS)
    for number in range(3):
        found = again.get(keys[number])
        assert found is not None and found[1] == number
        assert all(torch.equal(found[0][name], tensor) for name, tensor in entry(number)[0].items())
    assert again.get(keys[3]) is None
    assert EmbeddingCache(tmp_path / "cache", digest("others")).get(keys[0]) is None


def test_a_damaged_file_is_left_out(tmp_path: Path) -> None:
    EmbeddingCache(tmp_path, SETTINGS).put({digest(0): entry(0)})
    (file,) = (tmp_path / SETTINGS).iterdir()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert EmbeddingCache(tmp_path, SETTINGS).get(digest(0)) is None
    assert not file.exists()


def test_nothing_is_written_through_a_symbolic_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "link").symlink_to(outside, target_is_directory=True)
    with pytest.raises(UserError, match="^evaluation.embedding_cache: got .*link"):
        EmbeddingCache(tmp_path / "link", SETTINGS)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / SETTINGS).symlink_to(outside, target_is_directory=True)
    with pytest.raises(UserError, match="^evaluation.embedding_cache: got"):
        EmbeddingCache(cache, SETTINGS)
    (cache / SETTINGS).unlink()
    opened = EmbeddingCache(cache, SETTINGS)
    os.rename(cache / SETTINGS, cache / "moved")
    (cache / SETTINGS).symlink_to(outside, target_is_directory=True)
    with pytest.raises(UserError, match="^evaluation.embedding_cache: got"):
        opened.put({digest(0): entry(0)})
    assert not list(outside.iterdir())


def test_what_was_used_longest_ago_is_deleted_first(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        EmbeddingCache(tmp_path, digest(f"settings {number}")).put({digest(0): entry(number)})
        (file,) = (tmp_path / digest(f"settings {number}")).iterdir()
        os.utime(file, ns=(number, number))
        files.append(file)
    (tmp_path / "notes.txt").write_text("not the cache's")
    EmbeddingCache(tmp_path, digest("settings 0"))  # reading it is using it
    shrink(tmp_path, 2 * files[0].stat().st_size)
    assert [file.exists() for file in files] == [True, False, True]
    shrink(tmp_path, 0)
    assert not any(file.exists() for file in files) and (tmp_path / "notes.txt").exists()


def test_weights_have_one_digest() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)}
    assert weights_digest(state) == weights_digest(dict(reversed(state.items())))
    others = [
        {**state, "a": torch.arange(4.0) + 1e-7},
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {"c": state["a"], "b": state["b"]},
        {**state, "b": state["b"].view(torch.int16)},
    ]
    assert len({weights_digest(one) for one in [state, *others]}) == 5


# The evaluate command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clips, and two checkpoints that differ in one weight."""
    folder = tmp_path_factory.mktemp("cache")
    found = make_data(folder, videos=6, pictures=1)
    stages = [{"frames": 4, "global_batch_size": 4, "steps": 1}]
    config = experiment(found, folder, model={}, curriculum={"stages": stages})
    model = build_frozen_model(config, torch.device("cpu"))
    model.save_pretrained(folder / "one")
    with torch.no_grad():
        model.vid_proj[-1].bias[0] += 1e-3  # type: ignore[index]
    model.save_pretrained(folder / "two")
    return {**found, "one": folder / "one", "two": folder / "two"}


def experiment(files: dict[str, Path], folder: Path, **sections: Any) -> ExperimentConfig:
    tree = tiny_mapping(files, folder)
    tree["model"].update(sections.pop("model", {"video": {}, "text": {}, "embedding_width": None}))
    tree["evaluation"] = {
        "sources": [{"name": "held_out", "path": str(files["videos"])}],
        "stride_seconds": 0.1,
        "resize": 224,
        **sections.pop("evaluation", {}),
    }
    return config_from_mapping(tree | sections)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many clips each evaluation decodes."""
    counts: list[int] = []
    original = EvaluationLoader.batches

    def batches(self: EvaluationLoader) -> Any:
        counts.append(len(self.clip_indices))
        return original(self)

    monkeypatch.setattr(EvaluationLoader, "batches", batches)
    return counts


def test_a_second_protocol_decodes_nothing_and_has_the_same_bits(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"embedding_cache": str(tmp_path / "cache")}
    counts = reads(monkeypatch)

    def evaluate(checkpoint: str = "one", **evaluation: Any) -> dict[str, Any]:
        config = experiment(files, tmp_path, evaluation={**cache, **evaluation})
        (row, *_) = evaluate_checkpoint(config, str(files[checkpoint]))["evaluations"]
        return {key: value for key, value in row.items() if key != "seconds"}

    (plain, *_) = evaluate_checkpoint(experiment(files, tmp_path), str(files["one"]))["evaluations"]
    first, second = evaluate(), evaluate()
    assert counts == [6, 6, 0]
    assert first == second == {key: value for key, value in plain.items() if key != "seconds"}
    assert first["windows"] > 6, "several windows a clip, counted from the cache too"
    assert evaluate(protocol="paragraph")["protocol"] == "paragraph" and counts[-1] == 0
    assert evaluate("two")["loss"] != first["loss"] and counts[-1] == 6, "another weight"
    for change in ({"frames": 2}, {"crops": 3}, {"stride_seconds": 0.0}, {"resize": 256}):
        evaluate(**change)
        assert counts[-1] == 6, change
    evaluate()
    assert counts[-1] == 0
    clip = files["videos"].parent / "clips" / "c3.avi"
    state = clip.stat()
    os.utime(clip, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    evaluate()
    assert counts[-1] == 1, "the clip whose file has changed"
    evaluate(embedding_cache_gigabytes=1e-9)
    assert not list((tmp_path / "cache").glob("*/*.safetensors")), "the size is bounded"
