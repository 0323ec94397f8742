// What the panel says of optional libraries: which work here, and why the others do not.

import { element } from "./panel_elements.js";
import { say } from "./words.js";

function library(one) {
  return element(
    "div",
    { class: "hp-item", "data-library": one.name },
    element(
      "div",
      { class: "hp-line" },
      element("span", { class: "hp-name" }, one.name),
      element("span", { class: one.available ? "hp-good" : "hp-quiet" }, say(one.available ? "works" : "not used")),
    ),
    element("div", { class: "hp-quiet hp-break" }, [say(one.used_for), one.version, one.detail].filter(Boolean).join("; ")),
  );
}

function backend(one) {
  return element(
    "div",
    { class: "hp-quiet hp-break", "data-attention": one.name },
    element("span", { class: one.reason === null ? "hp-good" : "" }, one.name),
    `: ${one.reason ?? say(one.exact ? "works ({what})" : "works, rounds ({what})", one)}`,
  );
}

function group(title, lines) {
  return element("div", { class: "hp-item" }, element("span", { class: "hp-name" }, title), lines);
}

// `found`: the server's answer, `{ looking: true }` while it is awaited, or `{ error }`.
export function libraryReport(found) {
  const attention = found.attention ?? [];
  // Backends of attention have a list of their own, by what this process can use.
  const libraries = (found.backends ?? []).filter((one) => !attention.some(({ name }) => name === one.name));
  return [
    found.looking && element("p", { class: "hp-quiet" }, say("Looking at each of them; this takes some seconds ...")),
    found.error && element("p", { class: "hp-bad hp-break" }, found.error),
    (found.unmet_requirements ?? []).map((line) => element("p", { class: "hp-alert" }, say("Not met: {line}", { line }))),
    attention.length > 0 && group(say("Attention backends of this process"), attention.map(backend)),
    libraries.map(library),
    found.face_engines &&
      group(
        say("Face engines"),
        found.face_engines.map((line) => element("div", { class: "hp-quiet hp-break" }, line)),
      ),
  ].flat();
}
