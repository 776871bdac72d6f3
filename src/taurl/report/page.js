"use strict";
const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);

// Curves. Colours are names of CSS variables, so that one figure serves the light and the dark page.
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.length) return;
  const texts = read("chart-data").map((figure) => JSON.stringify(figure));
  const touch = matchMedia("(pointer: coarse)").matches; // dragging must scroll the page there, not zoom
  const drawn = new Set();
  const draw = (plot) => {
    const style = getComputedStyle(document.documentElement);
    const text = texts[plots.indexOf(plot)].replace(/var\((--[a-z0-9-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
    const figure = JSON.parse(text);
    if (touch) figure.layout.dragmode = false;
    drawn.add(plot);
    Plotly.react(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  };
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        watcher.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "600px" });
  plots.forEach((plot) => watcher.observe(plot));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => plots.filter((plot) => !drawn.has(plot)).forEach(draw));
})();

// Samples: filter, sort and page over the embedded list. Text goes in as text, never as HTML.
(() => {
  const form = byId("filters");
  if (!form) return;
  const samples = read("sample-data");
  const pageSize = 20;
  let page = 0;
  const field = (name) => form.elements.namedItem(name);
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const figure = (value) => (typeof value === "number" ? String(+value.toPrecision(4)).replace("-", "−") : value ?? "–");

  for (const kind of new Set(samples.map((sample) => sample.kind))) field("kind").add(new Option(kind, kind));

  const low = (value) => value ?? -Infinity;
  const orders = { // what has no reward comes last either way
    latest: (a, b) => b.step - a.step,
    earliest: (a, b) => a.step - b.step,
    highest: (a, b) => (low(a.reward) < low(b.reward)) - (low(a.reward) > low(b.reward)),
    lowest: (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity) || 0,
    longest: (a, b) => (b.tokens ?? 0) - (a.tokens ?? 0),
  };
  const wanted = () => {
    const words = field("text").value.toLowerCase();
    const from = field("from").value === "" ? -Infinity : Number(field("from").value);
    const to = field("to").value === "" ? Infinity : Number(field("to").value);
    const kind = field("kind").value;
    return samples
      .filter((sample) => (!kind || sample.kind === kind) && sample.step >= from && sample.step <= to
        && (!words || `${sample.prompt ?? ""}\n${sample.completion ?? ""}`.toLowerCase().includes(words)))
      .sort(orders[field("order").value]);
  };
  const card = (sample) => {
    const article = element("article", "sample");
    const row = sample.row === undefined ? "" : `, row ${figure(sample.row)}`;
    article.append(element("h3", "", `Step ${sample.step}, ${sample.kind}${row}`));
    const facts = [["reward", figure(sample.reward)]];
    const parts = Object.entries(sample.rewards ?? {});
    if (parts.length > 1) facts.push(...parts.map(([name, value]) => [name, figure(value)]));
    if (sample.advantage !== undefined) facts.push(["advantage", figure(sample.advantage)]);
    if (sample.tokens !== undefined) facts.push(["tokens", figure(sample.tokens)]);
    if (sample.finish === "length") facts.push(["ended", "by the length limit"]);
    if (sample.answer !== undefined) facts.push(["expected answer", sample.answer]);
    const list = element("dl", "facts");
    for (const [name, value] of facts) {
      const entry = element("div");
      entry.append(element("dt", "", name), element("dd", "", value));
      list.append(entry);
    }
    article.append(list, element("pre", "prompt", sample.prompt ?? ""), element("pre", "", sample.completion ?? ""));
    return article;
  };
  const show = () => {
    const found = wanted();
    const pages = Math.max(1, Math.ceil(found.length / pageSize));
    page = Math.min(Math.max(page, 0), pages - 1);
    byId("list").replaceChildren(...found.slice(page * pageSize, (page + 1) * pageSize).map(card));
    byId("found").textContent = `${found.length} of ${samples.length} samples`;
    byId("place").textContent = `Page ${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  };
  const turn = (by) => {
    page += by;
    show();
    byId("samples").scrollIntoView();
  };
  form.addEventListener("input", () => { page = 0; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  show();
})();
