"""ComfyUI's front end as a test drives it: open graphs, run them, look at nodes, take pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

READY = """() => (window.app?.rootGraph ?? window.app?.graph)
  && window.app.extensionManager && document.querySelector(".side-bar-button")"""
DESCRIBE = """() => {
  const graph = app.rootGraph;
  const describe = (node) => ({
    id: String(node.id), type: node.type, known: node.constructor.nodeData !== undefined, badges:
      (node.badges ?? []).map((badge) => (typeof badge === "function" ? badge() : badge).text),
    module: node.constructor.nodeData?.python_module ?? "",
    text: node.widgets?.find((widget) => widget.name === "$$node-text-preview")?.value ?? "",
    widgets: (node.widgets ?? []).filter((widget) => !widget.name.startsWith("$$"))
      .map((widget) => [widget.name, widget.value]),
    inputs: Object.fromEntries((node.inputs ?? []).map((input) => [input.name, input.link])),
  });
  const links = [...graph.links.values()].map((l) =>
    [l.id, String(l.origin_id), l.origin_slot, String(l.target_id)]);
  return { nodes: graph.nodes.map(describe), links };
}"""
RUN = """() => new Promise((resolve) => {
  const ends = ["execution_success", "execution_error", "execution_interrupted"];
  const done = (event) => {
    ends.forEach((end) => app.api.removeEventListener(end, done));
    resolve({ end: event.type, detail: event.detail });
  };
  ends.forEach((end) => app.api.addEventListener(end, done));
  // Also false when the run failed before this is answered.
  app.queuePrompt(0, 1).then((queued) => {
    if (queued === false) setTimeout(() => resolve({ end: "refused" }), 5000);
  });
})"""


class FrontEnd:
    """One page of ComfyUI. `problems` are errors of scripts, and messages on the console that name our files."""

    def __init__(self, page: Any, url: str, shots: Path | None) -> None:
        self.page = page
        self.url = url
        self.shots = shots
        self.problems: list[str] = []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        if message.type == "error" and "/extensions/" in message.text + str(message.location.get("url", "")):
            self.problems.append(f"{message.text} ({message.location.get('url')})")

    def open(self) -> None:
        """Load the page anew and wait until it can be used."""
        self.page.goto(self.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_function("() => app.extensions.some((one) => one.name === 'Hotpath.Panel')")
        self.page.wait_for_function("() => window.LiteGraph?.registered_node_types?.HotpathCache !== undefined")
        self.page.evaluate("() => { app.rootGraph ??= app.graph; }")  # as it is called in older front ends
        self.page.keyboard.press("Escape")  # the templates that a first visit shows

    def load(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Open a graph, and tell what is in it then."""
        self.page.evaluate("async (workflow) => { await app.loadGraphData(workflow); }", workflow)
        return self.describe()

    def describe(self) -> dict[str, Any]:
        return dict(self.page.evaluate(DESCRIBE))

    def node(self, node_id: str) -> dict[str, Any]:
        return next(node for node in self.describe()["nodes"] if node["id"] == node_id)

    def prompt(self) -> dict[str, Any]:
        """What the front end would queue, without the titles."""
        found = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in found.items()}

    def run(self) -> dict[str, Any]:
        """Queue the graph and wait for the end of the run."""
        return dict(self.page.evaluate(RUN))

    def setting(self, name: str, value: Any) -> None:
        self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])

    def open_panel(self) -> Any:
        """The Hotpath tab, opened when it is not; the element of the panel."""
        panel = self.page.get_by_test_id("hotpath-panel")
        if panel.count() == 0:
            self.page.locator("button.side-bar-button[aria-label^='Hotpath']").click()
        self.page.get_by_test_id("hotpath-versions").wait_for()
        return panel

    def shot(self, name: str) -> None:
        if self.shots is not None:
            self.page.screenshot(path=str(self.shots / f"{name}.png"))


FACES: dict[str, Any] = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "faces_drawn_one.png"}},
    "2": {
        "class_type": "HotpathFaceLoader",
        "inputs": {"model": "antelopev2", "engine": "onnxruntime", "precision": "fp32", "provider": "MIGraphX"},
    },
    "3": {
        "class_type": "HotpathFaces",
        "inputs": {
            "faceanalysis": ["2", 0],
            "image": ["1", 0],
            "choose": "all",
            "index": 0,
            "threshold": 0.5,
            "embeddings": False,
            "when_none": "error",
        },
    },
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 1]}},
}


def load_faces(front_end: FrontEnd, **changed: Any) -> None:
    """FACES with other inputs; what differs from all earlier runs is computed again."""
    prompt = json.loads(json.dumps(FACES))
    for node in prompt.values():
        given = node["inputs"]
        given.update({name: value for name, value in changed.items() if not isinstance(given.get(name, []), list)})
    front_end.page.evaluate("async (prompt) => { await app.loadApiJson(prompt, 'faces'); }", prompt)
    front_end.page.wait_for_function("() => app.rootGraph.nodes.length === 4")
