// Opens graphs saved with another layout of the Qwen nodes' ids. The layouts, and how older names and choices translate,
// stand in qwen_vl_layouts.json, which vision_language/migration.py reads as well.

import { app } from "../../scripts/app.js";

const CONTROLS = ["fixed", "increment", "decrement", "randomize"];

function accepts(widget, value) {
  if (widget.type === "BOOLEAN") return typeof value === "boolean";
  if (widget.type === "INT" || widget.type === "FLOAT") return typeof value === "number";
  if (typeof value !== "string") return false;
  return widget.options === undefined || widget.options.includes(value);
}

// The values by widget name when `layout` explains every one of them, else null.
export function named(layout, values) {
  const found = {};
  const rest = [...values];
  for (let index = 0; index < layout.length; index++) {
    const widget = layout[index];
    if (rest.length === 0) return layout.slice(index).every((w) => w.optional) ? found : null;
    if (!accepts(widget, rest[0])) return null;
    found[widget.name] = rest.shift();
    if (widget.name === "seed" && CONTROLS.includes(rest[0])) found.control_after_generate = rest.shift();
  }
  return rest.length === 0 ? found : null;
}

// Values under their present names, with the words of older choices translated.
export function present(table, type, found) {
  const result = {};
  const renamed = table.rename[type] ?? {};
  for (const [name, value] of Object.entries(found)) {
    const words = table.values[name] ?? {};
    result[renamed[name] ?? name] = typeof value === "string" ? (words[value] ?? value) : value;
  }
  return result;
}

// widgets_values in the order of `widgets` for values saved by any known layout; null when they are present already,
// or when no layout fits.
export function migrated(table, type, values, widgets) {
  const layouts = table.layouts[type];
  if (layouts === undefined || !Array.isArray(values)) return null;
  const index = layouts.findIndex((layout) => named(layout, values) !== null);
  if (index <= 0) return null;
  const inputs = present(table, type, named(layouts[index], values));
  return widgets.map((widget) => (widget.name in inputs ? inputs[widget.name] : widget.value));
}

async function readTable() {
  const response = await fetch(new URL("./qwen_vl_layouts.json", import.meta.url));
  return response.json();
}

app.registerExtension({
  name: "Hotpath.QwenVLMigration",
  async init() {
    this.table = await readTable();
  },
  async beforeRegisterNodeDef(nodeType, nodeData) {
    const table = this.table ?? (this.table = await readTable());
    if (table.layouts[nodeData.name] === undefined) return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (info) {
      const values = migrated(table, nodeData.name, info.widgets_values, this.widgets ?? []);
      if (values !== null) info.widgets_values = values;
      // An older graph calls the first picture `image`; the link stays with its socket.
      const names = (info.inputs ?? []).map((input) => input.name);
      for (const input of info.inputs ?? []) {
        const name = table.rename[nodeData.name]?.[input.name];
        if (name !== undefined && !names.includes(name)) input.name = name;
      }
      return configure.call(this, info);
    };
  },
});
