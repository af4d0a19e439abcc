"""Memory of an evaluation of 60,000 captions and 3,000 clips, in a process of its own (docs/evaluation.md)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.runs import environment

CAPTIONS, CLIPS = 60_000, 3_000
MATRIX_BYTES = 4 * CAPTIONS * CLIPS
BLOCK_BYTES = 300_000_000
"""What docs/evaluation.md states beside the matrices."""

SCRIPT = """
import json, resource, sys
from types import SimpleNamespace
import torch
from frozen_fast.common.similarity import cosine_similarities
from frozen_fast.evaluation import Reranking, reranked_metrics, retrieval_metrics, v2t_max_over_captions
from frozen_fast.training.evaluate import similarity_in_blocks

captions, clips = int(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
text = {"embedding": torch.randn(captions, 256, generator=generator)}
video = {"embedding": torch.randn(clips, 256, generator=generator)}
own = [caption % clips for caption in range(captions)]
text["embedding"] += 0.2 * video["embedding"][own]
model = SimpleNamespace(
    device=torch.device("cpu"),
    pair_similarities=lambda text, video: cosine_similarities(text["embedding"], video["embedding"])[None],
)
start = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
grown = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
sim = similarity_in_blocks(model, text, video)
found = {"metrics": retrieval_metrics(sim, own), "second": v2t_max_over_captions(sim, own), "grown": grown()}
rows = list(range(0, captions, captions // 50))
scores = cosine_similarities(text["embedding"][rows], video["embedding"])
agree = torch.allclose(sim[rows], scores, atol=1e-6)
found |= {"agree": agree, "reranked": reranked_metrics(Reranking(names=("dual_softmax",)), sim, own)}
print(json.dumps({**found, "grown_reranking": grown()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_similarities_and_metrics_stay_within_the_stated_memory() -> None:
    command = [sys.executable, "-c", SCRIPT, str(CAPTIONS), str(CLIPS)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["agree"], "the blocks are the rows of the whole matrix"
    assert MATRIX_BYTES < found["grown"] < MATRIX_BYTES + BLOCK_BYTES
    assert found["grown_reranking"] < 3 * MATRIX_BYTES + BLOCK_BYTES
    assert 10 < found["metrics"]["t2v/R@1"] < 100 and found["second"]["t2v/R@1"] == found["metrics"]["t2v/R@1"]
    assert set(found["reranked"]["dual_softmax"]) == set(found["metrics"])
