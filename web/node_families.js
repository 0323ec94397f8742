// Which nodes are ours, and what they look like: a quiet colour for each family, room for long texts.

import { app } from "../../scripts/app.js";

// This file is served from /extensions/<folder of the pack>/, and the server calls our nodes custom_nodes.<folder>.
const FOLDER = decodeURIComponent(/\/extensions\/([^/]+)\//.exec(new URL(import.meta.url).pathname)?.[1] ?? "");

// The title bar by a node's id; the body is the theme's. A light theme lightens it. (Categories are no help here: the
// front end has translated them by the time it asks extensions.)
const COLOURS = [
  [/^(InstantID|ApplyInstantID|FaceKeypointsPreprocessor|HotpathIdentit|HotpathInstantID|Hotpath(Load)?Block)/, "#3d3350"],
  [/^HotpathFace/, "#31455a"],
  [/^(ColorMNet|DeepEx|Hotpath(Save|Load)?Color)/, "#4a3a2c"],
  [/^(Qwen|AILab_|HotpathVLM|HotpathCaption)/, "#2f4637"],
  [/^Hotpath(ZImage|Attention|Precision|Compile|Warmup|Profile|SpeedProfile|Compare|Map)/, "#4a2f37"],
  [/^Hotpath/, "#3a3d44"],
];

const WIDE = 320; // width of a node with a text of several lines, which is narrow to read otherwise

// The front end makes a node without widgets too narrow for a long title, which it then cuts.
function titleWidth(node) {
  const pen = app.canvas?.ctx;
  if (!pen) return 0;
  pen.save();
  pen.font = node.titleFontStyle;
  const { width } = pen.measureText(node.title);
  pen.restore();
  return Math.ceil(width) + 2 * window.LiteGraph.NODE_TITLE_HEIGHT + 1;
}

export function declaredHere(nodeData) {
  return nodeData?.python_module === `custom_nodes.${FOLDER}`;
}

export function isOurs(node) {
  return declaredHere(node?.constructor?.nodeData);
}

// A colour on the node is what both renderers read (the one that draws nodes as elements does not look at its class).
// It is the family's as long as nobody has chosen another, and is not written into workflows.
function colour(nodeType, family) {
  const { setColorOption, onSerialize } = nodeType.prototype;
  nodeType.prototype.setColorOption = function (option) {
    setColorOption.call(this, option);
    this.color ??= family;
  };
  nodeType.prototype.onSerialize = function (saved) {
    onSerialize?.call(this, saved);
    if (saved.color === family) delete saved.color;
  };
}

app.registerExtension({
  name: "Hotpath.NodeFamilies",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!declaredHere(nodeData)) return;
    const family = COLOURS.find(([ids]) => ids.test(nodeData.name));
    if (family !== undefined) colour(nodeType, (nodeType.hotpathColour = family[1]));
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    node.color ??= node.constructor.hotpathColour;
    const long = node.widgets?.some((widget) => widget.type === "customtext" || widget.options?.multiline);
    const width = Math.max(titleWidth(node), long ? WIDE : 0);
    if (node.size[0] < width) node.setSize([width, node.size[1]]);
  },
});
