"""The panel in the sidebar, in the browser: caches, downloads, libraries, themes and languages."""

from __future__ import annotations

import pytest
from front_end import FrontEnd, load_faces
from saved_values import SAVED

pytestmark = [pytest.mark.comfy, pytest.mark.xdist_group("browser")]


def test_the_panel_shows_and_clears_caches(front_end: FrontEnd) -> None:
    load_faces(front_end, threshold=0.41)
    assert front_end.run()["end"] == "execution_success"
    panel = front_end.open_panel()
    panel.get_by_role("button", name="Refresh").click()
    cache = panel.locator("[data-cache]").filter(has_text="faces").first
    cache.get_by_text("hit rate").wait_for()
    assert "0 kept" not in cache.inner_text()
    front_end.shot("panel_dark")
    # By keyboard: the button takes the focus, and Enter clears.
    button = cache.get_by_role("button", name="Clear the cache")
    button.focus()
    front_end.page.keyboard.press("Enter")
    panel.get_by_text("Entries cleared: ").wait_for()
    cache.get_by_text(", 0 kept").wait_for()
    assert cache.get_by_role("button", name="Clear the cache").is_disabled()


def test_the_panel_downloads_known_files_and_stops(front_end: FrontEnd) -> None:
    panel = front_end.open_panel()
    models = panel.get_by_test_id("hotpath-models")
    models.locator("summary", has_text="instantid").click()
    adapter = models.locator("[data-model=instantid-adapter]")
    adapter.get_by_role("button", name="Download").click()
    adapter.get_by_text("of 64.0 MB").wait_for()
    assert float(adapter.get_by_role("progressbar").get_attribute("value") or 0) > 0
    front_end.shot("panel_download")
    adapter.get_by_role("button", name="Stop").click()
    adapter.get_by_text("the next download goes on from there").wait_for()
    assert not panel.get_by_role("status").first.inner_text()  # "Downloading ..." is over
    # A licence that forbids commercial use must be accepted first.
    models.locator("summary", has_text="colormnet").click()
    bound = models.locator("[data-model=colormnet]")
    assert bound.get_by_role("button", name="Download").is_disabled()
    bound.get_by_role("checkbox").check()
    assert bound.get_by_role("button", name="Download").is_enabled()
    bound.get_by_role("checkbox").uncheck()


def test_a_refusal_is_said_in_the_panel(front_end: FrontEnd) -> None:
    panel = front_end.open_panel()
    front_end.page.route(
        "**/hotpath/caches/clear",
        lambda route: route.fulfill(status=404, json={"error": "<img src=x onerror=alert(1)> is no cache."}),
    )
    load_faces(front_end, threshold=0.42)
    assert front_end.run()["end"] == "execution_success"
    panel.get_by_role("button", name="Refresh").click()
    panel.get_by_role("button", name="Clear the cache").first.click()
    panel.get_by_text("<img src=x onerror=alert(1)> is no cache.").wait_for()  # as text
    assert panel.locator("img").count() == 0
    front_end.page.unroute("**/hotpath/caches/clear")


@pytest.mark.long
def test_libraries_and_the_light_theme(front_end: FrontEnd) -> None:
    panel = front_end.open_panel()
    front_end.setting("Comfy.ColorPalette", "light")
    panel.get_by_test_id("hotpath-libraries").locator("summary").first.click()
    panel.locator("[data-library=onnxruntime]").wait_for(timeout=180_000)  # every one is imported
    assert panel.locator("[data-attention=sdpa]").inner_text().startswith("sdpa: works")
    assert panel.locator("[data-library]").count() > 8
    colours = panel.evaluate("(e) => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]")
    assert colours[0] != colours[1]
    front_end.shot("panel_light")
    front_end.setting("Comfy.ColorPalette", "dark")


@pytest.mark.long
def test_the_panel_asks_only_while_it_is_seen(front_end: FrontEnd) -> None:
    panel = front_end.open_panel()
    asked: list[str] = []
    with front_end.page.expect_request("**/hotpath/overview"):  # by itself, however busy the machine is
        pass
    front_end.page.on("request", lambda request: asked.append(request.url) if "/hotpath/" in request.url else None)
    front_end.page.locator("button.side-bar-button[aria-label^='Hotpath']").click()
    panel.wait_for(state="detached")
    asked.clear()
    front_end.page.wait_for_timeout(6000)
    assert asked == []


@pytest.mark.long
def test_everything_of_ours_speaks_chinese(front_end: FrontEnd) -> None:
    """Chosen while the page is open: panel, badges, notes about older graphs, menu entries; and the colours stay."""
    panel = front_end.open_panel()
    front_end.setting("Comfy.Locale", "zh")
    panel.get_by_role("button", name="刷新").wait_for()
    front_end.page.wait_for_timeout(1500)  # the choice is sent to the server
    front_end.open()  # the front end itself translates nodes when the page is loaded
    panel = front_end.open_panel()
    for threshold in (0.37, 0.36):  # the loader runs, and is cached
        load_faces(front_end, threshold=threshold)
        assert front_end.run()["end"] == "execution_success"
    front_end.page.wait_for_function("() => app.rootGraph.getNodeById(3)?.hotpathState?.badge")
    assert any(text.endswith("秒") for text in front_end.node("3")["badges"])
    assert "已缓存" in front_end.node("2")["badges"]
    assert front_end.page.evaluate("() => app.rootGraph.getNodeById(3).color") == "#31455a"
    panel.get_by_role("button", name="清除缓存：人脸").click()
    panel.get_by_text("已清除").wait_for()
    models = panel.get_by_test_id("hotpath-models")
    models.locator("summary", has_text="InstantID").click()
    models.get_by_text("用于 SDXL 的 InstantID 适配器").wait_for()
    tab = front_end.page.locator("button.side-bar-button[aria-label^='Hotpath']")
    assert "缓存" in (tab.get_attribute("aria-label") or "")
    front_end.shot("panel_chinese")
    kind, values, _, notes = next(saved for saved in SAVED if saved[0] == "DeepExColorVideoNode" and saved[3])
    front_end.load({"last_node_id": 1, "last_link_id": 0, "nodes": [{"id": 1, "type": kind, "widgets_values": values}],
                    "links": [], "version": 0.4})  # fmt: skip
    assert front_end.node("1")["text"].count("此工作流启用了") == notes
    words = front_end.page.evaluate(
        "() => app.extensions.find((e) => e.name === 'Hotpath.Replacements')"
        ".getNodeMenuItems(app.rootGraph.getNodeById(1)).map((item) => item.content)"
    )
    assert words == ["替换为“视频上色（Hotpath）”"]
    front_end.setting("Comfy.Locale", "en")
    panel.get_by_role("button", name="Refresh").wait_for()


def test_nothing_of_ours_complained(front_end: FrontEnd) -> None:
    """Last: no script failed and no message on the console named a file of ours, in all of the above."""
    assert front_end.problems == []
