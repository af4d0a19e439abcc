"""The search page: its answers, what it refuses to serve, and the page itself in headless Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from frozen_fast.cli import main
from frozen_fast.search import Index
from support.datasets import write_manifest
from support.runs import REPOSITORY, environment
from support.search_runs import COLOURS, SearchRun, colour_run

pytestmark = pytest.mark.integration

HOSTILE = '<img src=x onerror="window.broken=1"><script>window.broken=2</script>'
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SearchRun:
    return colour_run(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def index(run: SearchRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four clips, the red one in two spans, the green one with a hostile caption."""
    folder = run.videos.parent
    rows = [json.loads(line) for line in run.videos.read_text().splitlines()]
    for row in rows:
        if row["id"] == "green":
            row["captions"] = [HOSTILE]
        if row["id"] == "red":
            row |= {"start_seconds": 1.0, "end_seconds": 2.0}
    manifest = write_manifest(folder / "served.jsonl", rows)
    output = tmp_path_factory.mktemp("served") / "index"
    arguments = ["--checkpoint", str(run.checkpoint), "--source", str(manifest), "--output", str(output)]
    assert main(["embed", *arguments, "--device", "cpu"]) == 0
    return output


@pytest.fixture(scope="module")
def address(index: Path) -> Iterator[str]:
    """`frozen-fast serve` as a process of its own; gives the address that it prints."""
    command = [sys.executable, "-m", "frozen_fast", "serve", "--index", str(index), "--port", "0"]
    process = subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    killer = threading.Timer(120, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("http://127.0.0.1:"), line
        yield line
    finally:
        killer.cancel()
        process.terminate()
        process.wait(20)


def get(url: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def row_of(index: Path, name: str) -> int:
    return Index(index).rows["id"].to_pylist().index(name)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_command_line_finds_the_right_clip(index: Path, colour: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["search", "--index", str(index), f"a {colour} ball moves right", "-k", "1", "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)
    assert hit["id"] == colour
    assert (hit["start_seconds"], hit["end_seconds"]) == ((1.0, 2.0) if colour == "red" else (None, None))


def test_answers(address: str, index: Path) -> None:
    status, body, headers = get(f"{address}/api/search?q=a%20blue%20ball%20moves%20right&k=2")
    hits = json.loads(body)["hits"]
    assert status == 200 and [hit["rank"] for hit in hits] == [1, 2] and hits[0]["id"] == "blue"
    assert "script-src 'self'" in headers["content-security-policy"]
    similar = json.loads(get(f"{address}/api/similar/{hits[0]['row']}?k=9")[1])["hits"]
    assert len(similar) == 3 and "blue" not in {hit["id"] for hit in similar}
    filtered = json.loads(get(f"{address}/api/search?q=a%20ball&where=id%3Dyellow")[1])["hits"]
    assert [hit["id"] for hit in filtered] == ["yellow"]
    assert json.loads(get(f"{address}/api/facts")[1]) == Index(index).facts()
    status, body, _ = get(f"{address}/api/search?q=%20")
    assert status == 400 and json.loads(body)["error"].startswith("text: got an empty text")


def test_clips_are_served_by_row_and_in_ranges(address: str, index: Path, run: SearchRun) -> None:
    row = row_of(index, "blue")
    content = (run.videos.parent / "blue.webm").read_bytes()
    status, body, headers = get(f"{address}/media/{row}")
    assert (status, body, headers["content-type"]) == (200, content, "video/webm")
    status, body, _ = get(f"{address}/media/{row}", Range="bytes=10-19")
    assert (status, body) == (206, content[10:20])
    status, body, headers = get(f"{address}/preview/{row}")
    assert status == 200 and body[:2] == b"\xff\xd8" and headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/media/../../../../etc/passwd", 404),
        ("/media/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("/media//etc/passwd", 404),
        ("/media/etc", 422),
        ("/media/99", 400),
        ("/media/-1", 400),
        ("/preview/99", 400),
        ("/api/similar/99", 400),
        ("/api/search?q=x&k=100000", 422),
        ("/search.html", 404),
        ("/index.json", 404),
        ("/docs", 404),
    ],
)
def test_nothing_else_is_served(address: str, path: str, status: int) -> None:
    found, body, _ = get(address + path)
    assert found == status and b"root:" not in body


def test_other_names_of_this_machine_are_refused(address: str) -> None:
    """A foreign page whose name resolves to 127.0.0.1 gets nothing."""
    assert get(f"{address}/api/facts", Host="evil.example")[0] == 400


def test_a_file_that_took_a_clips_place_is_not_served(run: SearchRun, tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from frozen_fast.search.serve import create_app

    clip = tmp_path / "clips" / "a.webm"
    clip.parent.mkdir()
    shutil.copyfile(run.videos.parent / "red.webm", clip)
    where = ["--checkpoint", str(run.checkpoint), "--source", str(clip.parent), "--output", str(tmp_path / "i")]
    assert main(["embed", *where, "--device", "cpu"]) == 0
    client = TestClient(create_app(Index(tmp_path / "i"), ["testserver"]))
    assert client.get("/media/0").status_code == 200
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    clip.unlink()
    clip.symlink_to(secret)
    for kind in ("media", "preview"):
        answer = client.get(f"/{kind}/0")
        assert answer.status_code == 400 and "a.webm is changed since it was embedded" in answer.json()["error"]


def test_a_busy_port_and_a_missing_index(index: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = address.rpartition(":")[2]
    assert main(["serve", "--index", str(index), "--port", port]) == 2
    assert f"--host, --port: got 127.0.0.1, {port}" in capsys.readouterr().err
    assert main(["serve", "--index", str(index / "nothing"), "--port", "0"]) == 2


def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    """Query, results, a video that plays inside its span, similar clips, and a caption that stays text."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium (on Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1100, "height": 760})
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(address)
            page.fill("#query", "a red ball moves right")
            page.click("button[type=submit]")
            page.wait_for_selector("#results li")
            assert page.locator("#results li").first.get_attribute("data-id") == "red"
            assert page.locator("#results li").count() == 4
            inside = "() => { const v = document.querySelector('#results li video'); "
            page.wait_for_function(inside + "return !v.paused && v.currentTime > 1.05; }", timeout=20_000)
            assert page.evaluate(inside + "return v.currentTime; }") < 2.3
            assert "1 s to 2 s" in page.locator("#results li .where").first.inner_text()
            green = page.locator("#results li[data-id=green] .caption")
            assert green.inner_text() == HOSTILE and page.evaluate("window.broken") is None
            page.wait_for_function("() => [...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
            shot = Path(os.environ.get("FROZEN_FAST_SCREENSHOT", tmp_path / "search_page.png"))
            page.screenshot(path=str(shot))
            assert shot.stat().st_size > 5_000
            page.locator("details summary").click()
            assert "fingerprint" in page.locator("#facts").inner_text()
            page.locator("#results li[data-id=red] .similar").click()
            page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Clips similar')")
            assert page.locator("#results li").count() == 3
            page.fill("#where", "colour=red")
            page.click("button[type=submit]")
            page.wait_for_selector("#status.error")
            assert page.locator("#status").inner_text().startswith("--where: got 'colour'")
            assert not problems, problems
        finally:
            browser.close()
