"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const byId = (id) => document.getElementById(id);
  const state = { head: "", dark: false, prompts: 20 };

  // Drawing -----------------------------------------------------------------------------------

  const template = () => data.templates[state.dark ? "dark" : "light"];

  function draw(plot) {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = "yes";
    const figure = data.figures[plot.dataset.figure];
    const layout = { ...figure.layout, template: template() };
    Plotly.newPlot(plot, figure.data, layout, data.config);
    plot.on("plotly_click", (event) => choose(headOf(event.points[0])));
    makeSwitch(plot);
    highlight(plot);
  }

  function makeSwitch(plot) {
    const figure = data.figures[plot.dataset.figure];
    const group = plot.parentElement.querySelector(".switch");
    if (!figure.switch) return;
    group.hidden = false;
    figure.switch.forEach((button, place) => {
      const element = document.createElement("button");
      element.type = "button";
      element.textContent = button.label;
      element.setAttribute("aria-pressed", String(place === figure.active));
      element.addEventListener("click", () => {
        Plotly[button.method](plot, ...structuredClone(button.args)).then(() => highlight(plot));
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === element));
      });
      group.append(element);
    });
  }

  // Choosing a head ----------------------------------------------------------------------------

  function headOf(point) {
    const named = point.customdata ?? point.data.meta;
    return typeof named === "string" ? named : "";
  }

  function choose(label) {
    state.head = data.labels.includes(label) && label !== state.head ? label : "";
    byId("head").value = state.head;
    const numbers = data.numbers[state.head];
    byId("chosen").textContent = state.head ? `${state.head} ${numbers ?? ""}` : "";
    for (const row of document.querySelectorAll("tr[data-head]")) {
      const own = row.dataset.head === state.head;
      row.classList.toggle("chosen", own);
      row.querySelector("button.head").setAttribute("aria-pressed", String(own));
    }
    plots.filter((plot) => plot.dataset.drawn).forEach(highlight);
    openCard();
    listPrompts();
  }

  // The card of the chosen head opens where it stands; the page does not jump.
  function openCard() {
    const card = state.head ? byId(`card-${state.head}`) : null;
    for (const each of document.querySelectorAll("details.card")) each.open = each === card;
    byId("card").hidden = !card;
    if (card) byId("card").href = `#${card.id}`;
  }

  function highlight(plot) {
    const traces = data.figures[plot.dataset.figure].data;
    if (traces.some((trace) => trace.type === "heatmap")) markCells(plot, traces[0]);
    else if (traces.some((trace) => typeof trace.meta === "string")) markLines(plot, traces);
    else markPoints(plot, plot.data);
  }

  function markCells(plot, trace) {
    const shapes = [];
    (trace.customdata ?? []).forEach((row, y) => {
      const cells = row.flatMap((label, x) => (label === state.head ? [x] : []));
      if (!state.head || !cells.length) return;
      const ends = [Math.min(...cells) - 0.5, Math.max(...cells) + 0.5];
      shapes.push({
        type: "rect", x0: ends[0], x1: ends[1], y0: y - 0.5, y1: y + 0.5,
        line: { color: "#E69F00", width: 3 }, name: "chosen",
      });
    });
    Plotly.relayout(plot, { shapes });
    plot.dataset.highlighted = shapes.length ? state.head : "";
  }

  function markLines(plot, traces) {
    const found = traces.some((trace) => trace.meta === state.head);
    const dim = (trace) => (found && trace.meta !== state.head ? 0.1 : 1);
    Plotly.restyle(plot, {
      opacity: traces.map((trace) => (found ? dim(trace) : trace.opacity ?? 1)),
      "line.width": traces.map((trace) => (found && trace.meta === state.head ? 4 : trace.line?.width ?? 2)),
    });
    plot.dataset.highlighted = found ? state.head : "";
  }

  function markPoints(plot, traces) {
    const places = traces.map((trace) =>
      (trace.customdata ?? []).flatMap((label, i) => (label === state.head ? [i] : [])));
    const found = state.head !== "" && places.some((list) => list.length);
    // Only what names heads is dimmed: bands, levels and random sets stay as they are.
    const names = (trace) => (trace.customdata ?? []).some((label) => label !== null);
    Plotly.restyle(plot, {
      selectedpoints: traces.map((trace, i) => (found && names(trace) ? places[i] : null)),
      "unselected.marker.opacity": 0.2,
    });
    plot.dataset.highlighted = found ? state.head : "";
  }

  // Colours ------------------------------------------------------------------------------------

  function colour(dark) {
    state.dark = dark;
    document.documentElement.dataset.colours = dark ? "dark" : "light";
    byId("colours").setAttribute("aria-pressed", String(dark));
    for (const plot of plots.filter((each) => each.dataset.drawn)) {
      Plotly.relayout(plot, { template: template() });
    }
  }

  // Prompts ------------------------------------------------------------------------------------

  const shown = (value) => (value === null ? "undefined" : Number(value.toPrecision(3)).toString());

  function element(name, text, className) {
    const made = document.createElement(name);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  const chosenCondition = () =>
    data.prompts.conditions.find((each) => each.head === state.head) ?? data.prompts.conditions[0];

  function rows() {
    const { ids, texts } = data.prompts;
    const condition = chosenCondition();
    const wanted = byId("find").value.trim().toLowerCase();
    const delta = ids.map((_, i) => condition.raw[i] - condition.mapped[i]);
    const found = ids.map((_, i) => i).filter((i) =>
      `${ids[i]}\n${texts[i] ?? ""}`.toLowerCase().includes(wanted));
    const order = byId("order").value;
    if (order !== "id") found.sort((a, b) => (order === "down" ? delta[b] - delta[a] : delta[a] - delta[b]));
    return found.map((i) => ({ i, delta: delta[i] }));
  }

  function listPrompts() {
    if (!data.prompts) return;
    const all = rows();
    byId("list").replaceChildren(...all.slice(0, state.prompts).map(promptItem));
    byId("shown").textContent =
      `${Math.min(state.prompts, all.length)} of ${all.length} prompts, ΔKL of ${chosenCondition().name} (nats).`;
    byId("more").hidden = state.prompts >= all.length;
  }

  function promptItem({ i, delta }) {
    const { ids, texts, groups, next } = data.prompts;
    const item = document.createElement("li");
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const text = texts[i];
    summary.append(element("span", shown(delta), "amount"), element("strong", ids[i]));
    if (text) summary.append(" ", element("span", text.length > 90 ? `${text.slice(0, 90)}…` : text, "start"));
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (!details.open || details.childElementCount > 1) return;
      if (text) details.append(element("p", text, "prompt"));
      if (groups[i] !== ids[i]) details.append(element("p", `group ${groups[i]}`, "setting"));
      if (next[i]) details.append(nextTable(next[i]));
      details.append(promptTable(i));
    });
    item.append(details);
    return item;
  }

  const MODELS = { base: "base", tuned: "tuned", patched: "tuned with base's heads" };

  function nextTable(said) {
    const table = document.createElement("table");
    table.append(element("caption", "The likeliest next tokens; the last row has base's activations in all heads of the layer, at strength 1"));
    const body = table.createTBody();
    for (const [model, name] of Object.entries(MODELS)) {
      const row = body.insertRow();
      row.append(element("th", name));
      for (const [token, probability] of said[model]) {
        const cell = element("td", "", "words");
        cell.append(element("code", token), ` ${(100 * probability).toFixed(1)}%`);
        row.append(cell);
      }
    }
    const wrapped = document.createElement("div");
    wrapped.className = "scroll";
    wrapped.append(table);
    return wrapped;
  }

  function promptTable(i) {
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["patched", "KL_raw (nats)", "KL_mapped (nats)", "ΔKL (nats)"]) head.append(element("th", name));
    const body = table.createTBody();
    const fixed = data.prompts.conditions.filter((each) => !each.head);
    const single = data.prompts.conditions.filter((each) => each.head);
    const delta = (each) => each.raw[i] - each.mapped[i];
    single.sort((a, b) => delta(b) - delta(a));
    const best = single.filter((each, place) => place < 5 || each.head === state.head);
    for (const each of [...fixed, ...best]) {
      const row = body.insertRow();
      row.append(element("th", each.name));
      for (const value of [each.raw[i], each.mapped[i], delta(each)]) row.append(element("td", shown(value)));
    }
    const wrapped = document.createElement("div");
    wrapped.className = "scroll";
    wrapped.append(table);
    return wrapped;
  }

  // Folded sections ------------------------------------------------------------------------------

  function unfold() {
    const asked = location.hash && byId(decodeURIComponent(location.hash.slice(1)));
    const folded = asked && (asked.closest("details") ?? asked.querySelector("details.part"));
    if (folded && !folded.open) {
      folded.open = true;
      asked.scrollIntoView();
    }
  }

  // Start --------------------------------------------------------------------------------------

  const wishes = window.matchMedia("(prefers-color-scheme: dark)");
  colour(wishes.matches);
  wishes.addEventListener("change", (event) => colour(event.matches));
  byId("colours").addEventListener("click", () => colour(!state.dark));
  byId("head").addEventListener("change", (event) => { state.head = ""; choose(event.target.value); });
  byId("clear").addEventListener("click", () => choose(""));
  for (const button of document.querySelectorAll("button.head")) {
    button.addEventListener("click", () => choose(button.textContent));
  }
  if (data.prompts) {
    byId("order").addEventListener("change", listPrompts);
    byId("find").addEventListener("input", listPrompts);
    byId("more").addEventListener("click", () => { state.prompts += 50; listPrompts(); });
    listPrompts();
  }

  // Figures are drawn when they come near the window, all of them before printing.
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "600px" },
  );
  plots.forEach((plot) => watcher.observe(plot));
  window.addEventListener("hashchange", unfold);
  unfold();
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("details.part").forEach((part) => { part.open = true; });
    colour(false);
    plots.forEach(draw);
    plots.forEach((plot) => Plotly.relayout(plot, { autosize: false, width: 660 }));
  });
  window.addEventListener("afterprint", () => {
    plots.forEach((plot) => Plotly.relayout(plot, { autosize: true, width: null }));
    colour(wishes.matches);
  });
})();
