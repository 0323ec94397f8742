// The Hotpath tab of the sidebar: caches, model files with downloads, libraries, versions. Its server half is panel/.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { bytes, element, link, percent, remaining } from "./panel_elements.js";
import { libraryReport } from "./panel_libraries.js";
import { language, onLanguage, say } from "./words.js";

const BUSY = ["waiting", "running", "stopping"];
const REFRESH = 5000; // milliseconds
const REFRESH_BUSY = 1000;
const TOOLTIP = "Hotpath: caches, model files, libraries";
// Names that the server gives, as they are written. Others are shown as they come.
const FAMILIES = {
  instantid: "InstantID",
  faces: "Faces",
  colormnet: "ColorMNet",
  deep_exemplar: "Deep Exemplar",
  qwen_vl: "Qwen-VL",
  ailab_qwen_vl: "AILab QwenVL",
  text_to_image: "Text to image",
};

function familyName(family) {
  return Object.hasOwn(FAMILIES, family) ? say(FAMILIES[family]) : family.replaceAll("_", " ");
}

// What the server answers; throws an Error with its sentence.
async function ask(path, body) {
  const options = { cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await api.fetchApi(`/hotpath/${path}`, options);
  } catch {
    throw new Error(say("ComfyUI does not answer; is it still running?"));
  }
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  const { status, statusText: text } = answer;
  throw new Error(found.error ?? say("ComfyUI answered {status} {text}.", { status, text }));
}

class HotpathPanel {
  constructor() {
    this.root = element("div", { class: "hotpath-panel", "data-testid": "hotpath-panel" });
    this.notice = element("p", { role: "status", "aria-live": "polite", class: "hp-break" });
    this.sections = new Map();
    this.open = new Set(["caches", "models"]);
    this.accepted = new Set();
    this.data = null;
    this.libraries = null;
    this.timer = null;
    this.asked = false; // whether the notice tells of a download that was begun here
    this.body = element("div");
    const title = element("h2", {}, "Hotpath");
    this.again = element("button", { type: "button", on: { click: () => this.refresh() } });
    this.root.append(element("div", { class: "hp-line" }, title, this.again), this.notice, this.body);
    this.onVisible = () => this.visible() && this.refresh();
  }

  // ComfyUI calls `render` again with the same element; only the first call attaches.
  mount(parent) {
    if (this.root.parentElement === parent) return;
    parent.style.height = "100%";
    parent.append(this.root);
    document.addEventListener("visibilitychange", this.onVisible);
    this.refresh();
  }

  unmount() {
    clearTimeout(this.timer);
    this.timer = null;
    document.removeEventListener("visibilitychange", this.onVisible);
    this.root.remove();
  }

  visible() {
    return this.root.isConnected && document.visibilityState === "visible";
  }

  async refresh() {
    clearTimeout(this.timer);
    const before = this.busy();
    try {
      this.data = await ask("overview");
      // What has come is offered by the nodes at once. What became of it stands in its row.
      if ((before || this.asked) && !this.busy()) {
        app.refreshComboInNodes?.();
        if (this.asked) this.say("");
        this.asked = false;
      }
      if (this.failed) this.say("");
      this.failed = false;
    } catch (error) {
      this.failed = true;
      this.say(error.message, true);
    }
    this.draw();
    if (this.visible()) this.schedule();
  }

  schedule() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.visible() && this.refresh(), this.busy() ? REFRESH_BUSY : REFRESH);
  }

  busy() {
    return this.data?.downloads.some((download) => BUSY.includes(download.state)) ?? false;
  }

  say(text, bad = false) {
    this.notice.textContent = text;
    this.notice.className = bad ? "hp-break hp-bad" : "hp-break";
  }

  // A change asked of the server, its answer or refusal said, and everything shown anew.
  async change(path, body, done) {
    try {
      this.say(done(await ask(path, body)));
    } catch (error) {
      this.say(error.message, true);
    }
    await this.refresh();
  }

  // Each part is made anew only when what it shows has changed, so that focus and scroll position stay.
  draw() {
    if (this.data === null) return;
    const busy = this.data.downloads.map((d) => [d.models, d.state, d.done, d.message]);
    this.again.textContent = say("Refresh");
    this.part("failures", [this.data.failed_families, this.data.shadowed], () => this.failures());
    this.part("caches", [this.data.caches], () => this.caches());
    this.part("models", [this.data.models, busy, [...this.accepted]], () => this.models());
    this.part("libraries", [this.libraries, this.open.has("libraries")], () => this.librariesPart());
    this.part("versions", [this.data.versions], () => this.versions());
  }

  part(name, shown, make) {
    const state = JSON.stringify([language(), shown]);
    const before = this.sections.get(name);
    if (before?.state === state) return;
    const made = make();
    const key = before?.node.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    if (before) before.node.replaceWith(made);
    else this.body.append(made);
    this.sections.set(name, { state, node: made });
    if (key !== undefined) [...made.querySelectorAll("[data-key]")].find((e) => e.dataset.key === key)?.focus();
  }

  section(name, title, ...children) {
    return element(
      "details",
      {
        class: "hp-section",
        open: this.open.has(name),
        "data-testid": `hotpath-${name}`,
        on: {
          toggle: (event) => {
            if (event.target.open) this.open.add(name);
            else this.open.delete(name);
            if (name === "libraries" && event.target.open && this.libraries === null) this.look(false);
          },
        },
      },
      element("summary", { "data-key": `section ${name}` }, element("h3", {}, title)),
      ...children,
    );
  }

  button(key, words, act, properties = {}) {
    return element("button", { type: "button", "data-key": key, on: { click: act }, ...properties }, words);
  }

  failures() {
    const told = [
      ...Object.entries(this.data.failed_families).map(([family, reason]) =>
        say("The {family} nodes are missing: {reason}", { family: familyName(family), reason }),
      ),
      ...Object.entries(this.data.shadowed ?? {}).map(([pack, ids]) =>
        say("The pack {pack} has nodes with the same ids, which run in place of Hotpath's: {ids}. Disable one of the two.", {
          pack,
          ids: ids.join(", "),
        }),
      ),
    ];
    return element(
      "div",
      { role: told.length ? "alert" : undefined },
      told.map((sentence) => element("p", { class: "hp-alert hp-break" }, sentence)),
    );
  }

  caches() {
    const { caches } = this.data;
    const clear = (name) =>
      this.change("caches/clear", { name }, ({ cleared }) => say("Entries cleared: {count}.", { count: cleared }));
    const rows = caches.map((cache) => {
      const name = say(cache.name);
      const used = say("{used} of {limit}", { used: bytes(cache.nbytes), limit: bytes(cache.limit) });
      const rate = percent(cache.hit_rate);
      const told = [used, say("{entries} kept, hit rate {rate} (hits: {hits}, misses: {misses})", { ...cache, rate })];
      if (cache.evictions) told.push(say("{count} dropped", { count: cache.evictions }));
      return element(
        "div",
        { class: "hp-item", "data-cache": cache.name },
        element(
          "div",
          { class: "hp-line" },
          element("span", { class: "hp-name hp-break" }, name),
          this.button(`clear ${cache.name}`, say("Clear"), () => clear(cache.name), {
            "aria-label": say("Clear the cache {name}", { name }),
            disabled: cache.entries === 0,
          }),
        ),
        element("meter", { min: 0, max: Math.max(1, cache.limit), value: cache.nbytes, "aria-label": used }),
        element("div", { class: "hp-quiet" }, told.join(say(", "))),
      );
    });
    return this.section(
      "caches",
      say("Caches"),
      rows.length ? rows : element("p", { class: "hp-quiet" }, say("Nothing is remembered yet.")),
      rows.length > 1 && this.button("clear all", say("Clear all"), () => clear(null), { title: say("Also those on the disk") }),
    );
  }

  models() {
    const counts = { here: this.data.models.filter((model) => model.found).length, all: this.data.models.length };
    const families = [...new Set(this.data.models.map((model) => model.family))];
    return this.section(
      "models",
      say("Model files: {here} of {all}", counts),
      families.map((family) => {
        const models = this.data.models.filter((model) => model.family === family);
        const name = `family ${family}`;
        const found = models.filter((model) => model.found).length;
        const title = say("{family}: {found} of {count}", { family: familyName(family), found, count: models.length });
        return element(
          "details",
          {
            open: this.open.has(name) || models.some((m) => BUSY.includes(this.downloadOf(m)?.state)),
            on: { toggle: (e) => (e.target.open ? this.open.add(name) : this.open.delete(name)) },
          },
          element("summary", { "data-key": name }, title),
          models.map((model) => this.model(model)),
        );
      }),
    );
  }

  downloadOf(model) {
    return this.data.downloads.findLast((download) => download.models.includes(model.name));
  }

  model(model) {
    const download = this.downloadOf(model);
    const busy = download !== undefined && BUSY.includes(download.state);
    const head = element(
      "div",
      { class: "hp-line" },
      element("span", { class: "hp-name hp-break" }, model.name),
      model.found
        ? element("span", { class: model.problem ? "hp-bad" : "hp-good" }, say(model.problem ? "damaged" : "here"))
        : !busy && element("span", { class: "hp-quiet" }, say("missing")),
    );
    const about = say("{about}. Belongs at {place}.", { about: say(model.about), place: model.place });
    const lines = [element("div", { class: "hp-quiet hp-break" }, model.found ?? about)];
    if (model.problem) lines.push(element("div", { class: "hp-bad hp-break" }, model.problem));
    if (!model.found && !busy) lines.push(...this.offer(model));
    if (busy) lines.push(...this.progress(model, download));
    else if (download?.message && download.state !== "done") {
      const mood = download.state === "failed" ? "hp-bad hp-break" : "hp-quiet hp-break";
      lines.push(element("div", { class: mood }, download.message));
    }
    return element("div", { class: "hp-item", "data-model": model.name }, head, lines);
  }

  offer(model) {
    const terms = { licence: say(model.licence) };
    const needsWord = model.non_commercial && !this.accepted.has(model.name);
    const start = () =>
      this.change(
        "downloads/start",
        { model: model.name, accept_licence: this.accepted.has(model.name) },
        (answer) => {
          this.asked = true;
          return say("Downloading {names}.", { names: new Intl.ListFormat(language()).format(answer.models) });
        },
      );
    const box = element("input", {
      type: "checkbox",
      "data-key": `accept ${model.name}`,
      checked: this.accepted.has(model.name),
      on: {
        change: (event) => {
          if (event.target.checked) this.accepted.add(model.name);
          else this.accepted.delete(model.name);
          this.draw();
        },
      },
    });
    const licence = model.non_commercial
      ? element("label", {}, box, element("span", {}, say("I accept: {licence}", terms)))
      : element("div", { class: "hp-quiet" }, say("Licence: {licence}", terms));
    return [
      licence,
      element(
        "div",
        { class: "hp-actions" },
        this.button(`download ${model.name}`, say("Download"), start, {
          disabled: needsWord,
          "aria-label": say("Download {name}", model),
        }),
        link(model.source.split(" ")[0], say("source")),
        element("span", { class: "hp-quiet" }, say("{bytes} free", { bytes: bytes(model.free) })),
      ),
    ];
  }

  progress(model, download) {
    const bar = { "aria-label": say("Download of {name}", model) };
    if (download.total) Object.assign(bar, { max: download.total, value: download.done });
    const left = remaining((download.total - download.done) / download.bytes_per_second);
    const speed = bytes(download.bytes_per_second);
    const far = { done: bytes(download.done), total: bytes(download.total), speed, left };
    const words =
      download.state === "running" ? say("{done} of {total}, {speed}/s {left}", far) : say(download.state);
    const stop = () => this.change("downloads/stop", { model: model.name }, () => say("Stopping {name}.", model));
    return [
      element("progress", bar),
      element(
        "div",
        { class: "hp-line" },
        element("span", { class: "hp-quiet" }, words),
        this.button(`stop ${model.name}`, say("Stop"), stop, {
          disabled: download.state === "stopping",
          "aria-label": say("Stop the download of {name}", model),
        }),
      ),
    ];
  }

  // Takes seconds on the server, so it is asked for when the section is opened, and on request.
  async look(again) {
    this.libraries = { looking: true };
    this.draw();
    try {
      this.libraries = again ? await ask("libraries/look", {}) : await ask("libraries");
    } catch (error) {
      this.libraries = { error: error.message };
    }
    this.draw();
  }

  librariesPart() {
    const found = this.libraries ?? {};
    const again = this.button("look again", say("Look again"), () => this.look(true), { disabled: found.looking });
    return this.section("libraries", say("Optional libraries"), libraryReport(found), again);
  }

  versions() {
    const rows = Object.entries(this.data.versions).flatMap(([name, version]) => [
      element("dt", { class: "hp-quiet" }, say(name)),
      element("dd", { class: "hp-break" }, version),
    ]);
    return this.section(
      "versions",
      say("Versions"),
      element("dl", {}, rows),
      element("p", {}, link(this.data.documentation, say("Documentation"))),
    );
  }
}

let panel = null;

app.registerExtension({
  name: "Hotpath.Panel",
  setup() {
    if (typeof app.extensionManager?.registerSidebarTab !== "function") return;
    const style = element("link", { rel: "stylesheet", href: new URL("./hotpath_panel.css", import.meta.url).href });
    document.head.append(style);
    app.extensionManager.registerSidebarTab({
      id: "hotpath",
      icon: "pi pi-bolt",
      title: "Hotpath",
      label: "Hotpath",
      tooltip: say(TOOLTIP),
      type: "custom",
      render: (parent) => (panel ??= new HotpathPanel()).mount(parent),
      destroy: () => panel?.unmount(),
    });
    onLanguage(() => {
      const tab = app.extensionManager.getSidebarTabs?.().find(({ id }) => id === "hotpath");
      if (tab) tab.tooltip = say(TOOLTIP);
      panel?.draw();
    });
  },
});
