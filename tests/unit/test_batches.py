from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from frozen_fast.config.schema import AugmentationConfig, DecodeConfig
from frozen_fast.data.load.training_loader import MAX_ATTEMPTS, Batch, ClipReader, TrainingLoader
from frozen_fast.data.plan.samplers import BatchSpec, DataPosition, plan_steps
from frozen_fast.data.sources import CaptionRule, Clip, PackedClips, Source, twin_pairs
from frozen_fast.errors import UserError
from support.fake_decoding import SIZE, FakeDecoder, clip_code, fake_probe, fake_tokenizer


def make_source(count: int, *, name: str = "web", bad: dict[int, str] | None = None, **fields: Any) -> Source:
    """Clips c0, c1, ..; `bad` puts a word such as "truncated" into a file's name."""
    suffix = bad or {}
    clips = [Clip(f"c{n}", f"/x/c{n}{suffix.get(n, '')}.mp4", (f"one {n}", f"two {n}"), **fields) for n in range(count)]
    return Source(name, "manifest", PackedClips(clips), fields.get("kind", "video"), CaptionRule())


def make_specs(source: Source, *, batch: int = 8, steps: int = 4, frames: int = 4, **fields: Any) -> list[BatchSpec]:
    sizes = {source.name: len(source)}
    return list(
        plan_steps(
            sizes,
            {source.name: 1.0},
            "round_robin",
            fields.pop("seed", 0),
            batch_sizes={source.name: batch},
            frames=frames,
            num_steps=steps,
            start=fields.pop("start", DataPosition()),
            **fields,
        )
    )


def make_reader(source: Source, policy: Any = "skip", **fields: Any) -> ClipReader:
    settings: dict[str, Any] = {"decoder": FakeDecoder(), "prober": fake_probe, "threads": 1} | fields
    return ClipReader(
        {source.name: source},
        tokenizer=fake_tokenizer,
        augmentation=AugmentationConfig(),
        policy=policy,
        max_pixels=10**6,
        **settings,
    )


def make_loader(source: Source, **decode: Any) -> TrainingLoader:
    return TrainingLoader(
        {source.name: source},
        FakeDecoder,
        fake_tokenizer,
        augmentation=AugmentationConfig(),
        decode=DecodeConfig(**decode),
        prober=fake_probe,
    )


def same(left: Batch, right: Batch) -> bool:
    names = ("captions", "clip_ids", "source", "frames", "bad_clips", "backends", "spec")
    tensors = [(left.video, right.video), (left.text["input_ids"], right.text["input_ids"])]
    return all(getattr(left, name) == getattr(right, name) for name in names) and all(
        torch.equal(a, b) for a, b in tensors
    )


def test_a_batch_holds_what_the_spec_says() -> None:
    source = make_source(30)
    for spec in make_specs(source):
        batch = make_reader(source).read(spec)
        assert batch.video.shape == (8, 4, 3, SIZE, SIZE) and batch.video.dtype == torch.float32
        assert batch.clip_ids == [f"c{index}" for index in spec.clip_indices]
        assert batch.frames == 4 and batch.source == "web" and batch.spec == spec
        assert batch.backends == {"fake": 8} and batch.bad_clips == []
        assert batch.text["input_ids"].shape[0] == 8
        for row, index in enumerate(spec.clip_indices):
            pixels = batch.video[row, :, :, 0, 0]
            assert (pixels[:, 0] == clip_code(f"/x/c{index}.mp4")).all()
            assert (pixels[:, 1] // 5).tolist() == [0, 1, 2, 3], "one frame of each segment of 20 frames"
            assert len(set(pixels[:, 2].tolist())) == 1, "one view for all frames"
            assert batch.captions[row] in (f"one {index}", f"two {index}")
        assert len(set(batch.video[:, 0, 2, 0, 0].tolist())) == 8, "a view for each clip"


def test_draws_depend_on_seed_source_and_position_only() -> None:
    source = make_source(30)
    whole = [make_reader(source).read(spec) for spec in make_specs(source)]
    for world_size in (2, 4):
        ranks = [
            [make_reader(source).read(spec) for spec in make_specs(source, rank=rank, world_size=world_size)]
            for rank in range(world_size)
        ]
        for number, batch in enumerate(whole):
            parts = [batches[number] for batches in ranks]
            assert torch.equal(torch.cat([part.video for part in parts]), batch.video)
            assert sum([part.captions for part in parts], []) == batch.captions
    other = make_reader(source).read(make_specs(source, seed=1)[0])
    assert not torch.equal(other.video, whole[0].video)
    again = [make_reader(source).read(spec) for spec in make_specs(source, batch=4, steps=8)]
    assert torch.equal(torch.cat([again[0].video, again[1].video]), whole[0].video)
    later = make_reader(source).read(make_specs(source, start=whole[1].spec.after, steps=1)[0])
    assert same(later, whole[2])


def test_a_clip_seen_again_is_drawn_anew() -> None:
    source = make_source(4)
    batches = [make_reader(source).read(spec) for spec in make_specs(source, batch=4, steps=2)]
    assert sorted(batches[0].clip_ids) == sorted(batches[1].clip_ids)
    views = [set(batch.video[:, 0, 2, 0, 0].tolist()) for batch in batches]
    assert not views[0] & views[1]


def test_pictures_give_one_frame() -> None:
    source = make_source(10, kind="image")
    batch = make_reader(source).read(make_specs(source, frames=8)[0])
    assert batch.video.shape == (8, 1, 3, SIZE, SIZE) and batch.frames == 1


def test_pictures_among_videos_repeat_their_frame() -> None:
    clips = [Clip(f"c{n}", f"/x/c{n}.mp4", ("one",), kind="image" if n % 2 else "video") for n in range(8)]
    source = Source("web", "manifest", PackedClips(clips), "video", CaptionRule())
    batch = make_reader(source).read(make_specs(source)[0])
    assert batch.video.shape == (8, 4, 3, SIZE, SIZE) and batch.frames == 4
    for identity, frames in zip(batch.clip_ids, batch.video[:, :, 1, 0, 0].tolist(), strict=True):
        assert (len(set(frames)) == 1) == (int(identity[1:]) % 2 == 1)


def test_start_and_end_choose_the_frames() -> None:
    source = make_source(10, start_seconds=0.5, end_seconds=1.3)
    seen = set()
    for spec in make_specs(source, steps=30):
        seen |= set(make_reader(source).read(spec).video[:, :, 1].flatten().tolist())
    assert seen == set(range(5, 13))


def test_a_clip_that_begins_after_its_end_is_bad() -> None:
    source = make_source(10, start_seconds=2.0)
    with pytest.raises(UserError, match="no_frames: begins at 2 s of 2 s"):
        make_reader(source, "error").read(make_specs(source)[0])


def test_short_clips_repeat_frames() -> None:
    source = make_source(10, bad=dict.fromkeys(range(10), "short"))
    batch = make_reader(source).read(make_specs(source)[0])
    assert batch.video[:, :, 1, 0, 0].tolist() == [[0, 0, 1, 1]] * 8


@pytest.mark.parametrize("word", ["missing", "truncated"])
def test_a_bad_clip_is_replaced_counted_and_named(word: str) -> None:
    source = make_source(40, bad={3: word, 17: word})
    good = make_source(40)
    specs = make_specs(source, steps=5)
    named = []
    for spec in specs:
        batch, whole = make_reader(source).read(spec), make_reader(good).read(spec)
        for row, index in enumerate(spec.clip_indices):
            if index in (3, 17):
                assert batch.clip_ids[row] not in whole.clip_ids, "no clip of the batch is taken twice"
                own = clip_code(f"/x/{batch.clip_ids[row]}.mp4")
                assert (batch.video[row, :, 0] == own).all()
                assert batch.captions[row].split()[1] == batch.clip_ids[row][1:]
            else:
                assert torch.equal(batch.video[row], whole.video[row]), "neighbours are not disturbed"
        named += batch.bad_clips
    assert {bad.clip_id for bad in named} == {"c3", "c17"}
    assert all(bad.cause == word and bad.source == "web" and word in bad.path and bad.replaced_by for bad in named)


def test_replacements_do_not_depend_on_rank_or_threads() -> None:
    source = make_source(40, bad=dict.fromkeys(range(0, 40, 3), "truncated"))
    whole = make_reader(source).read(make_specs(source)[0])
    assert len(whole.bad_clips) >= 2
    parts = [make_reader(source).read(make_specs(source, rank=rank, world_size=2)[0]) for rank in range(2)]
    assert parts[0].clip_ids + parts[1].clip_ids == whole.clip_ids
    assert same(make_reader(source, threads=4).read(make_specs(source)[0]), whole)


def test_a_replacement_avoids_the_clips_of_all_ranks_also_among_twins() -> None:
    clips = [Clip(f"c{n}", f"/x/c{n}.mp4", ("one",), twin=f"c{n ^ 1}") for n in range(40)]
    source = Source("web", "manifest", PackedClips(clips), "video", CaptionRule())
    reader = make_reader(source)
    for pairs in ({}, {"web": twin_pairs(source)}):
        plans = [make_specs(source, steps=12, pairs=pairs, rank=rank, world_size=4) for rank in range(4)]
        for specs in zip(*plans, strict=True):
            whole = {clip for spec in specs for clip in spec.clip_indices}
            assert len(whole) == 8 and all(reader._batch_clips(spec, source) == whole for spec in specs)


def test_a_chain_of_bad_clips_is_followed_and_each_is_named() -> None:
    source = make_source(30, bad=dict.fromkeys(range(24), "truncated"))
    batches = [make_reader(source).read(spec) for spec in make_specs(source, batch=2, steps=5)]
    read = [identity for batch in batches for identity in batch.clip_ids]
    bad_clips = [bad for batch in batches for bad in batch.bad_clips]
    assert len(read) == 10 and set(read) <= {f"c{n}" for n in range(24, 30)}
    assert len(bad_clips) > 10 and {bad.clip_id for bad in bad_clips} & {bad.replaced_by for bad in bad_clips}


def test_a_source_of_nothing_but_bad_clips_ends() -> None:
    source = make_source(30, bad=dict.fromkeys(range(30), "truncated"))
    with pytest.raises(UserError, match=f"source 'web' cannot be read: .*truncated: .*; it was the {MAX_ATTEMPTS}th"):
        make_reader(source).read(make_specs(source)[0])


def test_policy_error_names_the_clip_and_the_cause() -> None:
    source = make_source(8, bad={3: "truncated"})
    with pytest.raises(UserError, match=r"clip 'c3' of source 'web' cannot be read: /x/c3trunc.*4: truncated: fewer"):
        make_reader(source, "error").read(make_specs(source)[0])


def test_thread_and_workers_give_identical_batches_in_order() -> None:
    source = make_source(40, bad={3: "missing", 17: "truncated"})
    specs = make_specs(source, steps=7)
    expected = [make_reader(source).read(spec) for spec in specs]
    for decode in ({"workers": 0}, {"workers": 0, "threads": 4, "prefetch_batches": 1}, {"workers": 2}):
        loader = make_loader(source, **decode)
        batches = list(loader.batches(iter(specs)))
        assert len(batches) == len(expected)
        assert all(same(batch, other) for batch, other in zip(batches, expected, strict=True))
        loader.close()


def test_the_loader_serves_stage_after_stage() -> None:
    source = make_source(40)
    loader = make_loader(source)
    first = list(loader.batches(make_specs(source, frames=1, steps=2)))
    position = first[-1].spec.after
    second = loader.batches(make_specs(source, frames=4, batch=4, steps=50, start=position))
    assert next(second).video.shape[:2] == (4, 4)
    third = loader.batches(make_specs(source, frames=2, steps=1))
    assert [batch.frames for batch in third] == [2]
    assert list(second) == [], "an iterator that was replaced ends"


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_consumer_as_they_are(workers: int) -> None:
    user = make_source(8, bad={3: "truncated"})
    with pytest.raises(UserError, match="^clip 'c3' of source 'web' cannot be read.*$") as caught:
        list(make_loader(user, workers=workers, on_bad_clip="error").batches(make_specs(user)))
    assert "\n" not in str(caught.value)
    defect = make_source(8, bad={3: "crash"})
    with pytest.raises(ZeroDivisionError, match="^a defect of the decoder$"):
        list(make_loader(defect, workers=workers).batches(make_specs(defect)))


def test_an_error_comes_after_the_batches_before_it() -> None:
    source = make_source(32)
    specs = make_specs(source, steps=4)
    last = specs[-1].clip_indices[0]
    loader = make_loader(make_source(32, bad={last: "crash"}))
    got = []
    with pytest.raises(ZeroDivisionError):
        for batch in loader.batches(specs):
            got.append(batch)
    assert len(got) == 3


def test_a_failing_plan_reaches_the_consumer() -> None:
    source = make_source(16)

    def plan() -> Iterator[BatchSpec]:
        yield make_specs(source)[0]
        raise UserError("the plan ended")

    iterator = make_loader(source).batches(plan())
    next(iterator)
    with pytest.raises(UserError, match="the plan ended"):
        next(iterator)


@pytest.mark.parametrize(("workers", "timeout"), [(0, 0.3), (1, 1.5)])
def test_a_hanging_read_is_an_error_that_names_the_batch(workers: int, timeout: float) -> None:
    source = make_source(16)
    specs = make_specs(source, batch=4, steps=2)
    hanging = make_source(16, bad={specs[1].clip_indices[0]: "hang"})
    loader = make_loader(hanging, workers=workers, read_timeout_seconds=timeout)
    iterator = loader.batches(specs)
    assert next(iterator).spec.step == 1
    with pytest.raises(UserError, match="read_timeout_seconds: waited for the batch of step 2, pass 0, source 'web'"):
        next(iterator)
    assert list(iterator) == []
    loader.close()


def test_a_worker_that_dies_is_an_error_in_one_line() -> None:
    source = make_source(4, bad={0: "die"})
    with pytest.raises(UserError, match="workers: a loader process ended while .*the batch of step 1") as caught:
        list(make_loader(source, workers=1).batches(make_specs(source, batch=4)))
    assert "\n" not in str(caught.value)


def test_close_stops_an_endless_plan() -> None:
    source = make_source(16)
    produced: list[int] = []

    def endless() -> Iterator[BatchSpec]:
        position = DataPosition()
        while True:
            spec = make_specs(source, steps=1, start=position)[0]
            position = spec.after
            produced.append(spec.step)
            yield spec

    loader = make_loader(source, prefetch_batches=2)
    iterator = loader.batches(endless())
    next(iterator)
    time.sleep(0.2)
    assert len(produced) <= 5, "no more than a few batches ahead"
    loader.close()
    count = len(produced)
    time.sleep(0.3)
    assert len(produced) == count
    loader.close()


def test_the_decoder_is_closed_at_the_end_and_when_stopped() -> None:
    decoders: list[FakeDecoder] = []

    def make() -> FakeDecoder:
        decoders.append(FakeDecoder())
        return decoders[-1]

    source = make_source(16)
    loader = TrainingLoader(
        {"web": source},
        make,
        fake_tokenizer,
        augmentation=AugmentationConfig(),
        decode=DecodeConfig(),
        prober=fake_probe,
    )
    list(loader.batches(make_specs(source)))
    next(loader.batches(make_specs(source, steps=100)))
    loader.close()
    assert [decoder.closed for decoder in decoders] == [True, True]


def test_a_stuck_thread_does_not_keep_the_program_alive(tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(
        "from support.fake_decoding import FakeDecoder, fake_probe, fake_tokenizer\n"
        "from frozen_fast.config.schema import AugmentationConfig, DecodeConfig\n"
        "from frozen_fast.data import Clip, Source, TrainingLoader, plan_steps, DataPosition\n"
        "from frozen_fast.errors import UserError\n"
        "source = Source('s', 'manifest', [Clip('a', 'hang.mp4', ('x',))])\n"
        "specs = plan_steps({'s': 1}, {'s': 1.0}, 'round_robin', 0, batch_sizes={'s': 1}, frames=1, num_steps=1,\n"
        "                   start=DataPosition())\n"
        "loader = TrainingLoader({'s': source}, FakeDecoder, fake_tokenizer, augmentation=AugmentationConfig(),\n"
        "                        decode=DecodeConfig(read_timeout_seconds=0.2), prober=fake_probe)\n"
        "try:\n    next(loader.batches(specs))\nexcept UserError as error:\n    raise SystemExit(str(error))\n"
    )
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": ":".join(folders)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith("data.decode.read_timeout_seconds"), done.stderr


def test_partial_decoder_factories_are_fine() -> None:
    source = make_source(16)
    loader = TrainingLoader(
        {"web": source},
        partial(FakeDecoder, name="named"),
        fake_tokenizer,
        augmentation=AugmentationConfig(),
        decode=DecodeConfig(),
        prober=fake_probe,
    )
    assert next(loader.batches(make_specs(source))).backends == {"named": 8}
    loader.close()
