// "Replace with ..." in the menu of a node kept for older graphs, where one newer node takes its place whole: links stay,
// and settings that mean the same are carried over.

import { app } from "../../scripts/app.js";
import { isOurs } from "./node_families.js";
import { say } from "./words.js";

const halfPrecision = (on) => (on ? "automatic" : "float32");
const film = (method) => ({
  to: "HotpathColorizeVideo",
  inputs: { video_frames: "frames", reference_image: "reference" },
  outputs: { 0: 0, 1: 3 },
  set: { method },
});
const picture = (method, input) => ({
  to: "HotpathColorizeImage",
  inputs: { [input]: "images", reference_image: "reference" },
  outputs: { 0: 0, 1: 1 },
  set: { method },
});
const colorMNet = {
  use_fp16: ["precision", halfPrecision],
  use_torch_compile: ["use_torch_compile"],
  memory_mode: ["memory_mode"],
  checkpoint: ["checkpoint"],
};
const deepExemplar = { use_torch_compile: ["use_torch_compile"], frame_propagate: ["propagate"] };

// to: the node that takes over. inputs, outputs: old socket to new. set: fixed values. widgets: old widget to
// [new widget, translation].
export const REPLACEMENTS = {
  ColorMNetVideo: { ...film("ColorMNet"), widgets: colorMNet },
  ColorMNetImage: { ...picture("ColorMNet", "image"), widgets: colorMNet },
  DeepExColorVideoNode: { ...film("Deep Exemplar"), widgets: deepExemplar },
  DeepExColorImageNode: { ...picture("Deep Exemplar", "image_to_colorize"), widgets: deepExemplar },
  InstantIDFaceAnalysis: {
    to: "HotpathFaceLoader",
    inputs: {},
    outputs: { 0: 0 },
    set: {},
    widgets: { provider: ["device", (provider) => (provider === "CPU" ? "cpu" : "auto")] },
  },
  InstantIDCacheManager: {
    to: "HotpathCache",
    inputs: { passthrough: "after" },
    outputs: { 0: 0 },
    set: {},
    widgets: { clear_cache: ["clear", (clear) => (clear === "true" ? "all" : "nothing")] },
  },
};

// An output that the newer node lacks and that something is connected to; such a node is not replaced.
export function lostOutput(node, rule) {
  return (node.outputs ?? []).find((output, slot) => output.links?.length && rule.outputs[slot] === undefined);
}

function setWidget(node, name, value) {
  const widget = node.widgets?.find((one) => one.name === name);
  const values = widget?.options?.values;
  if (widget === undefined || (Array.isArray(values) && !values.includes(value))) return;
  widget.value = value;
  widget.callback?.(value);
}

export function replace(node, rule) {
  const { graph } = node;
  const fresh = window.LiteGraph.createNode(rule.to);
  if (!fresh) return null;
  graph.beforeChange?.();
  graph.add(fresh);
  fresh.pos = [...node.pos];
  fresh.mode = node.mode;
  for (const [name, value] of Object.entries(rule.set)) setWidget(fresh, name, value);
  for (const [name, [target, translate]] of Object.entries(rule.widgets)) {
    const widget = node.widgets?.find((one) => one.name === name);
    if (widget !== undefined) setWidget(fresh, target, translate ? translate(widget.value) : widget.value);
  }
  for (const input of node.inputs ?? []) {
    const link = input.link === null ? null : graph.getLink(input.link);
    const name = rule.inputs[input.name] ?? rule.widgets[input.name]?.[0];
    const slot = name === undefined ? -1 : fresh.findInputSlot(name);
    if (link && slot >= 0) graph.getNodeById(link.origin_id)?.connect(link.origin_slot, fresh, slot);
  }
  for (const [slot, output] of (node.outputs ?? []).entries()) {
    for (const id of [...(output.links ?? [])]) {
      const link = graph.getLink(id);
      if (link) fresh.connect(rule.outputs[slot], graph.getNodeById(link.target_id), link.target_slot);
    }
  }
  graph.remove(node);
  graph.afterChange?.();
  return fresh;
}

app.registerExtension({
  name: "Hotpath.Replacements",
  getNodeMenuItems(node) {
    const rule = isOurs(node) ? REPLACEMENTS[node.type] : undefined;
    const newer = rule && window.LiteGraph.registered_node_types[rule.to];
    if (!newer) return [];
    const lost = lostOutput(node, rule);
    const name = newer.title ?? rule.to;
    if (lost === undefined) return [{ content: say("Replace with {name}", { name }), callback: () => replace(node, rule) }];
    const output = lost.localized_name ?? lost.name;
    return [{ content: say("Replace with {name} (it has no output {output})", { name, output }), disabled: true }];
  },
});
