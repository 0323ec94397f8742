// Which nodes are ours, and what they look like: a quiet colour for each family, room for long texts.

import { app } from "../../scripts/app.js";

// This file is served from /extensions/<folder of the pack>/, and the server calls our nodes custom_nodes.<folder>.
const FOLDER = decodeURIComponent(/\/extensions\/([^/]+)\//.exec(new URL(import.meta.url).pathname)?.[1] ?? "");

// The title bar by the first part of a category; the body is the theme's. A light theme lightens it.
const COLOURS = [
  [/^(Hotpath\/InstantID|InstantID)/, "#3d3350"],
  [/^Hotpath\/faces/, "#31455a"],
  [/^(Hotpath\/colori[sz]ation|ColorMNet|DeepExemplar)/, "#4a3a2c"],
  [/^(Hotpath\/vision-language|Comfyui_QwenVL|🧪AILab)/, "#2f4637"],
  [/^Hotpath\/(text to image|acceleration|compare|map)/, "#4a2f37"],
  [/^Hotpath/, "#3a3d44"],
];

const WIDE = 320; // width of a node with a text of several lines, which is narrow to read otherwise

export function isOurs(node) {
  return node?.constructor?.nodeData?.python_module === `custom_nodes.${FOLDER}`;
}

app.registerExtension({
  name: "Hotpath.NodeFamilies",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== `custom_nodes.${FOLDER}`) return;
    const family = COLOURS.find(([category]) => category.test(nodeData.category));
    if (family === undefined) return;
    // On the class, not on the node: a colour that somebody chose wins, and none is written into workflows.
    nodeType.color = family[1];
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    const long = node.widgets?.some((widget) => widget.type === "customtext" || widget.options?.multiline);
    if (long && node.size[0] < WIDE) node.setSize([WIDE, node.size[1]]);
  },
});
