"""Evaluations during a run: schedule and results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from frozen_fast.config import ExperimentConfig, StagePlan, loss_batch_size
from frozen_fast.data import Source
from frozen_fast.models.retrieval_model import RetrievalModel
from frozen_fast.parallel.base import Parallel
from frozen_fast.parallel.running_statistics import average_running_statistics
from frozen_fast.records.run_folder import RunFolder
from frozen_fast.report.gallery import GalleryPage, write_gallery
from frozen_fast.training import compiling
from frozen_fast.training.journal import Journal
from frozen_fast.training.signals import StopRequest
from frozen_fast.training.task import Task

log = logging.getLogger(__name__)


class StageEvaluation:
    """Evaluates a run's model at the steps of evaluation.every."""

    def __init__(
        self,
        config: ExperimentConfig,
        parallel: Parallel,
        folder: RunFolder,
        task: Task,
        sources: Mapping[str, Source],
        num_stages: int,
        journal: Journal,
        stop: StopRequest,
    ) -> None:
        """Initialise; `sources` are evaluation.sources by name."""
        self._config, self._parallel, self._folder, self._sources = config, parallel, folder, sources
        self._task, self._num_stages, self._journal, self._stop = task, num_stages, journal, stop

    def is_due(self, plan: StagePlan, done: int) -> bool:
        """Return whether the model is evaluated after this number of steps of a stage."""
        every = self._config.evaluation.every
        if not self._sources or every == "never" or not done:
            return False
        if done < plan.steps:
            return every == "epoch" and plan.ends_epoch(done)
        return every != "end" or plan.index == self._num_stages - 1

    def run(self, plan: StagePlan, step: int, *, last: bool) -> list[dict[str, Any]] | None:
        """Evaluate on every source and write the rows to metrics.json; every rank calls it.

        Args:
            plan: the current stage; windows have its number of frames unless evaluation.frames is set.
            step: optimizer steps done.
            last: whether this is the run's last evaluation, which writes the retrieval pages.

        Returns:
            The rows; None if a stop was requested meanwhile.
        """
        rows: list[dict[str, Any]] = []
        bad_clips: list[dict[str, Any]] = []
        batch_size = loss_batch_size(self._config)
        average_running_statistics(self._parallel.model)
        eager = compiling.eager() if self._config.training.compile else nullcontext()
        pages: list[GalleryPage] = []
        with eager, self._parallel.state.whole_model() as whole:
            model = cast(RetrievalModel, whole)
            for source in self._sources.values():
                found = self._task.evaluate(
                    model,
                    source,
                    self._parallel,
                    frames=plan.frames,
                    loss_batch_size=batch_size,
                    gallery=last,
                    stop=self._stop,
                )
                if found is None:
                    return None
                rows += [{"step": step, "stage": plan.index, **row} for row in found.rows]
                bad_clips += [{"step": step, **asdict(bad)} for bad in found.bad_clips]
                if found.gallery is not None:
                    pages.append(found.gallery)
        with self._parallel.together():
            if self._parallel.is_main:
                self._folder.append_bad_clips(bad_clips)
                self._folder.add_evaluations(rows)
                self._write_galleries(pages)
                self._journal.tell_evaluations(rows)
        return rows

    def _write_galleries(self, pages: Sequence[GalleryPage]) -> None:
        videos = self._config.evaluation.gallery_videos
        for page in pages:
            try:
                write_gallery(self._folder.path, page, Path(videos).expanduser() if videos else None)
            except OSError as error:
                log.warning("a gallery page could not be written (%s); the run continues", error)
