"use strict";
// The page is whole without this, but for the table of runs: figures say their numbers on hovering, one model at a time
// can be shown, and the runs that lie in the page are sorted, filtered, paged and opened.

const by = (id) => document.getElementById(id);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never as HTML
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// What a mark says, beside the pointer or the mark that has the focus.
const tip = by("tip");
const says = (link) => link.querySelector("[aria-label]")?.getAttribute("aria-label");
function showTip(event) {
  const link = event.target.closest?.("figure svg a");
  const text = link && says(link);
  tip.hidden = !text;
  if (!text) return;
  const [name, ...facts] = text.split("\n");
  tip.replaceChildren(element("b", name), ...facts.map((fact) => {
    const [label, ...said] = fact.split(": "), line = element("div", said.join(": "));
    line.prepend(element("span", label));
    return line;
  }));
  const box = link.getBoundingClientRect();
  const x = event.clientX ?? box.right, y = event.clientY ?? box.bottom;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 16 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 16}px`;
}
document.addEventListener("pointermove", showTip);
document.addEventListener("focusin", showTip);
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
addEventListener("scroll", () => {
  const focused = document.activeElement;
  if (focused?.closest("figure svg")) showTip({ target: focused }); // it follows a mark that the keyboard reached
  else tip.hidden = true;
}, { passive: true });

// Tab reaches one mark of a figure, arrow keys the others; one that says the same as the one before is passed over.
const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
document.addEventListener("keydown", (event) => {
  const from = event.target.closest?.("figure svg a"), step = STEPS[event.key];
  if (!from || !step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const links = [...from.closest("svg").querySelectorAll("a")];
  let at = links.indexOf(from);
  if (Number.isFinite(step)) do at += step; while (links[at] && says(links[at]) === says(from));
  else at = step < 0 ? 0 : links.length - 1;
  links[at]?.focus();
});
document.addEventListener("focusin", (event) => {
  const link = event.target.closest?.("figure svg a");
  if (link) for (const other of link.closest("svg").querySelectorAll("a")) other.tabIndex = other === link ? 0 : -1;
});

// One model, one kind of hardware, or all.
const picked = { target: by("pick-target"), hardware: by("pick-hardware") };
by("pick").hidden = picked.target.length <= 2 && picked.hardware.length <= 2;
function pick() {
  for (const part of document.querySelectorAll("[data-target]")) {
    const { target, hardware } = part.dataset;
    part.hidden = Boolean((picked.target.value && target && target !== picked.target.value)
      || (picked.hardware.value && hardware && hardware !== picked.hardware.value));
  }
}
for (const one of Object.values(picked)) one.addEventListener("change", pick);

// On a phone rows become blocks, in which each value says what it is.
for (const table of document.querySelectorAll("table.stack")) {
  const titles = [...table.querySelectorAll("thead th")].map((heading) => [...heading.childNodes].map((n) => n.textContent).join(", "));
  for (const row of [...table.tBodies].flatMap((body) => [...body.rows])) {
    if (row.cells.length !== titles.length) continue;
    [...row.cells].forEach((cell, i) => { if (i) cell.dataset.label = titles[i]; });
  }
}

// On paper nothing can be opened: all is, and closed again after it.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], [data-print])")];
  for (const part of opened) part.open = true;
});
addEventListener("afterprint", () => { for (const part of opened) part.open = false; });

// What is wider than its place fades out at the side where it goes on.
function fade(box) {
  box.classList.toggle("goes-left", box.scrollLeft > 2);
  box.classList.toggle("goes-right", box.scrollLeft < box.scrollWidth - box.clientWidth - 2);
}
const sizes = new ResizeObserver((entries) => { for (const { target } of entries) fade(target); });
for (const box of document.querySelectorAll(".drawing, .scroll, nav")) {
  sizes.observe(box);
  box.addEventListener("scroll", () => fade(box), { passive: true });
}

const PAGE = 25;

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function reader(column) {
  if (!column) return () => null;
  return column.codes ? (i) => (column.codes[i] === null ? null : column.words[column.codes[i]]) : (i) => column.values[i];
}

// Numbers as `show` in table.py writes them: three significant digits, and all before the point.
const THREE = new Intl.NumberFormat("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 3, roundingMode: "halfEven" });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0, roundingMode: "halfEven" });
const measured = (value) => (Math.abs(value) >= 999.5 ? WHOLE : THREE).format(value);
const counted = (value) => WHOLE.format(value);
const WRITERS = { measured, counted }; // what a user has set stands as it is in the configuration

function start(study) {
  const get = Object.fromEntries(Object.entries(study.columns).map(([name, column]) => [name, reader(column)]));
  const settings = Object.entries(study.settings).map(([name, column]) => [name, reader(column)]);
  const value = (name, i) => (get[name] ? get[name](i) : null);
  const shown = (name, one) => (one === null ? "" : [one].flat().map(WRITERS[study.columns[name].kind] ?? String).join(", "));
  const place = new Map();
  for (let i = 0; i < study.count; i++) place.set(get.run_id(i), i);

  const anchor = (run) => `#run=${encodeURIComponent(run)}`;
  const inWords = (name, v) => (name === "state" ? study.states[v]?.words ?? v : v);
  const badge = (state) => {
    const known = study.states[state] ?? { words: state, symbol: "", tone: "none" };
    const made = element("span", undefined, { class: `badge ${known.tone}` });
    made.append(element("span", known.symbol, { "aria-hidden": "true" }), element("span", ` ${known.words}`, { class: "words" }));
    return made;
  };

  // Filters: a choice for each of some columns, and words anywhere in the status, the names and the reasons.
  const filters = study.filters.map((name) => {
    const title = study.table.find((one) => one.name === name)?.title ?? name;
    const label = element("label", title);
    const select = element("select", undefined, { "data-filter": name });
    select.append(element("option", "all", { value: "" }));
    const found = new Set();
    for (let i = 0; i < study.count; i++) found.add(value(name, i));
    const order = [...found].filter((v) => v !== null).sort((a, b) => (typeof a === "number" ? a - b : inWords(name, a).localeCompare(inWords(name, b))));
    for (const one of order) select.append(element("option", name === "state" ? inWords(name, one) : shown(name, one), { value: one }));
    label.append(select);
    by("tools").append(label);
    select.addEventListener("change", () => refresh(true));
    return { name, select };
  });
  by("find").addEventListener("input", () => refresh(true));

  const nothing = element("tr"), clear = element("button", "Clear the filter", { type: "button" });
  const said = element("td", "No run matches. ", { colspan: study.table.length });
  said.append(clear);
  nothing.append(said);
  clear.addEventListener("click", () => {
    for (const { select } of filters) select.value = "";
    by("find").value = "";
    refresh(true);
    by("find").focus();
  });
  // A click anywhere in a row opens its run, but for one on a link, or to mark some text.
  by("rows").addEventListener("click", (event) => {
    const run = event.target.closest("tr").dataset.run;
    if (run && !event.target.closest("a") && !String(getSelection())) location.hash = anchor(run);
  });

  const kind = (column) => `${column.numeric ? "number" : "name"}${column.on_paper ? "" : " screen"}`;
  let order = { column: null, direction: 1 }, first = 0, view = [];
  const searched = ["state", "target", "hardware", "recipe", "run_id", "techniques", "reason", "failure_cause", "host", "slurm_job_id"]
    .filter((name) => get[name]);
  let texts; // what is searched of each run, put together at the first search
  function text(i) {
    const parts = searched.map((name) => value(name, i)).filter((part) => part !== null);
    return [...parts, inWords("state", value("state", i))].join("\n").toLowerCase();
  }

  function refresh(changed) {
    if (changed) {
      first = 0;
      const wanted = filters.filter(({ select }) => select.value !== "");
      const words = by("find").value.toLowerCase().split(/\s+/).filter(Boolean); // each may be anywhere
      if (words.length) texts ??= Array.from({ length: study.count }, (_, i) => text(i));
      view = [];
      for (let i = 0; i < study.count; i++) {
        if (wanted.every(({ name, select }) => String(value(name, i)) === select.value)
          && words.every((word) => texts[i].includes(word))) view.push(i);
      }
      if (order.column !== null) {
        const read = (i) => inWords(order.column, value(order.column, i));
        view.sort((a, b) => {
          const x = read(a), y = read(b);
          if (x === null || y === null) return (x === null) - (y === null); // unknown last, either way
          return order.direction * (typeof x === "number" ? x - y : x < y ? -1 : x > y ? 1 : 0);
        });
      }
    }
    if (!view.length) by("rows").replaceChildren(nothing);
    else by("rows").replaceChildren(...view.slice(first, first + PAGE).map((i) => {
      const row = element("tr", undefined, { "data-run": value("run_id", i) });
      for (const column of study.table) {
        const cell = element("td", undefined, { class: kind(column) });
        const text = value(column.name, i);
        // Tab stops once in a row, at the link of its status.
        if (column.name === "run_id") cell.append(element("a", text, { href: anchor(text), tabindex: "-1" }));
        else if (column.name === "state") {
          const run = value("run_id", i);
          const link = element("a", undefined, { href: anchor(run), "aria-label": `${study.states[text]?.words}: ${run}` });
          link.append(badge(text));
          cell.append(link);
        }
        else cell.textContent = shown(column.name, text);
        row.append(cell);
      }
      return row;
    }));
    const last = Math.min(first + PAGE, view.length);
    const part = view.length ? `${counted(first + 1)}–${counted(last)} of ${counted(view.length)}` : "no run";
    by("place").textContent = part;
    const all = view.length < study.count ? `, of ${counted(study.count)} in all` : "";
    by("on-paper").textContent = `On paper: ${part}${all}, and not every column.`;
    by("previous").disabled = first === 0;
    by("next").disabled = last >= view.length;
  }
  by("previous").addEventListener("click", () => { first = Math.max(0, first - PAGE); refresh(false); });
  by("next").addEventListener("click", () => { first += PAGE; refresh(false); });

  for (const column of study.table) {
    const heading = element("th", undefined, { scope: "col", class: kind(column) });
    const button = element("button", column.title, { type: "button" });
    if (column.hint) button.append(element("small", column.hint));
    button.addEventListener("click", () => {
      order = { column: column.name, direction: order.column === column.name ? -order.direction : 1 };
      for (const other of by("headings").children) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order.direction === 1 ? "ascending" : "descending");
      refresh(true);
    });
    heading.append(button);
    by("headings").append(heading);
  }

  // The panel of a run: everything that is known of it.
  const panel = by("panel");
  function facts(title, entries) {
    const list = element("dl", undefined, { class: "facts" });
    for (const [name, text, meaning] of entries) {
      list.append(element("dt", name, meaning ? { title: meaning } : {}), element("dd", text));
    }
    return entries.length ? [element("h3", title), list] : [];
  }
  // A line for each setting, under its path: `training.learning_rate`.
  function settled(path, it) {
    if (it === null || typeof it !== "object") return [[path, String(it)]];
    if (Array.isArray(it)) return [[path, it.map((one) => (typeof one === "object" ? JSON.stringify(one) : one)).join(", ")]];
    const inner = Object.entries(it).flatMap(([key, one]) => settled(`${path}.${key}`, one));
    return inner.length ? inner : [[path, "nothing set"]];
  }
  function parsed(text) {
    try { return JSON.parse(text); } catch { return text; } // a mere word
  }
  const groups = {
    "How it ended": ["reason", "oom_phase", "oom_step", "oom_rank", "oom_requested_gib", "oom_held_gib", "oom_fragmented",
      "attempts", "failure_cause", "failure_log"],
    "Where and with what": ["host", "gpu_name", "slurm_job_id", "started_at", "duration_seconds", "gpu_hours", "torch_version",
      "transformers_version", "deepspeed_version", "software_sha256", "lock_sha256", "commit", "model_source", "data_sha256"],
  };
  const apart = new Set(["run_id", "state", "failure_log_tail", "log_tail", "command", ...Object.values(groups).flat()]);
  const lines = (names, i) => names.filter((name) => value(name, i) !== null)
    .map((name) => [name, shown(name, value(name, i)), study.meanings[name]]);

  function open(run_id) {
    const i = place.get(run_id);
    const close = element("button", "Close", { type: "button", class: "close" });
    close.addEventListener("click", () => panel.close());
    const title = element("h2", run_id, { id: "panel-title" });
    if (i === undefined) {
      panel.replaceChildren(close, title, element("p", "This study has no such run; the table of runs names all of them."));
      return panel.open || panel.showModal();
    }
    const command = value("command", i).replaceAll("RUN_ID", run_id);
    const parts = settings.map(([name, read]) => [name, read(i)]).filter(([, text]) => text !== null)
      .flatMap(([name, text]) => settled(name, parsed(text)));
    const tail = value("failure_log_tail", i) ?? value("log_tail", i);
    panel.replaceChildren(close, title, badge(value("state", i)),
      element("h3", "Repeat it"), element("pre", command),
      ...facts("How it ended", lines(groups["How it ended"], i)),
      ...(tail ? [element("h3", "The last lines of its log"), element("pre", tail)] : []),
      ...facts("Measured and planned", lines(Object.keys(get).filter((name) => !apart.has(name)), i)),
      ...facts("Where and with what", lines(groups["Where and with what"], i)),
      ...facts("Settings", parts));
    if (!panel.open) panel.showModal();
    panel.scrollTop = 0;
  }
  panel.addEventListener("close", () => {
    if (location.hash.startsWith("#run=")) history.replaceState(null, "", "#runs");
  });
  panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); });
  function follow() {
    if (!location.hash.startsWith("#run=")) return panel.open && panel.close();
    const asked = location.hash.slice(5);
    try { open(decodeURIComponent(asked)); } catch (error) { if (error instanceof URIError) open(asked); else throw error; }
  }
  addEventListener("hashchange", follow);
  by("table").hidden = false;
  refresh(true);
  follow();
  document.documentElement.dataset.ready = "true";
}

const data = by("data");
if (!data) document.documentElement.dataset.ready = "true";
else if (typeof DecompressionStream === "undefined") by("table").replaceWith(element("p", "This browser can't open the table of runs; tables/runs.csv holds the same."));
else unpack(data.textContent).then(start);
