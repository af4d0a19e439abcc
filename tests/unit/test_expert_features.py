"""Released feature pickles, the feature store, and batches from it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from frozen_fast.cli.main import main
from frozen_fast.config.schema import SourceConfig
from frozen_fast.data.features.convert_features import convert_features, find_expert
from frozen_fast.data.features.feature_pickle import open_feature_pickle
from frozen_fast.data.features.feature_store import FeatureStore
from frozen_fast.data.load.feature_loader import (
    ExpertFormat,
    FeatureEvaluationLoader,
    FeatureFormat,
    FeatureTrainingLoader,
    read_caption_masks,
)
from frozen_fast.data.plan.samplers import DataPosition, plan_steps
from frozen_fast.data.sources.read import read_source
from frozen_fast.errors import UserError
from support.expert_features import planted_features, write_released_layout

EXPERTS = {"scene.densenet161.0": (6, False), "face": (5, False), "ocr": (4, True)}
VIDEOS = [f"video{number}" for number in range(12)]
SPLITS = {"train_list_full": VIDEOS[:8], "val_list_jsfusion": VIDEOS[8:]}


@pytest.fixture
def released(tmp_path: Path):
    features, texts, words = planted_features(VIDEOS, EXPERTS, text_width=7, missing=0.4)
    root = write_released_layout(tmp_path / "released", features, {"openai": texts, "w2v": texts}, words, SPLITS)
    chosen = {video: number % 3 for number, video in enumerate(VIDEOS[8:])}
    (root / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps(chosen))
    convert_features(root, tmp_path / "store", list(EXPERTS), ["openai", "w2v"])
    return features, texts, words, root, tmp_path / "store"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_gives_the_values_back(protocol: int, tmp_path: Path) -> None:
    big = np.arange(3000, dtype=np.float64).reshape(100, 30)
    content = {
        "a": big,
        "b": float("nan"),
        "fortran": np.asfortranarray(big),
        "small": np.array([1.5, -2.0], dtype=np.float16),
        "latin": np.array([200, 100] * 50, dtype=np.uint8),
        "texts": [np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32)],
        "objects": np.array([np.ones((2, 3)), np.ones((1, 3))], dtype=object),
        "scalar": np.float64(2.5),
        "words": [["a", "dög"], ["b"]],
    }
    path = tmp_path / "features.pickle"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    found = open_feature_pickle(path)
    for name in ("a", "fortran", "small", "latin"):
        np.testing.assert_array_equal(found[name].read(), content[name].astype(np.float32))
    assert found["b"] != found["b"] and found["scalar"] == 2.5 and found["words"] == content["words"]
    assert [array.shape for array in found["texts"]] == [(2, 3), (0, 3)]
    assert [array.shape for array in found["objects"].items] == [(2, 3), (1, 3)]


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("content", [{"a": Evil()}, {"a": np.array([Evil()], dtype=object)}, {"a": print}])
def test_a_pickle_that_names_anything_else_is_refused(content: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pickle"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="is not a pickle of features .*which is refused"):
        open_feature_pickle(path)
    assert not (tmp_path / "owned").exists()


def test_a_cut_pickle_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"a": np.arange(1000.0)})
    for length in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pickle").write_bytes(data[:length])
        with pytest.raises(UserError, match="is not a pickle of features"):
            open_feature_pickle(tmp_path / "cut.pickle")


def test_the_store_holds_what_the_pickles_held(released) -> None:
    features, texts, words, _, folder = released
    store = FeatureStore(folder)
    assert list(store.captions) == VIDEOS
    assert store.captions["video3"][1] == "caption 1 of video3"
    assert {name: one.kind for name, one in store.experts.items()} == {
        "scene.densenet161.0": "vector",
        "face": "vector",
        "ocr": "set",
    }
    for name, entries in features.items():
        arrays = store.expert(name)
        for video, row in store.rows.items():
            lacks = isinstance(entries[video], float)
            assert bool(arrays["available"][row]) is not lacks
            got = arrays["vectors"][arrays["ends"][row] : arrays["ends"][row + 1]]
            want = np.zeros((0, EXPERTS[name][0])) if lacks else np.atleast_2d(entries[video])
            np.testing.assert_array_equal(got, want)
    for video in VIDEOS:
        for got, want in zip(store.caption_tokens("w2v", video), texts[video], strict=True):
            np.testing.assert_array_equal(got, want)
    assert isinstance(store.expert("face")["vectors"], np.memmap)


def test_files_are_found_by_the_layouts_rule(released) -> None:
    root = released[3]
    assert find_expert(root, "scene.densenet161.0").parent.name == "aggregated_scene_25fps_256px_stride1_offset0"
    with pytest.raises(UserError, match="expert: i3d.i3d.0 matches none of .*allowed: --file i3d.i3d.0=FILE"):
        find_expert(root, "i3d.i3d.0")
    with pytest.raises(UserError, match="expert: got 'flo'"):
        find_expert(root, "flo")
    with pytest.raises(UserError, match="split: got 'train_list'"):
        FeatureStore(released[4]).split("train_list")


def source(folder: Path, split: str, **keys):
    return read_source(SourceConfig(name="s", format="features", path=str(folder), split=split, **keys))


FACE = {"face": ExpertFormat(5)}
FORMAT = FeatureFormat(experts={**FACE, "ocr": ExpertFormat(4, 3)}, text="openai", text_tokens=9, other_texts=("w2v",))


def specs(steps: int, seed: int = 0, rank: int = 0, world_size: int = 1):
    return plan_steps(
        {"s": 8},
        {"s": 1.0},
        "round_robin",
        seed,
        batch_sizes={"s": 4},
        frames=1,
        num_steps=steps,
        start=DataPosition(),
        rank=rank,
        world_size=world_size,
    )


def test_training_batches_are_padded_and_draw_one_caption(released) -> None:
    features, texts, words, _, folder = released
    loader = FeatureTrainingLoader({"s": source(folder, "train_list_full")}, FORMAT)
    drawn = set()
    for batch in loader.batches(specs(20)):
        assert batch.text["tokens"].shape == batch.text["tokens/w2v"].shape == (4, 9, 7)
        assert batch.video["face"].shape == (4, 5) and batch.video["ocr"].shape == (4, 3, 4)
        for place, video in enumerate(batch.clip_ids):
            number = int(batch.captions[place].split()[1])
            drawn.add((video, number))
            want = texts[video][number]
            torch.testing.assert_close(batch.text["tokens"][place, : len(want)], torch.from_numpy(want))
            assert not batch.text["tokens"][place, len(want) :].any()
            face, ocr = features["face"][video], features["ocr"][video]
            if isinstance(face, float):
                assert batch.video["face"][place].isnan().all()
            else:
                torch.testing.assert_close(batch.video["face"][place], torch.from_numpy(face))
            if isinstance(ocr, float):
                assert batch.video["ocr"][place].isnan().all()
            else:
                torch.testing.assert_close(batch.video["ocr"][place, : len(ocr)], torch.from_numpy(ocr[:3]))
                assert not batch.video["ocr"][place, len(ocr) :].any()
    assert {video for video, _ in drawn} == set(VIDEOS[:8]) and {number for _, number in drawn} == {0, 1, 2}


def test_two_ranks_read_what_one_reads(released) -> None:
    train = source(released[4], "train_list_full")
    whole = list(FeatureTrainingLoader({"s": train}, FORMAT).batches(specs(3)))
    halves = [list(FeatureTrainingLoader({"s": train}, FORMAT).batches(specs(3, rank=r, world_size=2))) for r in (0, 1)]
    for step in range(3):
        joined = torch.cat([halves[rank][step].text["tokens"] for rank in (0, 1)])
        assert torch.equal(joined, whole[step].text["tokens"])


def test_masks_restrict_the_captions_drawn_and_paragraphs_join_them(released, tmp_path: Path) -> None:
    texts, folder = released[1], released[4]
    path = tmp_path / "masks.pkl"
    path.write_bytes(pickle.dumps({video: np.array([0, 0, 1]) for video in VIDEOS}))
    one = FeatureFormat(experts=FACE, text="openai", text_tokens=9)
    masks = {"s": str(path)}
    loader = FeatureTrainingLoader({"s": source(folder, "train_list_full")}, one, caption_masks=masks)
    for batch in loader.batches(specs(5)):
        assert all(caption.startswith("caption 2") for caption in batch.captions)
    whole = FeatureFormat(experts=FACE, text="openai", text_tokens=40)
    fused = source(folder, "train_list_full", captions="paragraph")
    batch = next(iter(FeatureTrainingLoader({"s": fused}, whole).batches(specs(1))))
    want = np.concatenate(texts[batch.clip_ids[0]])
    torch.testing.assert_close(batch.text["tokens"][0, : len(want)], torch.from_numpy(want))
    path.write_bytes(pickle.dumps({"video1": [0, 0, 0]}))
    with pytest.raises(UserError, match="leaves no caption of video1"):
        read_caption_masks(path)


def test_evaluation_reads_the_one_caption_that_a_split_names(released) -> None:
    texts, folder = released[1], released[4]
    test = source(folder, "val_list_jsfusion")
    assert [clip.captions for clip in test.clips][1] == ("caption 1 of video9",)
    loader = FeatureEvaluationLoader(test, FORMAT, batch_size=3)
    assert [batch.clip_indices for batch in loader.batches()] == [[0, 1, 2], [3]]
    got = loader.query_inputs([0, 1, 2, 3], "plain")([2, 1])["tokens"]
    for row, (video, number) in enumerate((("video10", 2), ("video9", 1))):
        torch.testing.assert_close(got[row, : len(texts[video][number])], torch.from_numpy(texts[video][number]))


def test_what_a_model_reads_must_be_there(released) -> None:
    train = source(released[4], "train_list_full")
    with pytest.raises(UserError, match="expert: got 'fase' .did you mean 'face'"):
        wrong = {"fase": ExpertFormat(5)}
        FeatureTrainingLoader({"s": train}, FeatureFormat(experts=wrong, text="openai", text_tokens=9))
    with pytest.raises(UserError, match="got ocr, of which s has a set per video; allowed: clusters"):
        wrong = {"ocr": ExpertFormat(4)}
        FeatureTrainingLoader({"s": train}, FeatureFormat(experts=wrong, text="openai", text_tokens=9))
    with pytest.raises(UserError, match="model.experts.text: got none; allowed: openai, w2v"):
        FeatureTrainingLoader({"s": train}, FeatureFormat(experts=FACE, text="", text_tokens=9))


def test_the_command_converts_and_names_what_is_wrong(released, tmp_path: Path, capsys) -> None:
    root, store = released[3], tmp_path / "again"
    arguments = ["convert-features", str(root), "--output", str(store), "--text", "w2v", "--expert", "face"]
    assert main(arguments) == 0
    assert "12 videos in" in capsys.readouterr().out and list(FeatureStore(store).experts) == ["face"]
    assert main([*arguments, "--file", "face=nowhere"]) == 2
    assert "--file: got 'face=nowhere'; allowed: NAME=FILE" in capsys.readouterr().err
    assert main([*arguments, "--expert", "i3d.i3d.0"]) == 2
    assert "i3d.i3d.0 matches none of" in capsys.readouterr().err


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from frozen_fast.data.features.convert_features import convert_features
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_features(Path(sys.argv[1]), Path(sys.argv[2]), ["scene.densenet161.0"], ["openai"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_conversion_does_not_load_the_features(tmp_path: Path) -> None:
    """60 MiB of features are converted with less than half of that more memory than before."""
    videos = [f"v{number}" for number in range(750)]
    row = np.ones(20000, np.float32)
    features = {"scene.densenet161.0": {video: row + number for number, video in enumerate(videos)}}
    texts = {video: [np.ones((2, 3), np.float32)] for video in videos}
    root = write_released_layout(tmp_path / "released", features, {"openai": texts}, {}, {"train_list": videos})
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(root), str(tmp_path / "store")]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (root / "aggregated_scene_25fps_256px_stride1_offset0/densenet161-avg.pickle").stat().st_size > 55 << 20
    assert grown < 25
    store = FeatureStore(tmp_path / "store")
    np.testing.assert_array_equal(store.expert("scene.densenet161.0")["vectors"][7], row + 7)
