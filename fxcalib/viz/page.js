"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const svg = document.querySelector("#picture > svg");
  const SVG = "http://www.w3.org/2000/svg";

  // elements are made with textContent only: nothing that comes from the model is read as markup
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  function draw(tag, attributes, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }
  function bytes(count) {
    if (count === null || count === undefined) return "depends on data";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (Math.abs(count) >= 1024 && unit < 4) { count /= 1024; unit += 1; }
    return `${unit ? count.toFixed(1) : count} ${units[unit]}`;
  }
  function number(count) {
    const units = ["", " K", " M", " G", " T", " P"];
    let unit = 0;
    while (Math.abs(count) >= 1000 && unit < 5) { count /= 1000; unit += 1; }
    return (unit ? String(Number(count.toPrecision(3))) : String(count)) + units[unit];
  }
  const seconds = (s) => (s < 60 ? `${s.toFixed(s < 1 ? 3 : 1)} s` : `${(s / 60).toFixed(1)} min`);
  const shape = (value) => (value.shape === null ? "object" : `${value.dtype}[${value.shape.join(", ")}]`);
  const error = (e) => (e === null ? "" : typeof e === "number" ? e.toExponential(2) : e);

  function table(heads, rows) {
    const cell = (tag, content, index) =>
      make(tag, heads[index].startsWith("#") ? { class: "number" } : {}, content ?? "");
    return make("table", {},
      make("thead", {}, make("tr", {}, ...heads.map((head, i) => cell("th", head.replace("#", ""), i)))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((content, i) => cell("td", content, i))))));
  }
  const code = (text) => make("code", {}, text);

  // pan and zoom move the view box
  const whole = svg.viewBox.baseVal;
  const all = { x: whole.x, y: whole.y, width: whole.width, height: whole.height };
  svg.removeAttribute("width");
  svg.removeAttribute("height");
  svg.setAttribute("preserveAspectRatio", "xMidYMin meet");
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label", "The graph; arrow keys move it");
  svg.querySelector(".graph > title")?.remove();
  let box = { ...all };
  function show(next) {
    box = next;
    svg.setAttribute("viewBox", `${box.x} ${box.y} ${box.width} ${box.height}`);
  }
  function fit() { show({ ...all }); }
  function start() {
    // a tall graph begins at its top, at a legible size
    const frame = svg.getBoundingClientRect();
    const scale = Math.min(frame.width / all.width, frame.height / all.height);
    if (scale >= 0.8 || !frame.width) return fit();
    const wanted = Math.min(1, Math.max(scale, frame.width / all.width));
    const width = frame.width / wanted, height = frame.height / wanted;
    show({ x: all.x + (all.width - width) / 2, y: all.y, width, height });
  }
  function point(event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return { x: at.x, y: at.y };
  }
  function zoom(factor, at) {
    const centre = at || { x: box.x + box.width / 2, y: box.y + box.height / 2 };
    const width = Math.min(all.width * 4, Math.max(40, box.width * factor));
    const real = width / box.width;
    show({ x: centre.x - (centre.x - box.x) * real, y: centre.y - (centre.y - box.y) * real,
      width, height: box.height * real });
  }
  function pan(dx, dy) { show({ ...box, x: box.x + dx * box.width, y: box.y + dy * box.height }); }
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.004), point(event));
  }, { passive: false });
  let grip = null, moved = false;
  svg.addEventListener("pointerdown", (event) => { grip = { from: point(event), id: event.pointerId }; moved = false; });
  svg.addEventListener("pointermove", (event) => {
    if (!grip) return;
    const to = point(event);
    const dx = grip.from.x - to.x, dy = grip.from.y - to.y;
    const far = 4 * box.width / svg.clientWidth;
    if (!moved && Math.hypot(dx, dy) < far) return;
    if (!moved) svg.setPointerCapture(grip.id);
    moved = true;
    svg.classList.add("dragging");
    show({ ...box, x: box.x + dx, y: box.y + dy });
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    svg.addEventListener(kind, () => { grip = null; svg.classList.remove("dragging"); });
  }
  $("zoom-in").addEventListener("click", () => zoom(0.75));
  $("zoom-out").addEventListener("click", () => zoom(1 / 0.75));
  $("fit").addEventListener("click", fit);

  function theme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "Light" : "Dark";
    $("theme").setAttribute("aria-pressed", String(dark));
  }
  const preference = matchMedia("(prefers-color-scheme: dark)");
  theme(preference.matches);
  preference.addEventListener("change", (event) => theme(event.matches));
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));

  $("title").textContent = data.model;
  const details = $("details"), results = $("results"), search = $("search");

  if (data.error !== undefined) return untraceable();

  const nodes = new Map(data.nodes.map((node) => [node.id, node]));
  const drawnAs = new Map();
  for (const [first, period, repeats] of data.stretches) {
    for (let i = 0; i < period * repeats; i += 1) drawnAs.set(first + i, first + (i % period));
  }
  const clusters = new Map();
  for (const element of svg.querySelectorAll("g.cluster.subgraph")) {
    const index = Number(element.id.replace("subgraph-", ""));
    clusters.set(index, element);
    const others = [...drawnAs].filter(([, stand]) => stand === index).map(([other]) => other);
    const many = others.length > 1 ? `, stands for ${others.length} of the same` : "";
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "button");
    element.setAttribute("aria-label", `subgraph ${index}: ${data.subgraphs[index].modules.join(", ")}${many}`);
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(index, true); }
    });
  }
  const boxes = new Map();
  for (const element of svg.querySelectorAll("g.node")) boxes.set(element.querySelector("title").textContent, element);
  svg.addEventListener("click", (event) => {
    if (moved) return;
    // edges lie above the clusters that they cross
    const below = document.elementsFromPoint(event.clientX, event.clientY);
    const cluster = below.map((element) => element.closest("g.subgraph")).find(Boolean);
    if (cluster) open(Number(cluster.id.replace("subgraph-", "")));
  });

  const sizes = Object.entries(data.sizes).map(([name, size]) => `${name} ${size}`).join(", ");
  $("facts").textContent = `${data.type} · ${number(data.parameters)} parameters, ${bytes(data.bytes)} · ` +
    `${data.subgraphs.length} subgraphs at ${data.targets.join(", ")} · ${sizes}`;

  let opened = null;
  function intro() {
    opened = null;
    for (const element of svg.querySelectorAll(".open")) element.classList.remove("open");
    details.replaceChildren(
      make("h2", {}, "Subgraphs"),
      make("p", { class: "muted" }, "Choose one here or in the picture. / searches, Enter opens, Esc closes, " +
        "+ - 0 and the arrow keys move the picture."),
      table(["", "modules", "#weights", "#carries on"], data.subgraphs.map((part) => [
        opener(part.index, String(part.index)), part.modules.join(", "), bytes(part.bytes),
        bytes(carried(part)),
      ])),
      make("h3", {}, `Guards (${data.guards.length})`),
      ...data.guards.map((guard) => make("div", {}, code(guard))));
  }
  const carried = (part) => part.outputs.reduce((sum, value) => sum + (value.bytes || 0), 0);
  function opener(index, text) {
    const button = make("button", { type: "button", "data-open": index }, text);
    button.addEventListener("click", () => open(index));
    return button;
  }

  function open(index, focus) {
    const part = data.subgraphs[index];
    const stand = drawnAs.get(index);
    opened = index;
    for (const element of svg.querySelectorAll(".open")) element.classList.remove("open");
    clusters.get(stand)?.classList.add("open");
    const same = [...drawnAs].filter(([, other]) => other === stand).map(([other]) => other);
    let chooser = null;
    if (same.length > 1) {
      chooser = make("select", { id: "member", "aria-label": "Which of the same subgraphs" },
        ...same.map((k) => make("option", { value: k }, `subgraph ${k}`)));
      chooser.value = String(index);
      chooser.addEventListener("change", () => { open(Number(chooser.value)); $("member")?.focus(); });
    }
    const close = make("button", { type: "button", id: "close", title: "Close (Esc)" }, "Close");
    close.addEventListener("click", dismiss);
    const inside = part.nodes.map((id) => nodes.get(id));
    const measured = new Map((part.measured?.modules || []).map((module) => [module.name, module]));
    const glue = inside.filter((node) => node.kind === "glue");
    const value = (v) => [v.name, shape(v), bytes(v.bytes), v.expression === "0" ? "" : code(v.expression)];
    details.replaceChildren(
      make("h2", {}, `Subgraph ${index} `, chooser, " ", close),
      make("p", {}, `${number(part.parameters)} parameters, ${bytes(part.bytes)} of weights; ` +
        `carries ${bytes(carried(part))} on` + (part.flops === null ? "" : `; ${number(part.flops)} FLOPs a batch`)),
      make("h3", {}, "Modules"),
      table(["name", "class", "#parameters", "#bytes"], inside.filter((n) => n.type).map((n) => [
        n.kind === "target" ? make("b", {}, n.name) : n.name, n.type, number(n.parameters), bytes(n.bytes)])),
      make("h3", {}, "Inputs"), table(["name", "value", "#bytes", "as"], part.inputs.map(value)),
      make("h3", {}, "Outputs"), table(["name", "value", "#bytes", "as"], part.outputs.map(value)),
      make("h3", {}, "Frees"), make("p", {}, part.frees.join(", ") || "nothing"),
      ...(part.measured ? [
        make("h3", {}, "Measured"),
        make("p", {}, `calibrate ${seconds(part.measured.calibrate_seconds)}, commit ` +
          `${seconds(part.measured.commit_seconds)}, propagate ${seconds(part.measured.propagate_seconds)}`),
        table(["module", "scheme", "#error", "of", "#time"], [...measured.values()].map((m) => [
          m.notes.length ? make("span", { title: m.notes.join("; ") }, `${m.name} *`) : m.name,
          m.scheme, error(m.error), m.measure, seconds(m.seconds)])),
      ] : []),
      make("h3", {}, `Glue operations (${glue.length})`),
      table(["operation", "result", "source"], glue.map((n) => [code(n.name), shape(n.value), code(n.source)])));
    $("side").scrollTop = 0;
    if (focus) close.focus();
  }
  function dismiss() {
    const from = opened === null ? null : clusters.get(drawnAs.get(opened));
    intro();
    if (from) from.focus();
  }

  function bring(element) {
    const frame = element.getBoundingClientRect(), outer = svg.getBoundingClientRect();
    if (frame.top >= outer.top && frame.bottom <= outer.bottom && frame.left >= outer.left &&
      frame.right <= outer.right) return;
    const middle = new DOMPoint(frame.x + frame.width / 2, frame.y + frame.height / 2)
      .matrixTransform(svg.getScreenCTM().inverse());
    show({ ...box, x: middle.x - box.width / 2, y: middle.y - box.height / 2 });
  }

  // modules inside of those that the graph calls: they have no box of their own
  const inner = data.subgraphs.flatMap((part) => part.inside.map((module) => {
    const holder = part.nodes.map((id) => nodes.get(id)).find((node) => node.type && module.name.startsWith(`${node.name}.`));
    return { ...module, subgraph: part.index, holder };
  }));
  const MOST = 60;
  function find() {
    const wanted = search.value.trim().toLowerCase();
    for (const element of svg.querySelectorAll(".hit")) element.classList.remove("hit");
    results.replaceChildren();
    if (!wanted) return;
    const found = data.nodes.filter((node) => node.kind !== "constant" &&
      `${node.name} ${node.type} ${node.source} ${node.value.name}`.toLowerCase().includes(wanted));
    found.push(...inner.filter(({ name, type }) => `${name} ${type}`.toLowerCase().includes(wanted)));
    results.append(make("p", { class: "muted", role: "status" }, `${found.length} found`));
    for (const node of found.slice(0, MOST)) {
      const place = node.subgraph === null ? "" : `subgraph ${node.subgraph}`;
      const button = make("button", { type: "button", class: "result" }, node.name,
        make("small", {}, [place, node.type, node.value && shape(node.value), node.source].filter(Boolean).join(" · ")));
      button.addEventListener("click", () => { if (node.subgraph !== null) { open(node.subgraph); } reach(node); });
      results.append(button);
    }
    if (found.length > MOST) results.append(make("p", { class: "muted" }, `and ${found.length - MOST} more`));
    const drawn = found.map(drawnBox).filter(Boolean);
    for (const element of new Set(drawn)) element.classList.add("hit");
    if (drawn.length) bring(drawn[0]);
  }
  function drawnBox(node) {
    if (node.holder) return drawnBox(node.holder);
    if (node.subgraph === null) return boxes.get(node.id.replaceAll(":", "/"));
    const stand = drawnAs.get(node.subgraph);
    const position = data.subgraphs[node.subgraph].nodes.indexOf(node.id);
    const identity = data.subgraphs[stand].nodes[position].replaceAll(":", "/");
    return boxes.get(identity) || clusters.get(stand);
  }
  function reach(node) { const element = drawnBox(node); if (element) bring(element); }
  search.addEventListener("input", find);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") results.querySelector("button.result")?.click();
  });

  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
    if (event.key === "Escape") {
      if (search.value) { search.value = ""; find(); }
      if (event.target === search) search.blur();
      dismiss();
    } else if (event.ctrlKey || event.metaKey || event.altKey || typing) {
      return;
    } else if (event.key === "/") {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key === "+" || event.key === "=") zoom(0.75);
    else if (event.key === "-") zoom(1 / 0.75);
    else if (event.key === "0") fit();
    else if (svg.contains(event.target)) {
      const move = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
      if (move) { event.preventDefault(); pan(...move); }
    }
  });
  // not for the mouse: the picture must not move between press and release
  svg.addEventListener("focusin", (event) => {
    if (event.target.matches(".subgraph:focus-visible")) bring(event.target);
  });

  // bars: rows of {label, values, index}; one colour a value, stacked
  function bars(title, legend, rows, text, width = 560) {
    const height = 170, left = 70, top = 8, low = 22;
    const most = Math.max(...rows.map((row) => row.values.reduce((a, b) => a + b, 0)), 1e-12);
    const plot = draw("svg", { class: "plot", style: `max-width: ${width}px`, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
    const y = (v) => top + (height - top - low) * (1 - v / most);
    for (const share of [0, 0.5, 1]) {
      plot.append(draw("line", { x1: left, x2: width, y1: y(share * most), y2: y(share * most) }));
      plot.append(draw("text", { x: left - 5, y: y(share * most) + 4, "text-anchor": "end" }, text(share * most)));
    }
    const step = (width - left) / rows.length;
    rows.forEach((row, i) => {
      const group = draw("g", { class: "bar", role: "button", tabindex: i === 0 ? "0" : "-1", "aria-label":
        `${row.label}: ${legend.map((name, k) => `${name} ${text(row.values[k])}`).join(", ")}` });
      group.append(draw("title", {}, group.getAttribute("aria-label")));
      let base = 0;
      row.values.forEach((value, k) => {
        group.append(draw("rect", { class: `c${k}`, x: left + i * step + step * 0.1, width: Math.max(step * 0.8, 0.5),
          y: y(base + value), height: Math.max(0, y(base) - y(base + value)) }));
        base += value;
      });
      group.addEventListener("click", () => open(row.index));
      group.addEventListener("keydown", (event) => {
        const next = { ArrowRight: group.nextElementSibling, ArrowLeft: group.previousElementSibling }[event.key];
        if (next?.classList.contains("bar")) {
          group.setAttribute("tabindex", "-1");
          next.setAttribute("tabindex", "0");
          next.focus();
        } else if (event.key === "Enter") {
          event.preventDefault();
          open(row.index, true);
        }
      });
      plot.append(group);
    });
    rows.forEach((row, i) => {
      const every = Math.ceil(rows.length / 20);
      if (i % every === 0 && row.tick !== undefined) {
        plot.append(draw("text", { x: left + (i + 0.5) * step, y: height - 7, "text-anchor": "middle" }, row.tick));
      }
    });
    const keys = make("div", { class: "legend" },
      ...legend.map((name, k) => make("span", {}, make("i", { class: `c${k}` }), name)));
    return make("div", {}, make("h3", {}, title), legend.length > 1 ? keys : null, plot);
  }

  const plots = make("div", { class: "plots" });
  if (data.memory) {
    // in the order in which they are stacked
    const order = ["weights", "batches", "stored", "statistics", "working", "copies", "workspace"];
    const held = order.filter((part) => data.memory.steps.some((step) => step.parts[part]));
    $("below").append(data.memory.steps.length ? bars(data.memory.title, held, data.memory.steps.map((step, i) => ({
      label: `step ${i}: ${step.text}`, values: held.map((part) => step.parts[part] ?? 0), index: step.subgraph, tick: i,
    })), bytes, Math.max(560, $("below").clientWidth - 32)) : make("p", { class: "note" }, data.memory.title));
    $("below").lastElementChild.id = "timeline";
  }
  if (data.run) {
    const run = data.run;
    const host = `${run.title}; ${seconds(run.seconds)}; peak memory ${bytes(run.peak_host_bytes)} host, ` +
      `${bytes(run.peak_device_bytes)} device`;
    const perplexity = run.perplexity_after === null ? "" :
      `; perplexity ${run.perplexity_before ?? "not measured"} → ${run.perplexity_after}`;
    $("below").append(make("h2", {}, "Measured run"), make("p", { id: "run" }, host + perplexity),
      ...run.warnings.map((text) => make("p", { class: "note" }, text)));
    const parts = data.subgraphs.filter((part) => part.measured);
    const modules = parts.flatMap((part) => part.measured.modules.map((module) => ({ part, module })));
    const rated = modules.filter(({ module }) => typeof module.error === "number");
    if (parts.length) {
      plots.append(bars("Time of each subgraph", ["calibrate", "commit", "propagate"], parts.map((part) => ({
        label: `subgraph ${part.index}`, index: part.index, tick: part.index, values: [part.measured.calibrate_seconds,
          part.measured.commit_seconds, part.measured.propagate_seconds] })), seconds));
    }
    if (rated.length) {
      plots.append(bars("Error of each module (relative, squared)", ["error"], rated.map(({ part, module }) => ({
        label: module.name, index: part.index, values: [module.error] })), (v) => v.toPrecision(2)));
      plots.append(bars("Time of each module", ["commit"], modules.map(({ part, module }) => ({
        label: module.name, index: part.index, values: [module.seconds] })), seconds));
    }
    $("below").append(plots);
  }

  intro();
  start();

  function untraceable() {
    $("facts").textContent = `${data.type} · cannot be traced`;
    const failing = data.nodes.filter((node) => node.failing);
    details.replaceChildren(
      make("h2", {}, "Why it cannot be traced"),
      make("p", { class: "note" }, data.error),
      make("h3", {}, "Line"), code(data.source || "unknown"),
      make("h3", {}, "Module"), make("p", {}, ...failing.map((n) => make("b", {}, `${n.name || "the model"} (${n.type})`))),
      make("h3", {}, "Modules"),
      table(["name", "class", "#times", "#bytes"], data.nodes.map((n) => [
        n.name || ".", n.type, n.count > 1 ? `× ${n.count}` : "", bytes(n.bytes)])));
    start();
    const drawn = new Map([...svg.querySelectorAll("g.node")].map((g) => [g.querySelector("title").textContent, g]));
    const rows = [...details.querySelectorAll("tbody tr")];
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      const found = data.nodes.map((n) => wanted !== "" && `${n.name} ${n.type}`.toLowerCase().includes(wanted));
      data.nodes.forEach((n, i) => {
        rows[i].hidden = wanted !== "" && !found[i];
        drawn.get(n.name || ".")?.classList.toggle("hit", found[i]);
      });
      results.replaceChildren(...(wanted ? [make("p", { class: "muted", role: "status" },
        `${found.filter(Boolean).length} found`)] : []));
      const first = data.nodes.find((n, i) => found[i]);
      if (first) drawn.get(first.name || ".")?.scrollIntoView({ block: "nearest" });
    });
    document.addEventListener("keydown", (event) => {
      if (event.target === search) {
        if (event.key === "Escape") { search.value = ""; search.dispatchEvent(new Event("input")); search.blur(); }
        return;
      }
      if (event.key === "/") { event.preventDefault(); search.focus(); }
      else if (event.key === "+" || event.key === "=") zoom(0.75);
      else if (event.key === "-") zoom(1 / 0.75);
      else if (event.key === "0") fit();
    });
  }
})();
