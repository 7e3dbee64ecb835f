"use strict";
// The table of cases: sorting, filters, and rows that open to samples, metrics and parameters.

(() => {
  const table = document.getElementById("cases-table");
  if (!table) return;
  const body = table.tBodies[0];
  const form = document.getElementById("filters");
  const search = document.getElementById("search");
  const details = JSON.parse(document.getElementById("data-details").textContent);
  const rows = [...body.querySelectorAll("tr.case")];
  const palette = ["#2f7ed8", "#dd7200", "#159a74", "#c2479d", "#8a63d2", "#d64545", "#1b98b0", "#8f8800"];

  // ---- sorting: what was not measured stays last in either direction

  function compare(column, numeric, sign) {
    return (first, second) => {
      const a = first.cells[column].dataset.v;
      const b = second.cells[column].dataset.v;
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
    };
  }

  function sort(header) {
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const numeric = header.dataset.kind === "number" || header.dataset.key === "status";
    rows.sort(compare(header.cellIndex, numeric, sign));
    for (const row of rows) body.append(...(row.detail ? [row, row.detail] : [row]));
    Report.say(`sorted by ${header.textContent}, ${header.getAttribute("aria-sort")}`);
  }

  table.tHead.addEventListener("click", (event) => {
    const header = event.target.closest("th[aria-sort]");
    if (header) sort(header);
  });

  // ---- filters

  function matches(row, words, wanted) {
    const text = row.textContent.toLowerCase();
    return words.every((word) => text.includes(word))
      && wanted.every(([name, value]) => row.getAttribute(`data-f-${name}`) === value);
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = [...form.querySelectorAll("select")].filter((one) => one.value).map((one) => [one.dataset.filter, one.value]);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !matches(row, words, wanted);
      if (row.detail) row.detail.hidden = row.hidden;
      shown += row.hidden ? 0 : 1;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length} cases`;
  }

  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  // ---- rows that open

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function element(name, text, ...children) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    made.append(...children);
    return made;
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    return Number(value).toLocaleString("en", { maximumSignificantDigits: 5 });
  }

  function tableOf(caption, names, values) {
    const head = element("tr", null, ...names.map((name) => element("th", name)));
    const lines = values.map((line) => element("tr", null, ...line.map((value) => element("td", String(value ?? "–")))));
    const made = element("table", null, element("caption", caption), element("thead", null, head), element("tbody", null, ...lines));
    const scroll = element("div", null, made);
    scroll.className = "scroll";
    return scroll;
  }

  function timingsTable(timings) {
    const names = ["clock", "process", "samples", "median µs", "interval µs", "min µs", "p90 µs", "p95 µs", "p99 µs", "switches"];
    const micro = (ns) => (ns === null ? "–" : number(ns / 1000));
    return tableOf("Times of a call, by clock and process", names, timings.map((row) => [
      row.clock, row.process, row.of, micro(row.median_ns), `[${micro(row.median_lo_ns)}, ${micro(row.median_hi_ns)}]`,
      micro(row.min_ns), micro(row.p90_ns), micro(row.p95_ns), micro(row.p99_ns), row.switches,
    ]));
  }

  function traces(timings, shape) {
    return timings.map((row, index) => {
      const color = palette[index % palette.length];
      const name = `${row.clock}, process ${row.process}`;
      const micros = row.ns.map((ns) => ns / 1000);
      if (shape === "index") {
        const place = micros.map((_, at) => at * row.step);
        const turn = row.turn.map((one) => `turn ${one}`);
        return { name, x: place, y: micros, text: turn, mode: "markers", marker: { color, size: 4, opacity: 0.7 }, visible: row.clock === "cpu" ? "legendonly" : true };
      }
      const sorted = [...micros].sort((a, b) => a - b);
      const share = sorted.map((_, at) => (at + 1) / sorted.length);
      return { name, x: sorted, y: share, mode: "lines", line: { color, shape: "hv" }, visible: row.clock === "cpu" ? "legendonly" : true };
    });
  }

  function plot(title, timings, shape) {
    const axes = shape === "index"
      ? { xaxis: { title: { text: "sample" } }, yaxis: { title: { text: "µs" } } }
      : { xaxis: { title: { text: "µs" } }, yaxis: { title: { text: "share of samples" }, range: [0, 1.02] } };
    const place = element("div", null);
    place.className = "plot";
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", title);
    const layout = { ...axes, height: 300, margin: { t: 32 }, showlegend: true, legend: { orientation: "h", y: 1, yanchor: "bottom" } };
    return [element("div", null, element("h4", title), place), () => Report.draw(place, { data: traces(timings, shape), layout })];
  }

  function csvOf(timings) {
    const lines = timings.flatMap((row) => row.ns.map((ns, at) => `${row.clock},${row.process},${row.sitting},${row.turn[at]},${ns}`));
    return ["clock,process,sitting,turn,ns", ...lines].join("\n");
  }

  function samples(found) {
    const timings = found.timings.filter((row) => row.ns.length);
    if (!timings.length) {
      const none = element("p", "No samples: only a timed case that is ok has any.");
      none.className = "empty";
      return [[none], []];
    }
    const [byIndex, drawIndex] = plot("Every call in the order it was made", timings, "index");
    const [ecdf, drawEcdf] = plot("Distribution of the calls (ECDF)", timings, "ecdf");
    const pair = element("div", null, byIndex, ecdf);
    pair.className = "pair";
    const capped = timings.filter((row) => row.step > 1)
      .map((row) => `${row.clock}, process ${row.process}: every ${row.step}th of ${row.of} samples is in this page; all are in the parts.`);
    const button = element("button", "Copy CSV");
    button.className = "copy";
    button.type = "button";
    button.csv = csvOf(timings);
    const sql = element("details", null, element("summary", "SQL"), element("pre", found.sql));
    const source = element("div", null, button, sql);
    source.className = "source";
    return [[pair, ...capped.map((text) => element("p", text)), source, timingsTable(found.timings)], [drawIndex, drawEcdf]];
  }

  function known(title, value) {
    if (value === null || value === undefined) return [];
    return [element("details", null, element("summary", title), element("pre", JSON.stringify(value, null, 1)))];
  }

  async function open(row, button) {
    const found = await unpack(details[row.dataset.case]);
    const [content, drawings] = samples(found);
    const inside = element("div", null, element("h3", found.label), ...content);
    inside.className = "inside";
    if (found.metrics.length) {
      inside.append(tableOf("Metrics", ["metric", "value", "unit", "interval", "n"], found.metrics.map((metric) => [
        metric.name, number(metric.value), metric.unit, metric.lo === null ? "–" : `[${number(metric.lo)}, ${number(metric.hi)}]`, metric.n,
      ])));
    }
    inside.append(...known("Keys and facts", found.facts), ...known("Executed", found.executed), ...known("Parameters", found.params));
    const cell = element("td", null, inside);
    cell.colSpan = row.cells.length;
    row.detail = element("tr", null, cell);
    row.detail.className = "detail";
    row.detail.id = `detail-${row.dataset.case}`;
    button.setAttribute("aria-controls", row.detail.id);
    row.after(row.detail);
    for (const drawing of drawings) await drawing();
  }

  function close(row) {
    for (const place of row.detail.querySelectorAll(".plot")) Plotly.purge(place);
    row.detail.remove();
    row.detail = null;
  }

  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr.case");
    if (!row || String(window.getSelection())) return;
    const button = row.querySelector("td.open button");
    const opening = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(opening));
    if (opening) open(row, button);
    else if (row.detail) close(row);
  });
})();
