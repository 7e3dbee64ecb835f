"use strict";
// Charts are drawn when they come into view, in the colours of the theme; nothing is fetched.

const Report = (() => {
  const texts = JSON.parse(document.getElementById("data-csv").textContent);
  const narrowScreen = window.matchMedia("(max-width: 720px)");
  const darkScheme = window.matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function say(message) {
    document.getElementById("said").textContent = message;
  }

  // Set the value at a path such as "xaxis.domain", making what is missing.
  function put(object, path, value) {
    const names = path.split(".");
    const last = names.pop();
    names.reduce((inner, name) => (inner[name] ??= {}), object)[last] = value;
  }

  function themed(layout) {
    const result = structuredClone(layout);
    result.font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") };
    result.paper_bgcolor = result.plot_bgcolor = "rgba(0,0,0,0)";
    result.hoverlabel = { bgcolor: colour("--panel"), bordercolor: colour("--line"), align: "left" };
    result.margin = { l: 12, r: 16, t: 48, b: 48, ...result.margin };
    result.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") };
    result.xaxis ??= {};
    result.yaxis ??= {};
    for (const name of Object.keys(result).filter((key) => /^[xy]axis\d*$/.test(key))) {
      const axis = result[name];
      axis.gridcolor ??= colour("--grid");
      axis.linecolor = axis.zerolinecolor = colour("--line");
      axis.tickfont = { color: colour("--ink"), ...axis.tickfont };
      axis.automargin ??= true;
      axis.zeroline ??= false;
    }
    return result;
  }

  function draw(place, spec) {
    drawn.set(place, spec);
    const layout = themed(spec.layout);
    if (narrowScreen.matches) {
      for (const [path, value] of Object.entries(spec.narrow ?? {})) put(layout, path, value);
    }
    place.style.minHeight = `${layout.height}px`;
    return Plotly.react(place, structuredClone(spec.data), layout, { ...config, displayModeBar: narrowScreen.matches ? false : "hover" })
      .then(() => { place.dataset.drawn = "yes"; });
  }

  function redraw() {
    for (const [place, spec] of drawn) {
      if (place.isConnected) draw(place, spec);
      else drawn.delete(place);
    }
  }

  function chosen(key) {
    const select = document.querySelector(`select[data-chart="${key}"]`);
    return select ? Number(select.value) : 0;
  }

  function show(place) {
    const key = place.dataset.chart;
    const number = chosen(key);
    for (const note of place.closest("figure").querySelectorAll(".note")) note.hidden = Number(note.dataset.variant) !== number;
    const source = document.getElementById(`figure-${key}-${number}`);
    return draw(place, JSON.parse(source.textContent));
  }

  async function copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    say(`${what} copied`);
  }

  function onCopy(event) {
    const button = event.target.closest("button.copy");
    if (!button) return;
    const key = button.dataset.csv;
    const text = button.csv ?? texts[key][texts[key].length > 1 ? chosen(key) : 0];
    copy(text, "CSV").then(() => {
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy CSV"; }, 1500);
    });
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      seen.unobserve(entry.target);
      show(entry.target);
    }
  }, { rootMargin: "300px" });

  for (const place of document.querySelectorAll(".plot")) seen.observe(place);
  for (const select of document.querySelectorAll("select[data-chart]")) {
    select.addEventListener("change", () => show(document.getElementById(`plot-${select.dataset.chart}`)));
  }
  document.addEventListener("click", onCopy);
  darkScheme.addEventListener("change", redraw);
  narrowScreen.addEventListener("change", redraw);
  return { draw, say };
})();
