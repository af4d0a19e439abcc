"""The retrieval page: what it shows, hostile captions, and its search and filter in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from frozen_fast.data import Clip
from frozen_fast.models.experts.expert_model import CollaborativeExperts
from frozen_fast.report.gallery import write_gallery
from frozen_fast.report.write_report import write_report
from frozen_fast.training.gallery_page import gallery_page
from support.expert_models import PlainExpertModel, write_upstream_checkpoint
from support.run_folder import make_run_folder
from support.runs import write_clip

HOSTILE = '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Four clips, one query each; the model finds its own clip at ranks 1, 2, 1 and 4."""
    experts = {"audio": (5, 3), "face": (6, 0)}
    checkpoint = write_upstream_checkpoint(tmp_path / "m.pth", PlainExpertModel("ce", experts, text=(6, 4, 1)))
    model = CollaborativeExperts.from_pretrained(checkpoint)
    texts = ["a dog runs", HOSTILE, "a cat sleeps", "two people talk"]
    (tmp_path / "videos").mkdir()
    write_clip(tmp_path / "videos" / "clip0.avi", 0)
    (tmp_path / "videos" / "clip0.avi").rename(tmp_path / "videos" / "clip0.mp4")
    write_clip(tmp_path / "videos" / "clip1.avi", 1)
    clips = [Clip(id=f"clip{i}", path=str(tmp_path / "store"), captions=(text,)) for i, text in enumerate(texts)]
    sim = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.8, 0.7, 0.1, 0.0], [0.1, 0.2, 0.5, 0.3], [0.9, 0.8, 0.7, 0.1]])
    weights = torch.tensor([[0.25, 0.75]] * 4)
    made = gallery_page(
        model, "val/1 k", clips, texts, [0, 1, 2, 3], sim, {"weights": weights}, {"t2v/R@1": 50.0}, queries=100
    )
    assert sorted(query.rank for query in made.queries) == [1, 1, 2, 4]
    by_text = {query.text: query for query in made.queries}
    assert [one.clip.id for one in by_text["two people talk"].found] == ["clip0", "clip1", "clip2", "clip3"]
    assert by_text["a dog runs"].weights == (("audio", 0.25), ("face", 0.75))
    assert [query.text for query in made.best] == ["a dog runs", "a cat sleeps", HOSTILE, "two people talk"]
    assert made.worst == made.best[::-1]
    return write_gallery(tmp_path, made, tmp_path / "videos")


def test_captions_are_escaped_and_videos_are_relative(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.name == "gallery_val_1_k.html"
    assert "<script>document.title" not in text and "&lt;script&gt;document.title" in text and "<img src=x" not in text
    assert 'src="videos/clip0.mp4"' in text and str(page.parent) not in text
    assert "0.75" in text and "R@1 <b>50.0</b>" in text


def test_a_frame_is_shown_where_a_browser_plays_no_video(page: Path) -> None:
    """clip0 is a playable file, clip1 is not, the others have none."""
    text = page.read_text(encoding="utf-8")
    assert text.count('<img src="data:image/jpeg;base64,') == text.count('alt="middle frame of clip1"') == 5
    assert text.count("<video") == text.count('poster="data:image/jpeg') == 5 and "clip1.avi" not in text
    assert text.count("no video file") == 4 * 5 - 10


def test_the_report_names_the_best_and_the_worst_and_links_the_page(page: Path) -> None:
    folder = make_run_folder(page.parent / "run", frames=(1,))
    for name in (page, page.with_suffix(".json")):
        name.rename(folder / name.name)
    markdown, html = (path.read_text(encoding="utf-8") for path in write_report(folder))
    assert '<a href="gallery_val_1_k.html">Retrieval page of val/1 k: 4 of 4 queries' in html
    assert "](gallery_val_1_k.html)" in markdown and "| worst" in markdown
    assert "<script>document.title" not in html and "&lt;script&gt;document.title" in html
    assert "<script>" not in markdown.replace("\\<", "")
    (folder / "gallery_val_1_k.json").write_text("{}", encoding="utf-8")
    markdown = write_report(folder)[0].read_text(encoding="utf-8")
    assert "gallery_val_1_k.json cannot be read in full" in markdown


@pytest.mark.integration
@pytest.mark.slow
def test_the_page_filters_and_searches_in_a_browser(page: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium (on Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.goto(page.as_uri())
        assert tab.title().startswith("Retrieval on val"), "a caption's script did not run"
        assert tab.inner_text("#shown") == "4 of 4 queries"
        tab.select_option("#rank", "1")
        assert tab.inner_text("#shown") == "2 of 4 queries"
        tab.select_option("#rank", "all")
        tab.fill("#search", "NOTHING LIKE THIS")
        assert tab.inner_text("#shown") == "0 of 4 queries"
        tab.fill("#search", "CLIP1")
        assert tab.inner_text("#shown") == "1 of 4 queries"
        tab.fill("#search", "")
        tab.select_option("#order", "worst")
        assert tab.locator("article h2").first.inner_text() == "two people talk"
        browser.close()
