"""What a person sees in the browser: graphs open right, and nodes tell what became of them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from front_end import FrontEnd, load_faces
from saved_values import SAVED, saved_names, widget_values

pytestmark = [pytest.mark.comfy, pytest.mark.xdist_group("browser")]

ROOT = Path(__file__).resolve().parent.parent.parent
SHARED = sorted(
    [
        *(ROOT / "tests" / "data" / "workflows").glob("*.json"),
        *(ROOT / "tests" / "data").glob("vision_language/Qwen*.json"),
    ]
)
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
# Nodes of other packs in shared workflows; what they are connected to is still checked.
FOREIGN = {"ShowText|pysssss"}
OF_THE_BROWSER = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def links_of(workflow: dict[str, Any]) -> set[tuple[Any, ...]]:
    """(link, node it comes from, its output, node it goes to). Inputs are compared by name: the front end orders them."""
    return {(link[0], str(link[1]), link[2], str(link[3])) for link in workflow["links"]}


def check_opened(workflow: dict[str, Any], opened: dict[str, Any]) -> None:
    """No node missing, every link where it was, every saved value in the widget it was saved from."""
    known = {node["id"]: node for node in opened["nodes"]}
    missing = {n["type"] for n in opened["nodes"] if not n["known"]} - OF_THE_BROWSER - FOREIGN
    assert not missing, f"missing nodes: {missing}"
    assert {tuple(link) for link in opened["links"]} == links_of(workflow)
    for saved in workflow["nodes"]:
        node = known[str(saved["id"])]
        for socket in saved.get("inputs") or []:
            if socket.get("link") is not None:
                assert node["inputs"].get(socket["name"]) == socket["link"], f"{node['type']}.{socket['name']}"
        if not node["module"].startswith("custom_nodes.comfyui-hotpath"):
            continue
        values = saved.get("widgets_values") or []
        shown = [value for _, value in node["widgets"]]
        assert shown[: len(values)] == values, f"{node['type']} shows {node['widgets']}"


def test_every_extension_of_ours_is_loaded(front_end: FrontEnd) -> None:
    names = front_end.page.evaluate("() => app.extensions.map((one) => one.name)")
    expected = {"Panel", "NodeState", "NodeFamilies", "Replacements", "SavedLayouts"}
    assert {f"Hotpath.{name}" for name in expected} <= set(names)
    assert front_end.problems == []


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_a_shared_workflow_opens(front_end: FrontEnd, path: Path) -> None:
    workflow = read(path)
    opened = front_end.load(workflow)
    check_opened(workflow, opened)
    prompt = front_end.prompt()  # and can be queued: what it needs is in it
    ours = [n["id"] for n in opened["nodes"] if n["module"].startswith("custom_nodes.comfyui-hotpath")]
    assert ours and all(node_id in prompt for node_id in ours)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_and_is_its_api_twin(front_end: FrontEnd, path: Path) -> None:
    workflow = read(path)
    check_opened(workflow, front_end.load(workflow))
    twin = read(path.parent / "api" / f"{path.stem}.api.json")
    prompt = front_end.prompt()
    assert prompt.keys() == twin.keys()
    for key, node in prompt.items():
        assert node["class_type"] == twin[key]["class_type"]
        # The browser adds fields of its own, such as a player's, and inputs that are newer than the example.
        inputs = {name: value for name, value in node["inputs"].items() if name in twin[key]["inputs"]}
        assert inputs == twin[key]["inputs"], node["class_type"]


def test_graphs_of_older_layouts(front_end: FrontEnd) -> None:
    """One graph with a node of every older layout; Python's reader of the tables says what the values mean."""
    nodes = [
        {"id": n, "type": kind, "pos": [n % 4 * 420, n // 4 * 520], "size": [380, 300], "widgets_values": values}
        for n, (kind, values, _, _) in enumerate(SAVED, 1)
    ]
    front_end.load({"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "version": 0.4})
    for n, (kind, values, _, notes) in enumerate(SAVED, 1):
        node = front_end.node(str(n))
        meant = widget_values(kind, values)
        assert meant is not None and meant.items() <= dict(node["widgets"]).items(), kind
        assert node["text"].count("⚠") == notes, f"{kind} says {node['text']!r}"
    front_end.shot("older_layouts")
    # An undo opens the graph as it is by then.
    front_end.load(front_end.page.evaluate("() => app.rootGraph.serialize()"))
    assert [front_end.node(str(n))["text"].count("⚠") for n in range(1, len(SAVED) + 1)] == [one[3] for one in SAVED]


def test_graphs_of_older_layouts_that_say_names(front_end: FrontEnd) -> None:
    """Newer front ends save the values by name, too, and restore them by these where the user has chosen so."""
    nodes = [
        {"id": n, "type": kind, "widgets_values": values, "widgets_values_named": saved_names(kind, values)}
        for n, (kind, values, _, _) in enumerate(SAVED, 1)
    ]
    graph = {"last_node_id": len(nodes), "last_link_id": 0, "nodes": nodes, "links": [], "version": 0.4}
    choose = "(by) => app.extensionManager.setting.set('Comfy.Workflow.NamedValuesRestore', by)"
    try:
        for by_name in (False, True):
            front_end.page.evaluate(choose, by_name)
            front_end.load(json.loads(json.dumps(graph)))
            for n, (kind, values, _, _) in enumerate(SAVED, 1):
                meant = widget_values(kind, values)
                assert meant is not None and meant.items() <= dict(front_end.node(str(n))["widgets"]).items(), kind
    finally:
        front_end.page.evaluate(choose, False)


def test_a_first_picture_called_image_keeps_its_link(front_end: FrontEnd) -> None:
    graph = {
        "last_node_id": 2,
        "last_link_id": 1,
        "version": 0.4,
        "nodes": [
            {"id": 1, "type": "LoadImage", "widgets_values": ["colorize_small.png", "image"],
             "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}]},
            {"id": 2, "type": "QwenVL", "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
             "widgets_values": ["ask", "Qwen2.5-VL-7B-Instruct", "none", False, 0.7, 512, 7, "fixed"]},
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    }  # fmt: skip
    # Newer front ends look at names before nodes are configured, in subgraphs too.
    renamed = front_end.page.evaluate(
        "async (graph) => { await app.extensions.find((e) => e.name === 'Hotpath.SavedLayouts').beforeConfigureGraph(graph);"
        " return [graph, ...graph.definitions.subgraphs].map(({ nodes }) => nodes[1].inputs[0].name); }",
        {**graph, "definitions": {"subgraphs": [{"nodes": graph["nodes"]}]}},
    )
    assert renamed == ["image1", "image1"]
    front_end.load(graph)
    assert front_end.prompt()["2"]["inputs"]["image1"] == ["1", 0]


def test_nodes_tell_what_became_of_them(front_end: FrontEnd) -> None:
    """Computed, then cached; a report and a warning on the node; all of it again after the page was reloaded."""
    load_faces(front_end)
    front_end.page.evaluate(  # little room under the third node
        "() => { const [node, next] = [3, 4].map((id) => app.rootGraph.getNodeById(id));"
        " next.pos = [node.pos[0], node.pos[1] + node.size[1] + 118]; }"
    )
    assert front_end.run()["end"] == "execution_success"
    front_end.page.wait_for_function("() => app.rootGraph.getNodeById(3)?.hotpathState?.badge")
    loader, faces = front_end.node("2"), front_end.node("3")
    assert any(text.endswith("s") and text[0].isdigit() for text in faces["badges"]), faces["badges"]
    assert "1 face" in faces["text"] and "⚠" not in faces["text"]
    # The provider is for AMD on Linux, so that it cannot be had here; the loader says so and goes on.
    assert "⚠ 1" in loader["badges"]
    assert loader["text"].startswith("⚠ Faces run on torch: onnxruntime MIGraphX was asked for")
    assert "Faces by torch" in loader["text"]
    room = front_end.page.evaluate(
        "() => app.rootGraph.getNodeById(2).widgets.find((w) => w.name === '$$node-text-preview').options.getMinHeight()"
    )
    assert 58 < room <= 9 * 18 + 30  # the front end gives it two lines
    between = front_end.page.evaluate(
        "() => { const [node, next] = [3, 4].map((id) => app.rootGraph.getNodeById(id));"
        " return next.pos[1] - LiteGraph.NODE_TITLE_HEIGHT - node.pos[1] - node.size[1]; }"
    )
    assert between >= 0  # reports never grow into another node
    front_end.page.evaluate(  # as newer front ends do when a run ends
        "() => app.api.addEventListener('execution_success', () => app.rootGraph.nodes.forEach((node) => {"
        " const at = node.widgets?.findIndex((w) => w.name === '$$node-text-preview') ?? -1;"
        " if (at >= 0) { node.widgets[at].onRemove?.(); node.widgets.splice(at, 1); } }))"
    )
    front_end.page.evaluate("() => { app.rootGraph.getNodeById(3).widgets.find((w) => w.name === 'index').value = 1; }")
    assert front_end.run()["end"] == "execution_success"
    front_end.page.wait_for_function("() => app.rootGraph.getNodeById(2)?.hotpathState?.badge === 'cached'")
    loader = front_end.node("2")
    assert loader["text"].startswith("⚠ Faces run on torch") and "1 face" in front_end.node("3")["text"]
    assert "cached" in loader["badges"] and "⚠ 1" in loader["badges"]
    assert "cached" not in front_end.node("3")["badges"]
    front_end.page.wait_for_timeout(1500)  # the front end saves its draft after a while
    front_end.open()
    front_end.page.wait_for_function("() => app.rootGraph.getNodeById(3)?.hotpathState?.badge")
    again = front_end.node("2")
    assert again["text"] == loader["text"] and again["badges"] == loader["badges"]
    assert "1 face" in front_end.node("3")["text"]
    front_end.shot("node_state")
    preview = front_end.page.evaluate("async () => (await fetch('/history')).json()")
    assert any("4" in entry["outputs"] for entry in preview.values())
    # A text that grows is shown at once and kept now and then, as all states are written when one is.
    writes, kept = front_end.page.evaluate(
        "async () => { const { api } = await import('/scripts/api.js'); const set = Storage.prototype.setItem; let writes = 0;"
        " Storage.prototype.setItem = function (key, value) {"
        "   writes += key === 'Hotpath.NodeState'; return set.call(this, key, value); };"
        " const tell = (name, detail) => api.dispatchCustomEvent(name, detail);"
        " tell('executing', '3');"
        " for (let i = 1; i <= 50; i++) tell('progress_text', { nodeId: '3', text: `word ${i}` });"
        " tell('executing', null); Storage.prototype.setItem = set;"
        " return [writes, sessionStorage.getItem('Hotpath.NodeState')]; }"
    )
    assert writes <= 3 and "word 50" in kept and front_end.node("3")["text"] == "word 50"


def test_a_node_in_a_subgraph_has_its_text_when_that_is_opened(front_end: FrontEnd) -> None:
    load_faces(front_end, threshold=0.44)
    front_end.page.evaluate(
        "() => { const of = (id) => app.rootGraph.getNodeById(id);"
        " app.rootGraph.convertToSubgraph(new Set([of(2), of(3)])); }"
    )
    assert front_end.run()["end"] == "execution_success"
    front_end.page.evaluate(
        "() => { const node = app.rootGraph.nodes.find((one) => one.subgraph); app.canvas.openSubgraph(node.subgraph, node); }"
    )
    front_end.page.wait_for_function(
        "() => app.canvas.graph.getNodeById(3)?.widgets.some((w) => w.name.startsWith('$$') && w.value.includes('1 face'))"
    )
    # Older front ends make no field there: then it is one of ours, and no value of the node either.
    saved = front_end.page.evaluate(
        "async () => { const { api } = await import('/scripts/api.js'); const node = app.canvas.graph.getNodeById(3);"
        " const { subgraph } = app.rootGraph.nodes.find((one) => one.subgraph) , { dispatchCustomEvent } = api;"
        " const taken = () => node.widgets.splice(node.widgets.findIndex((w) => w.name.startsWith('$$')), 1)[0].onRemove?.();"
        " taken(); const before = node.serialize().widgets_values.length; app.canvas.setGraph(app.rootGraph);"
        " api.dispatchCustomEvent = () => true; app.canvas.setGraph(subgraph); await new Promise((done) => setTimeout(done, 50));"
        " api.dispatchCustomEvent = dispatchCustomEvent; return [before, node.serialize().widgets_values.length]; }"
    )
    assert saved[0] == saved[1] > 0
    front_end.page.locator(".hotpath-report", has_text="1 face").wait_for()
    front_end.shot("subgraph")
    front_end.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")


def test_what_a_run_says_goes_to_its_own_workflow(front_end: FrontEnd) -> None:
    """Another workflow is opened while a run waits: that one has other nodes under the same ids."""
    page = front_end.page

    def tell(name: str, detail: Any) -> None:
        page.evaluate("([name, detail]) => { app.api.dispatchCustomEvent(name, detail); }", [name, detail])

    load_faces(front_end)
    page.evaluate("() => sessionStorage.removeItem('Hotpath.NodeState')")
    graph = {**page.evaluate("() => app.rootGraph.serialize()"), "id": "7c0e9f3a-0000-4000-8000-000000000001"}
    other = {**graph, "id": "7c0e9f3a-0000-4000-8000-000000000002"}
    front_end.load(graph)
    page.route("**/prompt", lambda route: route.fulfill(json={"prompt_id": "later", "number": 1, "node_errors": {}}))
    page.evaluate("async () => { await app.api.queuePrompt(0, { output: {}, workflow: {} }); }")
    page.unroute("**/prompt")
    front_end.load(other)
    tell("execution_start", {"prompt_id": "later"})
    tell("execution_cached", {"prompt_id": "later", "nodes": ["2"]})
    tell("executing", "3")
    tell("hotpath.warning", {"node": "3", "text": "with care"})
    for text in ("wo", "word"):
        tell("progress_text", {"nodeId": "3", "text": text})
    tell("executing", None)
    tell("execution_success", {"prompt_id": "later"})
    for node_id in ("2", "3"):
        node = front_end.node(node_id)
        assert not node["text"] and not any(node["badges"][-2:]), node
    page.evaluate("() => { window.hotpathBadges = app.rootGraph.getNodeById(3).badges; }")
    front_end.load(graph)
    assert front_end.node("3")["text"] == "⚠ with care\n\nword" and front_end.node("2")["badges"][-1] == "cached"
    assert front_end.node("3")["badges"][-2] == "⚠ 1" and front_end.node("3")["badges"][-1]
    # Older front ends that draw nodes as elements keep the badges of the other workflow's node.
    kept = page.evaluate("() => window.hotpathBadges.map((badge) => badge().text)")
    assert kept == front_end.node("3")["badges"]
    # A run whose server went away has not ended, and an undo in a run makes the nodes anew.
    tell("execution_start", {"prompt_id": "lost"})
    tell("executing", "3")
    tell("execution_start", {"prompt_id": "next"})
    tell("executing", "2")
    assert not front_end.node("3")["badges"][-1]
    tell("hotpath.warning", {"node": "2", "text": "with care"})
    page.evaluate(
        "async () => { const { activeWorkflow } = app.extensionManager.workflow;"
        " await app.loadGraphData(app.rootGraph.serialize(), false, false, activeWorkflow); }"
    )
    tell("executing", "2")  # as to a page that was without a connection for a moment
    tell("execution_success", {"prompt_id": "next"})
    assert front_end.node("2")["text"] == "⚠ with care" and front_end.node("2")["badges"][-1]


def test_what_a_report_holds_is_text(front_end: FrontEnd) -> None:
    """A model's answer, or a name in somebody's workflow, on front ends that show a node's text as HTML, or as it is."""
    load_faces(front_end)
    front_end.page.evaluate(
        "() => app.api.dispatchCustomEvent('progress_text',"
        " { nodeId: '3', text: 'so 1 < 2 && <b>3</b> &lt; <img src=x onerror=\"window.hotpathRan = 1\">' })"
    )
    # An invisible joiner stands where a tag would begin, and nowhere else: not in a command, say.
    front_end.page.get_by_text("so 1 < 2 && <\u2060b>3<\u2060/b> &\u2060lt; <\u2060img").wait_for()
    assert not front_end.page.evaluate("() => window.hotpathRan")


def test_a_run_that_fails_leaves_no_time(front_end: FrontEnd) -> None:
    load_faces(front_end, image="captioner_shapes_1.png")
    assert front_end.run()["end"] == "execution_error"
    front_end.page.keyboard.press("Escape")
    assert not any(text.endswith("s") and text[0].isdigit() for text in front_end.node("3")["badges"] if text)


def test_colours_and_titles(front_end: FrontEnd) -> None:
    """A family has its title colour, which is never written into a workflow; a chosen colour wins."""
    load_faces(front_end)
    found = front_end.page.evaluate(
        "() => { const node = app.rootGraph.getNodeById(3); const says = () => [node.color, node.serialize().color ?? null];"
        " const found = [says()];"
        " for (const option of [{ color: '#223', bgcolor: '#335' }, null]) { node.setColorOption(option); found.push(says()); }"
        " return found; }"
    )
    assert found == [["#31455a", None], ["#223", "#223"], ["#31455a", None]]
    # Room for the whole title, also where no widget makes room.
    cut = front_end.page.evaluate(
        "() => { const pen = app.canvas.ctx; return ['FaceKeypointsPreprocessor', 'HotpathAttentionReport'].filter((type) => {"
        " const node = LiteGraph.createNode(type); pen.font = node.titleFontStyle;"
        " return pen.measureText(node.title).width > node.size[0] - 2 * LiteGraph.NODE_TITLE_HEIGHT; }); }"
    )
    assert cut == []


def test_an_older_node_is_replaced_from_its_menu(front_end: FrontEnd) -> None:
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "colorize_grey.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "colorize_reference.png"}},
        "3": {
            "class_type": "DeepExColorVideoNode",
            "inputs": {"video_frames": ["1", 0], "reference_image": ["2", 0], "frame_propagate": False,
                       "use_half_resolution": True, "target_width": 64, "target_height": 64,
                       "use_torch_compile": False, "use_sage_attention": False},
        },
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }  # fmt: skip
    front_end.page.evaluate("async (prompt) => { await app.loadApiJson(prompt, 'older'); }", prompt)
    words = front_end.page.evaluate(
        "() => { const node = app.rootGraph.getNodeById(3);"
        " const one = app.extensions.find((e) => e.name === 'Hotpath.Replacements');"
        " const [item] = one.getNodeMenuItems(node); item.callback(); return item.content; }"
    )
    assert words == "Replace with Colorize Video (Hotpath)"
    older, prompt = prompt, front_end.prompt()
    (new_id,) = [key for key, node in prompt.items() if node["class_type"] == "HotpathColorizeVideo"]
    inputs = prompt[new_id]["inputs"]
    assert inputs["frames"] == ["1", 0] and inputs["reference"] == ["2", 0]
    assert inputs["method"] == "Deep Exemplar" and inputs["propagate"] is False
    assert prompt["4"]["inputs"]["images"] == [new_id, 0] and prompt["5"]["inputs"]["source"] == [new_id, 3]
    assert "DeepExColorVideoNode" not in {node["class_type"] for node in prompt.values()}
    # Alone in a subgraph, all its links lead to the ends of it.
    front_end.page.evaluate("async (prompt) => { await app.loadApiJson(prompt, 'inside'); }", older)
    front_end.page.evaluate(
        "() => { const { subgraph } = app.rootGraph.convertToSubgraph(new Set([app.rootGraph.getNodeById(3)]));"
        " const one = app.extensions.find((e) => e.name === 'Hotpath.Replacements');"
        " one.getNodeMenuItems(subgraph.nodes[0])[0].callback(); }"
    )
    prompt = front_end.prompt()
    (new_id,) = [key for key, node in prompt.items() if node["class_type"] == "HotpathColorizeVideo"]
    inputs = prompt[new_id]["inputs"]
    assert inputs["frames"] == ["1", 0] and inputs["reference"] == ["2", 0] and inputs["colour_size"] == 64
    assert prompt["4"]["inputs"]["images"] == [new_id, 0] and prompt["5"]["inputs"]["source"] == [new_id, 3]


@pytest.mark.long
def test_templates_list_the_examples_and_no_api_twins(front_end: FrontEnd) -> None:
    with urllib.request.urlopen(f"{front_end.url}/api/workflow_templates", timeout=30) as answer:
        listed = json.load(answer)["comfyui-hotpath"]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
    front_end.page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = front_end.page.get_by_role("dialog")
    dialog.get_by_text("comfyui-hotpath").first.click()
    dialog.get_by_text("faces_find_and_match").first.wait_for()
    front_end.shot("templates")
    front_end.page.keyboard.press("Escape")


@pytest.mark.long
def test_the_other_renderer_shows_the_same(front_end: FrontEnd) -> None:
    front_end.setting("Comfy.VueNodes.Enabled", True)
    load_faces(front_end, provider="DirectML")
    assert front_end.run()["end"] == "execution_success"
    front_end.page.get_by_text("⚠ 1").first.wait_for()
    node = front_end.page.locator("[data-node-id='3']")
    body = node.get_by_test_id("node-inner-wrapper")
    assert body.evaluate("(e) => getComputedStyle(e).backgroundColor") == "rgb(49, 69, 90)"
    node.get_by_text("1 face").first.wait_for()
    front_end.shot("vue_nodes")
    front_end.setting("Comfy.VueNodes.Enabled", False)


def test_nothing_of_ours_complained(front_end: FrontEnd) -> None:
    """Last: no script failed and no message on the console named a file of ours, in all of the above."""
    assert front_end.problems == []
