// The front end's own words in the language that ComfyUI is set to. The scripts hold the English; words/<language>.json
// has the others by the English sentence. What the server says of one run (reports, warnings, refusals) stays as it came.

import { app } from "../../scripts/app.js";

const SETTING = "Comfy.Locale";
const LANGUAGES = ["zh"];

async function read(name) {
  try {
    return [name, await (await fetch(new URL(`./words/${name}.json`, import.meta.url))).json()];
  } catch {
    return [name, {}]; // English instead
  }
}

// Read before anything is said: what imports this file waits for it.
const words = Object.fromEntries(await Promise.all(LANGUAGES.map(read)));
let changedTo = null; // the setting still has its old value while its change is announced

export function language() {
  return changedTo ?? app.ui?.settings?.getSettingValue(SETTING) ?? "en";
}

// `sentence` in the language that is set, with {name} replaced by values.name. What has no translation stays English.
export function say(sentence, values = {}) {
  const known = words[language()] ?? {};
  const found = Object.hasOwn(known, sentence) ? known[sentence] : String(sentence);
  return found.replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? String(values[name]) : whole));
}

// Calls `act` whenever another language has been chosen.
export function onLanguage(act) {
  app.ui?.settings?.addEventListener(`${SETTING}.change`, ({ detail }) => {
    changedTo = detail.value;
    act();
  });
}
