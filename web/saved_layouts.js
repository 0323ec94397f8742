// Opens graphs saved with another layout of the same node ids: values without names, shifted by what was inserted or
// removed since. The layouts stand in layouts/<pack>.json, which host/saved_layouts.py reads for API prompts as well.

import { app } from "../../scripts/app.js";
import { declaredHere } from "./node_families.js";

const TABLES = ["qwen_vl", "colorization"];
const CONTROL = "control_after_generate";
const CONTROLS = ["fixed", "increment", "decrement", "randomize"];
const FORKED =
  "This graph comes from a version of this node with more inputs than it has here; the values of those are left out.";

function accepts(widget, value) {
  if (widget.type === "BOOLEAN") return typeof value === "boolean";
  if (widget.type === "INT" || widget.type === "FLOAT") return typeof value === "number";
  if (typeof value !== "string") return false;
  return widget.options === undefined || widget.options.includes(value);
}

// The values by widget name when `layout` explains every one of them, else null. forked: or all but the last ones, which
// stand where this pack's own inputs do.
export function named(layout, values, forked = false) {
  const found = {};
  const rest = [...values];
  for (let index = 0; index < layout.length; index++) {
    const widget = layout[index];
    if (rest.length === 0) return layout.slice(index).every((w) => w.optional) ? found : null;
    if (!accepts(widget, rest[0])) return forked && widget.optional ? found : null;
    found[widget.name] = rest.shift();
    if (widget.name === "seed" && CONTROLS.includes(rest[0])) found[CONTROL] = rest.shift();
  }
  return rest.length === 0 || forked ? found : null;
}

// Values under their present names, with the words of older choices translated.
export function present(table, type, found) {
  const result = {};
  const renamed = table.rename[type] ?? {};
  const wordsOf = table.values[type] ?? {};
  for (const [name, value] of Object.entries(found)) {
    const words = wordsOf[name] ?? {};
    result[renamed[name] ?? name] = typeof value === "string" ? (words[value] ?? value) : value;
  }
  return result;
}

// Whether the names that a newer front end saved beside the values are those of the present widgets, in their order. Its
// own text on a node is none of them.
function isPresent(names, widgets) {
  const shown = widgets.filter((widget) => widget.serialize !== false).map((widget) => widget.name);
  return Object.keys(names)
    .filter((name) => !name.startsWith("$$"))
    .every((name, index) => name === shown[index]);
}

// For values saved by an older layout: `values` in the order of `widgets`, and `notes` about settings that are gone. names:
// the values by name, which newer front ends save as well. Null when they are present already, or when no layout fits.
export function migrated(table, type, values, widgets, names) {
  const layouts = table.layouts[type];
  if (layouts === undefined || !Array.isArray(values)) return null;
  const fits = (forked) => layouts.map((layout) => named(layout, values, forked)).find((one) => one !== null);
  if (names ? isPresent(names, widgets) : named(layouts[0], values) !== null) return null;
  const known = fits(false);
  const found = names ?? known ?? fits(true);
  if (found === undefined) return null;
  const inputs = present(table, type, found);
  const notes = Object.entries(table.notes[type] ?? {})
    .filter(([name, [harmless]]) => name in found && found[name] !== harmless)
    .map(([, [, note]]) => note);
  const explained = new Set([CONTROL, ...layouts.flat().map((one) => one.name), ...widgets.map((one) => one.name)]);
  const more = names
    ? Object.keys(names).filter((name) => !explained.has(name) && !name.startsWith("$$")).map((name) => names[name])
    : values.slice(known === undefined ? Object.keys(found).length : values.length);
  if (more.some(Boolean)) notes.push(FORKED);
  return { values: widgets.map((widget) => (widget.name in inputs ? inputs[widget.name] : widget.value)), notes };
}

// Tables of several packs in one.
export function merged(tables) {
  const table = { layouts: {}, rename: {}, values: {}, dropped: {}, defaults: {}, notes: {} };
  for (const one of tables) {
    for (const [section, entries] of Object.entries(one)) Object.assign(table[section], entries);
  }
  return table;
}

async function readTables() {
  const answers = await Promise.all(
    TABLES.map((name) => fetch(new URL(`./layouts/${name}.json`, import.meta.url)).then((answer) => answer.json())),
  );
  return merged(answers);
}

let reading;

// An older graph calls an input by another name; the link stays with its socket.
function renameInputs(names, inputs) {
  const saved = (inputs ?? []).map((input) => input.name);
  for (const input of inputs ?? []) {
    const name = names?.[input.name];
    if (name !== undefined && !saved.includes(name)) input.name = name;
  }
}

app.registerExtension({
  name: "Hotpath.SavedLayouts",
  // Newer front ends note the names before nodes are configured, and put links to where those are.
  async beforeConfigureGraph(graph) {
    const { rename } = await (reading ??= readTables());
    for (const { nodes } of [graph, ...(graph?.definitions?.subgraphs ?? [])]) {
      for (const node of nodes ?? []) {
        const declared = window.LiteGraph.registered_node_types[node.type]?.nodeData;
        if (declaredHere(declared)) renameInputs(rename[node.type], node.inputs);
      }
    }
  },
  async beforeRegisterNodeDef(nodeType, nodeData) {
    const table = await (reading ??= readTables());
    // Another pack that has the id may take what was saved as it is.
    if (table.layouts[nodeData.name] === undefined || !declaredHere(nodeData)) return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (info) {
      const widgets = this.widgets ?? [];
      const change = migrated(table, nodeData.name, info.widgets_values, widgets, info.widgets_values_named);
      if (change !== null) {
        info.widgets_values = change.values;
        // By these they are restored where the user, or a later front end, says so.
        const byName = widgets.map((widget, index) => [widget.name, change.values[index]]);
        if (info.widgets_values_named) info.widgets_values_named = Object.fromEntries(byName);
      }
      renameInputs(table.rename[nodeData.name], info.inputs);
      const result = configure.call(this, info);
      // node_state.js shows them on the node.
      if (change !== null && change.notes.length > 0) this.hotpathNotes = change.notes;
      return result;
    };
  },
});
