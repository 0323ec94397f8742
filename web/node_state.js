// What became of each of our nodes in the last run, on the node: computed in so many seconds or taken from ComfyUI's
// cache, its report, and warnings. Kept for the session of the browser tab, so that it is still there after a reload.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { isOurs } from "./node_families.js";
import { graphKeys, nodeOf, ourNodes, runElsewhere, runEnds, runStarts } from "./runs.js";
import { onLanguage, say } from "./words.js";

const STORE = "Hotpath.NodeState";
const LONGEST = 4000; // characters of a report that are kept
const MOST = 40; // workflows that are kept
const KEPT_EVERY = 3000; // milliseconds between two times that a growing text is kept; all that is kept is written anew
const WARNING = "⚠"; // as a badge and before the sentence
const MARKUP = /<(?=[A-Za-z/!?])|&(?=[A-Za-z#])/g; // where a tag or the name of a letter may begin
const FIELD = { letter: 6, line: 18, margins: 60, gap: 10, most: 9 }; // pixels of the text on a node, and lines

let running = null; // { id, state, since, kept }

export function duration(seconds) {
  if (seconds < 1) return say("{count} ms", { count: Math.round(seconds * 1000) });
  if (seconds < 9.95) return say("{count} s", { count: seconds.toFixed(1) });
  const whole = Math.round(seconds);
  if (whole < 100) return say("{count} s", { count: whole });
  return say("{minutes} min {seconds} s", { minutes: Math.floor(whole / 60), seconds: whole % 60 });
}

// badge: "" before a run, "cached", or the seconds it took.
function blank() {
  return { badge: "", text: "", warnings: [] };
}

function stateOf(node) {
  return (node.hotpathState ??= blank());
}

// One of our nodes that the server tells of: { id, type, node, state }, with node null while another workflow is open than
// the one that runs. Null for what is not ours.
function told(given) {
  const id = String(given);
  const elsewhere = runElsewhere();
  const node = elsewhere === null ? nodeOf(id) : null;
  const type = elsewhere === null ? isOurs(node) && node.type : elsewhere.ours.get(id);
  if (!type) return null;
  // The node that runs may have been made anew since, as by an undo.
  const state = running?.id === id ? running.state : node === null ? keptState(elsewhere.key, id, type) : stateOf(node);
  if (node !== null) node.hotpathState = state;
  return { id, type, node, state };
}

// ---- kept for the session

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function keptState(key, id, type) {
  const kept = stored()[key]?.[id];
  return kept?.type === type ? { ...kept } : blank();
}

function keep({ id, type, state: { badge, text, warnings } }, key = runElsewhere()?.key ?? graphKeys()[0]) {
  const all = stored();
  const kept = { ...(all[key] ?? {}), [id]: { type, badge, text: text.slice(0, LONGEST), warnings } };
  delete all[key]; // the newest comes last
  all[key] = kept;
  for (const old of Object.keys(all).slice(0, -MOST)) delete all[old];
  try {
    sessionStorage.setItem(STORE, JSON.stringify(all));
  } catch {
    sessionStorage.removeItem(STORE); // full: the next runs are kept again
  }
}

// ---- shown on the node

// The renderer that draws nodes as elements makes a badge anew when something observable that it read has changed.
// ComfyUI's extension manager is observable, so a number on it does that.
const REVISION = "hotpathRevision";

function badge(read, colours) {
  return () => {
    void app.extensionManager?.[REVISION];
    return new window.LGraphBadge({ text: read(), ...colours() });
  };
}

function addBadges(node) {
  if (typeof window.LGraphBadge !== "function" || !Array.isArray(node.badges)) return;
  const quiet = () => ({ fgColor: window.LiteGraph.BADGE_FG_COLOR, bgColor: window.LiteGraph.BADGE_BG_COLOR });
  const loud = () => ({ fgColor: "#1c1400", bgColor: "#f0a830" });
  // Front ends up to 1.47 that draw nodes as elements keep the badges of a workflow that was open before for the nodes that
  // have the same ids in this one.
  const state = () => (app.canvas?.graph?.getNodeById(node.id) ?? node).hotpathState;
  const count = () => state()?.warnings.length ?? 0;
  node.badges.push(
    badge(() => (count() > 0 ? `${WARNING} ${count()}` : ""), loud),
    badge(() => badgeText(state()?.badge ?? ""), quiet),
  );
}

function badgeText(kept) {
  if (typeof kept === "number") return duration(kept);
  return kept === "cached" ? say("cached") : kept;
}

function redraw() {
  if (app.extensionManager) app.extensionManager[REVISION] = (app.extensionManager[REVISION] ?? 0) + 1;
  app.canvas?.setDirty(true, true);
}

function fieldOf(node) {
  return node?.widgets?.find((widget) => widget.name === "$$node-text-preview");
}

// Front ends before 1.46 find no node inside a subgraph by its execution id, and make no field there.
function ownField(node) {
  const element = document.createElement("div");
  element.className = "hotpath-report";
  let value = "";
  const options = {
    getValue: () => value,
    setValue: (text) => (element.textContent = value = text),
    getMinHeight: () => 2 * FIELD.line + FIELD.margins / 2,
    serialize: false,
  };
  return node.addDOMWidget?.("$$node-text-preview", "text", element, options);
}

// Pixels between a node and the title of the next one under it.
function roomUnder(node) {
  const [left, top] = node.pos;
  const width = node.size[0];
  const height = Math.max(node.size[1], node.computeSize()[1]); // a field that has just come is not in its size yet
  const under = ({ pos, size }) => pos[1] > top && pos[0] < left + width && pos[0] + size[0] > left;
  const tops = (node.graph?.nodes ?? []).filter((other) => other !== node && under(other)).map(({ pos }) => pos[1]);
  return Math.min(...tops) - window.LiteGraph.NODE_TITLE_HEIGHT - FIELD.gap - top - height;
}

// The canvas renderer gives the field two lines; here it gets as many as the text has, to a limit and where no other node
// is in the way, and scrolls from there. (The other renderer makes room by itself.)
function makeRoom(node, field, text) {
  const before = window.LiteGraph.vueNodesMode ? undefined : field.options?.getMinHeight?.();
  if (before === undefined) return;
  const letters = Math.max(20, (node.size[0] - FIELD.margins) / FIELD.letter);
  const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
  const wanted = Math.min(lines, FIELD.most) * FIELD.line + FIELD.margins / 2;
  const height = Math.min(wanted, before + roomUnder(node));
  if (height <= before) return;
  field.options.getMinHeight = () => height;
  node.expandToFitContent?.();
}

// Older front ends show HTML in their field, newer ones text, and a report has names, prompts and answers in it. An invisible
// joiner is no part of a tag, so that both show what was written.
function asWritten(text) {
  return text.replace(MARKUP, "$&\u2060");
}

// Warnings and report in the front end's own text field of the node: its listener has put the bare report there.
function showText(id, node) {
  const { text, warnings } = stateOf(node);
  const whole = asWritten([...warnings.map((warning) => `${WARNING} ${say(warning)}`), text].filter(Boolean).join("\n\n"));
  if (whole === "") return;
  if (fieldOf(node) === undefined) {
    if (node.graph !== app.canvas?.graph) return; // shown when it is opened
    showing = true;
    api.dispatchCustomEvent("progress_text", { nodeId: String(id), text: whole });
    showing = false;
  }
  const field = fieldOf(node) ?? ownField(node);
  if (field === undefined) return;
  field.serialize = false; // older front ends would save it, as one value more than the node has inputs
  if (field.value !== whole) field.value = whole;
  makeRoom(node, field, whole);
}

let showing = false; // a text of ours is on its way to the front end's listener

// The node that ran has ended; `well` is false when it failed or was interrupted, which ComfyUI itself shows.
function finish(well) {
  if (running === null) return;
  const { id, since } = running;
  const one = told(id);
  running = null;
  if (one === null) return;
  one.state.badge = well ? Math.max(0.001, (performance.now() - since) / 1000) : "";
  keep(one);
  redraw();
}

function begin({ detail }) {
  running = null; // one that never ended, as when the server did
  runStarts(detail);
}

// The run has ended. Newer front ends take the texts off its nodes then, in a listener of their own: reports stay.
function end(well, { detail }) {
  finish(well);
  runEnds(detail);
  setTimeout(() => showAll((node) => fieldOf(node) === undefined));
}

function onExecuting({ detail: id }) {
  if (running !== null && String(id) === running.id) return; // told anew after a lost connection
  finish(true);
  if (id === null || id === undefined) return;
  const one = told(id);
  if (one === null) return;
  const state = Object.assign(one.state, blank());
  const field = fieldOf(one.node);
  if (field !== undefined) field.value = "";
  running = { id: one.id, state, since: performance.now(), kept: -Infinity };
  redraw();
}

function onCached({ detail }) {
  for (const id of detail?.nodes ?? []) {
    const one = told(id);
    if (one === null) continue;
    one.state.badge = "cached";
    keep(one);
  }
  redraw();
}

function textOf(detail) {
  return showing || detail?.nodeId === undefined ? null : told(detail.nodeId);
}

// The text of one of our nodes has come. Whether that is all: nothing of it can be shown while another workflow is open.
function takeText(detail) {
  const one = textOf(detail);
  if (one === null) return false;
  one.state.text = detail.text ?? "";
  detail.text = asWritten(one.state.text);
  if (one.node !== null) return false;
  keepText(one);
  return true;
}

// The front end's own listener is the first, and shows a text as it came, on whatever node the open workflow has.
function takeTextsFirst() {
  const { dispatchCustomEvent } = api;
  api.dispatchCustomEvent = function (type, ...given) {
    if (type === "progress_text" && takeText(given[0])) return true;
    return dispatchCustomEvent.call(this, type, ...given);
  };
}

function onText({ detail }) {
  const one = textOf(detail);
  if (one === null) return;
  showText(one.id, one.node);
  keepText(one);
}

function keepText(one) {
  if (running?.id === one.id) {
    // A text that grows comes ten times a second; the last one is kept when the node ends.
    const now = performance.now();
    if (now - running.kept < KEPT_EVERY) return;
    running.kept = now;
  }
  keep(one);
}

function onWarning({ detail }) {
  const one = told(detail?.node);
  if (one === null) return;
  const { warnings } = one.state;
  if (!warnings.includes(detail.text)) warnings.push(detail.text);
  if (one.node !== null) showText(one.id, one.node);
  keep(one);
  redraw();
}

// The front end's listener knows only the nodes of the graph that is open: those of a subgraph get their texts when it is.
function showAll(wanted = () => true) {
  for (const [id, node] of ourNodes()) {
    if (node.hotpathState && wanted(node)) showText(id, node);
  }
}

app.registerExtension({
  name: "Hotpath.NodeState",
  setup() {
    // Later than the front end itself, which then asks which subgraph is open.
    app.canvas?.canvas?.addEventListener("litegraph:set-graph", () => setTimeout(() => showAll()));
    takeTextsFirst();
    api.addEventListener("execution_start", begin);
    api.addEventListener("executing", onExecuting);
    api.addEventListener("execution_cached", onCached);
    api.addEventListener("progress_text", onText);
    api.addEventListener("hotpath.warning", onWarning);
    api.addEventListener("execution_success", (event) => end(true, event));
    api.addEventListener("execution_error", (event) => end(false, event));
    api.addEventListener("execution_interrupted", (event) => end(false, event));
    onLanguage(redraw);
  },
  nodeCreated(node) {
    if (isOurs(node)) addBadges(node);
  },
  afterConfigureGraph() {
    const all = stored();
    const keys = graphKeys();
    const kept = all[keys.find((key) => key in all)] ?? {};
    for (const [id, node] of ourNodes()) {
      const before = kept[id];
      if (before?.type === node.type) node.hotpathState = { ...before, warnings: [...before.warnings] };
      if (!node.hotpathNotes) continue;
      // What saved_layouts.js found no place for. An undo makes the node anew from values that have lost it.
      const state = stateOf(node);
      state.warnings = [...new Set([...state.warnings, ...node.hotpathNotes])];
      keep({ id, type: node.type, state }, keys[0]);
    }
    showAll();
    redraw();
  },
});
