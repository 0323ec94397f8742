// The Hotpath tab of the sidebar: caches, model files with downloads, libraries, versions. Its server half is panel/.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { bytes, element, link, percent, remaining } from "./panel_elements.js";

const BUSY = ["waiting", "running", "stopping"];
const REFRESH = 5000; // milliseconds
const REFRESH_BUSY = 1000;

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
    throw new Error("ComfyUI does not answer; is it still running?");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `ComfyUI answered ${answer.status} ${answer.statusText}.`);
  return found;
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
    this.body = element("div");
    const title = element("h2", {}, "Hotpath");
    const refresh = element("button", { type: "button", on: { click: () => this.refresh() } }, "Refresh");
    this.root.append(element("div", { class: "hp-line" }, title, refresh), this.notice, this.body);
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
      // What has come is offered by the nodes at once.
      if (before && !this.busy()) app.refreshComboInNodes?.();
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
    this.part("failures", [this.data.failed_families], () => this.failures());
    this.part("caches", [this.data.caches], () => this.caches());
    this.part("models", [this.data.models, busy, [...this.accepted]], () => this.models());
    this.part("libraries", [this.libraries, this.open.has("libraries")], () => this.librariesPart());
    this.part("versions", [this.data.versions], () => this.versions());
  }

  part(name, shown, make) {
    const state = JSON.stringify(shown);
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
    const entries = Object.entries(this.data.failed_families);
    return element(
      "div",
      { role: entries.length ? "alert" : undefined },
      entries.map(([family, reason]) =>
        element(
          "p",
          { class: "hp-alert hp-break" },
          `The ${family.replaceAll("_", " ")} nodes are missing: ${reason}`,
        ),
      ),
    );
  }

  caches() {
    const { caches } = this.data;
    const clear = (name) =>
      this.change("caches/clear", { name }, (answer) => `${answer.cleared} entries cleared.`);
    const rows = caches.map((cache) => {
      const used = `${bytes(cache.nbytes)} of ${bytes(cache.limit)}`;
      return element(
        "div",
        { class: "hp-item", "data-cache": cache.name },
        element(
          "div",
          { class: "hp-line" },
          element("span", { class: "hp-name hp-break" }, cache.name),
          this.button(`clear ${cache.name}`, "Clear", () => clear(cache.name), {
            "aria-label": `Clear the cache ${cache.name}`,
            disabled: cache.entries === 0,
          }),
        ),
        element("meter", { min: 0, max: Math.max(1, cache.limit), value: cache.nbytes, "aria-label": used }),
        element(
          "div",
          { class: "hp-quiet" },
          `${used}, ${cache.entries} entries, hit rate ${percent(cache.hit_rate)} (${cache.hits} hits, ` +
            `${cache.misses} misses)${cache.evictions ? `, ${cache.evictions} dropped` : ""}`,
        ),
      );
    });
    return this.section(
      "caches",
      "Caches",
      rows.length ? rows : element("p", { class: "hp-quiet" }, "Nothing is remembered yet."),
      rows.length > 1 && this.button("clear all", "Clear all", () => clear(null)),
    );
  }

  models() {
    const here = this.data.models.filter((model) => model.found);
    const families = [...new Set(this.data.models.map((model) => model.family))];
    return this.section(
      "models",
      `Model files (${here.length} of ${this.data.models.length} known ones are here)`,
      families.map((family) => {
        const models = this.data.models.filter((model) => model.family === family);
        const name = `family ${family}`;
        const found = models.filter((model) => model.found).length;
        return element(
          "details",
          {
            open: this.open.has(name) || models.some((m) => BUSY.includes(this.downloadOf(m)?.state)),
            on: { toggle: (e) => (e.target.open ? this.open.add(name) : this.open.delete(name)) },
          },
          element("summary", { "data-key": name }, `${family.replaceAll("_", " ")}: ${found} of ${models.length}`),
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
        ? element("span", { class: model.problem ? "hp-bad" : "hp-good" }, model.problem ? "damaged" : "here")
        : !busy && element("span", { class: "hp-quiet" }, "missing"),
    );
    const lines = [
      element("div", { class: "hp-quiet hp-break" }, model.found ?? `${model.about}. Belongs at ${model.place}.`),
    ];
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
    const needsWord = model.non_commercial && !this.accepted.has(model.name);
    const start = () =>
      this.change(
        "downloads/start",
        { model: model.name, accept_licence: this.accepted.has(model.name) },
        (answer) => `Downloading ${answer.models.join(" and ")}.`,
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
      ? element("label", {}, box, element("span", {}, `I accept: ${model.licence}`))
      : element("div", { class: "hp-quiet" }, `Licence: ${model.licence}`);
    return [
      licence,
      element(
        "div",
        { class: "hp-actions" },
        this.button(`download ${model.name}`, "Download", start, {
          disabled: needsWord,
          "aria-label": `Download ${model.name}`,
        }),
        link(model.source.split(" ")[0], "source"),
        element("span", { class: "hp-quiet" }, `${bytes(model.free)} free`),
      ),
    ];
  }

  progress(model, download) {
    const bar = { "aria-label": `Download of ${model.name}` };
    if (download.total) Object.assign(bar, { max: download.total, value: download.done });
    const left = remaining((download.total - download.done) / download.bytes_per_second);
    const words =
      download.state === "running"
        ? `${bytes(download.done)} of ${bytes(download.total)}, ${bytes(download.bytes_per_second)}/s ${left}`
        : download.state;
    const stop = () => this.change("downloads/stop", { model: model.name }, () => `Stopping ${model.name}.`);
    return [
      element("progress", bar),
      element(
        "div",
        { class: "hp-line" },
        element("span", { class: "hp-quiet" }, words),
        this.button(`stop ${model.name}`, "Stop", stop, {
          disabled: download.state === "stopping",
          "aria-label": `Stop the download of ${model.name}`,
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
    const again = this.button("look again", "Look again", () => this.look(true), { disabled: found.looking });
    const library = (one) =>
      element(
        "div",
        { class: "hp-item", "data-library": one.name },
        element(
          "div",
          { class: "hp-line" },
          element("span", { class: "hp-name" }, one.name),
          element("span", { class: one.available ? "hp-good" : "hp-quiet" }, one.available ? "works" : "not used"),
        ),
        element("div", { class: "hp-quiet hp-break" }, [one.used_for, one.version, one.detail].filter(Boolean).join("; ")),
      );
    return this.section(
      "libraries",
      "Optional libraries",
      found.looking && element("p", { class: "hp-quiet" }, "Looking at each of them; this takes some seconds ..."),
      found.error && element("p", { class: "hp-bad hp-break" }, found.error),
      (found.unmet_requirements ?? []).map((line) => element("p", { class: "hp-alert" }, `Not met: ${line}`)),
      found.attention && this.attention(found.attention),
      (found.backends ?? []).map(library),
      found.face_engines &&
        element(
          "div",
          { class: "hp-item" },
          element("span", { class: "hp-name" }, "Face engines"),
          found.face_engines.map((line) => element("div", { class: "hp-quiet hp-break" }, line)),
        ),
      again,
    );
  }

  attention(backends) {
    return element(
      "div",
      { class: "hp-item" },
      element("span", { class: "hp-name" }, "Attention backends of this process"),
      backends.map((one) =>
        element(
          "div",
          { class: "hp-quiet hp-break", "data-attention": one.name },
          element("span", { class: one.reason === null ? "hp-good" : "" }, one.name),
          one.reason === null ? `: works${one.exact ? "" : ", rounds"} (${one.what})` : `: ${one.reason}`,
        ),
      ),
    );
  }

  versions() {
    const rows = Object.entries(this.data.versions).flatMap(([name, version]) => [
      element("dt", { class: "hp-quiet" }, name),
      element("dd", { class: "hp-break" }, version),
    ]);
    return this.section(
      "versions",
      "Versions",
      element("dl", {}, rows),
      element("p", {}, link(this.data.documentation, "Documentation")),
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
      tooltip: "Hotpath: caches, model files, libraries",
      type: "custom",
      render: (parent) => (panel ??= new HotpathPanel()).mount(parent),
      destroy: () => panel?.unmount(),
    });
  },
});
