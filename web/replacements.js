// "Replace with ..." in the menu of a node kept for older graphs, where one newer node takes its place whole: links stay,
// also those to the ends of a subgraph, and settings that mean the same are carried over.

import { app } from "../../scripts/app.js";
import { isOurs } from "./node_families.js";
import { say } from "./words.js";

const halfPrecision = (on) => (on ? "automatic" : "float32");
const film = (method) => ({
  to: "HotpathColorizeVideo",
  inputs: { video_frames: "frames", reference_image: "reference" },
  outputs: { 0: 0, 1: 3 },
  set: { method },
  size: "colour_size",
});
const picture = (method, input) => ({
  to: "HotpathColorizeImage",
  inputs: { [input]: "images", reference_image: "reference" },
  outputs: { 0: 0, 1: 1 },
  set: { method },
  size: "colour_size",
});
const colorMNet = {
  use_fp16: ["precision", halfPrecision],
  use_torch_compile: ["use_torch_compile"],
  memory_mode: ["memory_mode"],
  checkpoint: ["checkpoint"],
};
const deepExemplar = { use_torch_compile: ["use_torch_compile"], frame_propagate: ["propagate"] };

// to: the node that takes over. inputs, outputs: old socket to new. set: fixed values. size: the new widget for the short
// side of target_width and target_height. widgets: old widget to [new widget, translation].
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

// The new input for an old one, by name. What is translated cannot be: the link brings the old node's values.
function inputFor(rule, name) {
  const [widget, translate] = rule.widgets[name] ?? [];
  return rule.inputs[name] ?? (translate ? undefined : widget);
}

function linked(node) {
  return (node.inputs ?? []).filter((input) => (input.link ?? null) !== null);
}

// The inputs that something is connected to and that the newer node has no place for.
export function lostInputs(node, rule) {
  return linked(node).filter((input) => inputFor(rule, input.name) === undefined);
}

function setWidget(node, name, value) {
  const widget = node.widgets?.find((one) => one.name === name);
  const values = widget?.options?.values;
  if (widget === undefined || (Array.isArray(values) && !values.includes(value))) return;
  widget.value = value;
  widget.callback?.(value);
}

function carrySize(node, fresh, name) {
  // A widget that is connected holds a value nobody chose.
  const open = linked(node).map((input) => input.name);
  const sizes = ["target_width", "target_height"].map((side) =>
    open.includes(side) ? NaN : Number(node.widgets?.find((one) => one.name === side)?.value ?? NaN),
  );
  const { max = Infinity, step2: step = 16 } = fresh.widgets?.find((one) => one.name === name)?.options ?? {};
  const short = Math.min(max, Math.round(Math.min(...sizes) / step) * step);
  if (Number.isFinite(short)) setWidget(fresh, name, short);
}

// A subgraph's ends are no nodes of it: their slots connect themselves.
function connectInput(graph, link, fresh, slot) {
  if (link.origin_id === graph.inputNode?.id) {
    graph.inputNode.slots[link.origin_slot]?.connect(fresh.inputs[slot], fresh, link.parentId);
  } else {
    graph.getNodeById(link.origin_id)?.connect(link.origin_slot, fresh, slot, link.parentId);
  }
}

function connectOutput(graph, link, fresh, slot) {
  if (link.target_id === graph.outputNode?.id) {
    graph.outputNode.slots[link.target_slot]?.connect(fresh.outputs[slot], fresh, link.parentId);
  } else {
    const target = graph.getNodeById(link.target_id);
    if (target) fresh.connect(slot, target, link.target_slot, link.parentId);
  }
}

export function replace(node, rule) {
  const { graph } = node;
  const fresh = window.LiteGraph.createNode(rule.to);
  if (!fresh) return null;
  graph.beforeChange?.();
  try {
    graph.add(fresh);
    fresh.pos = [...node.pos];
    fresh.mode = node.mode;
    // A title that somebody gave it.
    if (node.title && node.title !== window.LiteGraph.registered_node_types?.[node.type]?.title) fresh.title = node.title;
    for (const [name, value] of Object.entries(rule.set)) setWidget(fresh, name, value);
    if (rule.size) carrySize(node, fresh, rule.size);
    for (const [name, [target, translate]] of Object.entries(rule.widgets)) {
      const widget = node.widgets?.find((one) => one.name === name);
      if (widget !== undefined) setWidget(fresh, target, translate ? translate(widget.value) : widget.value);
    }
    for (const input of linked(node)) {
      const link = graph.getLink(input.link);
      const name = inputFor(rule, input.name);
      const slot = name === undefined ? -1 : fresh.findInputSlot(name);
      if (link && slot >= 0) connectInput(graph, link, fresh, slot);
    }
    for (const [slot, output] of (node.outputs ?? []).entries()) {
      for (const id of [...(output.links ?? [])]) {
        const link = graph.getLink(id);
        if (link && rule.outputs[slot] !== undefined) connectOutput(graph, link, fresh, rule.outputs[slot]);
      }
    }
    graph.remove(node);
  } finally {
    // Also after an error, or no later change could be undone.
    graph.afterChange?.();
  }
  return fresh;
}

function shown(socket) {
  return socket.localized_name ?? socket.label ?? socket.name;
}

app.registerExtension({
  name: "Hotpath.Replacements",
  getNodeMenuItems(node) {
    const rule = isOurs(node) ? REPLACEMENTS[node.type] : undefined;
    const newer = rule && window.LiteGraph.registered_node_types[rule.to];
    if (!newer) return [];
    const lost = lostOutput(node, rule);
    const name = newer.title ?? rule.to;
    if (lost !== undefined) {
      const values = { name, output: lost.localized_name ?? lost.name };
      return [{ content: say("Replace with {name} (it has no output {output})", values), disabled: true }];
    }
    const inputs = lostInputs(node, rule).map(shown).join(", ");
    const content = inputs
      ? say("Replace with {name} (links lost: {inputs})", { name, inputs })
      : say("Replace with {name}", { name });
    return [{ content, callback: () => replace(node, rule) }];
  },
});
