"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const settings = read("settings");
const root = document.documentElement;
let axis = "step";
const complain = (text) => { document.getElementById("trouble").textContent = text; };

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

async function load() {
  if (typeof DecompressionStream === "undefined") throw Error("this browser cannot unpack the charts: use one from 2023 or later");
  const packed = new Blob([bytes(document.getElementById("library").textContent)]);
  const script = document.createElement("script");
  script.textContent = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  if (!window.Bokeh) throw Error("the charts' library did not start");
  Bokeh.set_log_level("error");
  const charts = read("charts");
  await Bokeh.embed.embed_items(charts.docs, charts.items);
  paint();
  label();
}

const plots = () => Bokeh.documents.flatMap((one) => one.roots());
const models = () => plots().flatMap((plot) => [...plot.references()]);

function paint() {
  const style = getComputedStyle(root);
  const [ink, dim, rule, grid] = ["--ink", "--dim", "--rule", "--grid"].map((name) => style.getPropertyValue(name).trim());
  for (const model of models()) {
    const type = model.type;
    if (type === "Figure") model.setv({background_fill_color: null, border_fill_color: null, outline_line_color: rule});
    else if (type === "Title") model.text_color = ink;
    else if (type.endsWith("Axis")) model.setv({axis_label_text_color: dim, major_label_text_color: dim, axis_line_color: rule,
      major_tick_line_color: rule, minor_tick_line_color: null, axis_label_text_font_style: "normal", axis_label_text_font_size: "11px"});
    else if (type === "Grid") model.grid_line_color = grid;
    else if (type === "Legend") model.setv({label_text_color: ink, inactive_fill_color: style.getPropertyValue("--paper").trim()});
    else if (type === "ColorBar") model.setv({major_label_text_color: dim, major_tick_line_color: rule, bar_line_color: null});
  }
}

function label() {
  for (const plot of plots()) plot.below[0].axis_label = axis === "step" ? "step" : "hours since the start";
}

function over(data) {
  const found = {...data, x: data[axis]};
  if (data.width_step) found.width = data[`width_${axis}`];
  return found;
}

const sources = () => models().filter((model) => model.type === "ColumnDataSource");

document.getElementById("axis")?.addEventListener("click", (event) => {
  const chosen = event.target.dataset.axis;
  if (!chosen || !window.Bokeh) return;
  axis = chosen;
  for (const button of event.currentTarget.children) button.setAttribute("aria-pressed", button === event.target);
  for (const source of sources()) source.data = over(source.data);
  label();
  for (const plot of plots()) plot.reset.emit();
});

document.getElementById("theme").addEventListener("click", () => {
  const dark = getComputedStyle(root).colorScheme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
  if (window.Bokeh) paint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.Bokeh && paint());

document.getElementById("runs")?.addEventListener("change", (event) => {
  const run = Number(event.target.dataset.run);
  for (const model of models()) if (model.tags?.[0] === run && model.type === "GlyphRenderer") model.visible = event.target.checked;
  for (const part of document.querySelectorAll(`[data-of="${run}"]`)) part.hidden = !event.target.checked;
});

function decoded(columns) {
  const found = {};
  for (const [name, column] of Object.entries(columns)) {
    if (Array.isArray(column)) found[name] = column;
    else found[name] = new (column.kind === "i" ? Int32Array : Float32Array)(bytes(column.data).buffer);
  }
  return found;
}

async function refresh() {
  const answer = await fetch(`data?have=${settings.stamp}`, {cache: "no-store"});
  if (!answer.ok) throw Error(`the server answers ${answer.status}`);
  if (answer.status === 204) return;
  const news = await answer.json();
  if (news.form !== settings.form) { location.reload(); return; }
  settings.stamp = news.stamp;
  for (const [id, html] of Object.entries(news.parts)) {
    const part = document.getElementById(id), open = [...part.querySelectorAll("details")].map((one) => one.open);
    part.innerHTML = html;
    part.querySelectorAll("details").forEach((one, i) => { one.open = open[i] ?? false; });
  }
  const known = new Map(sources().map((source) => [source.name, source]));
  for (const [name, columns] of Object.entries(news.sources)) if (known.has(name)) known.get(name).data = over(decoded(columns));
}

async function watch() {
  for (;;) {
    await new Promise((done) => setTimeout(done, 1000 * settings.every_s));
    try { await refresh(); complain(""); } catch (error) { complain(`no longer refreshed: ${error.message}`); }
  }
}

load().then(() => { root.dataset.ready = "yes"; if (settings.every_s) watch(); }, (error) => complain(error.message));
