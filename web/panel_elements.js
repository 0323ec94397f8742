// Elements and words of the panel. Text is only ever set as text: nothing a server or a file name says becomes markup.

import { say } from "./words.js";

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// A link that opens apart; an address that is not https is shown as plain text.
export function link(address, words) {
  if (!String(address).startsWith("https://")) return element("span", {}, words);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, words);
}

export function bytes(count) {
  if (count === null || count === undefined) return "?";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = count;
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function percent(part) {
  return part === null || part === undefined ? "–" : `${Math.round(part * 100)} %`;
}

export function remaining(seconds) {
  if (!Number.isFinite(seconds) || seconds < 0) return "";
  if (seconds < 90) return say("{count} s left", { count: Math.ceil(seconds) });
  if (seconds < 5400) return say("{count} min left", { count: Math.ceil(seconds / 60) });
  return say("{count} h left", { count: (seconds / 3600).toFixed(1) });
}
