"use strict";
// Lays the figures out in the width there is, draws them with Plotly when they come near, and saves them as PNG or CSV.
(() => {
  const FONT = "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif";
  const PICTURE = 1000; // pixels of a saved picture's width, before it is doubled

  // --- text -------------------------------------------------------------------------------------------------------
  const literal = (text) => text.replace(/[&<>%]/g, (sign) => `&#${sign.charCodeAt(0)};`); // Plotly reads these
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = `12px ${FONT}`;
  const long = (text) => ruler.measureText(text).width;
  const longest = (texts) => Math.max(0, ...texts.map(long));

  function shortened(text, room) {
    let kept = text.length, short = text;
    while (long(short) > room && kept > 4) {
      kept -= 1;
      short = `${text.slice(0, Math.ceil(kept / 2))}…${text.slice(-Math.floor(kept / 2))}`;
    }
    return short;
  }

  // Labels that fit: without the parts of a path that all begin with, and with their middle left out where need be.
  function fitted(labels, room) {
    if (longest(labels) <= room) return labels;
    const shared = labels.reduce((common, label) => {
      while (!label.startsWith(common)) common = common.replace(/[^./]*[./]?$/, "");
      return common;
    }, labels[0].replace(/[^./]+$/, ""));
    return labels.map((label) => shortened((shared ? "…" : "") + label.slice(shared.length), room));
  }

  // `pitch` is the distance between two labels: where they would touch, only every second or third is written.
  function ticks(labels, room, pitch) {
    if (!labels.length) return {};
    const every = Math.ceil(14 / pitch), chosen = (_, index) => index % every === 0;
    const shown = fitted(labels, room).map(literal);
    return { tickmode: "array", tickvals: labels.map(literal).filter(chosen), ticktext: shown.filter(chosen) };
  }

  // Names of panels and axes, at a distance in pixels from a corner or the middle of a side.
  const above = { x: 0, y: 1, xanchor: "left", yanchor: "bottom", xshift: -2 };
  const beneath = (distance) => ({ x: 0.5, y: 0, yanchor: "top", yshift: -distance });
  const beside = (distance) => ({ x: 0, y: 0.5, xanchor: "right", xshift: -distance, textangle: -90 });
  const named = (text, axis, place) => (
    { text: literal(text), xref: `x${axis} domain`, yref: `y${axis} domain`, showarrow: false, ...place }
  );

  // --- layout -----------------------------------------------------------------------------------------------------
  const arrange = { grids, chart, picture };

  function arranged(drawn, width) {
    const copy = structuredClone(drawn); // Plotly writes into what it is given
    Object.assign(copy.layout, arrange[drawn.kind](copy, width));
    copy.layout.margin.autoexpand = false;
    return copy;
  }

  function grids({ layout, panels, labels, axes }, width) {
    const places = gridPlaces(panels, labels, width), { wide, high, inner } = places, annotations = [];
    panels.forEach(({ name, rows, columns }, index) => {
      const axis = index ? index + 1 : "", column = index % places.across, row = Math.floor(index / places.across);
      const left = column * (wide + places.gap), top = row * (high + places.below);
      Object.assign(layout[`xaxis${axis}`], ticks(labels.columns, places.slanted ? 150 : Infinity, wide / columns), {
        domain: [left / inner.wide, (left + wide) / inner.wide], tickangle: places.slanted ? -45 : 0,
      });
      Object.assign(layout[`yaxis${axis}`], ticks(labels.rows, places.room - 8, high / rows), {
        domain: [1 - (top + high) / inner.high, 1 - top / inner.high], showticklabels: !column || !places.same,
        nticks: Math.ceil(high / 36),
      });
      annotations.push(named(shortened(name, wide), axis, above), named(axes.x, axis, beneath(places.foot + 4)));
      if (!column) annotations.push(named(shortened(axes.y, high), axis, beside(places.room + 6)));
    });
    layout.coloraxis.colorbar.y = 1 + 26 / inner.high;
    return { annotations, width, height: places.height, margin: places.margin };
  }

  function gridPlaces(panels, labels, width) {
    const same = panels.every(({ rows }) => rows === panels[0].rows), labelled = labels.rows.length > 0;
    const rows = Math.max(...panels.map((panel) => panel.rows));
    const columns = Math.max(...panels.map((panel) => panel.columns));
    const room = labelled ? Math.min(longest(labels.rows) + 8, width * 0.35) : 30;
    const left = room + 24, gap = same ? 24 : room + 16, there = width - left - 8;
    const least = Math.min(Math.max(110, 36 * columns), 240);
    const fitting = Math.max(1, Math.floor((there + gap) / (least + gap)));
    const down = Math.ceil(panels.length / fitting), across = Math.ceil(panels.length / down);
    const wide = Math.min((there - gap * (across - 1)) / across, Math.max(280, 72 * columns), 720);
    const square = Math.min((rows * wide) / columns, labelled ? Math.max(18 * rows, 300) : 720);
    const high = Math.max(square, labelled ? 15 * rows : Math.min(22 * rows, 180));
    const slanted = labels.columns.length > 0 && longest(labels.columns) + 4 > wide / columns;
    const foot = slanted ? Math.min(longest(labels.columns), 150) * 0.71 + 16 : 20; // the columns' ticks
    const below = foot + 56; // from a panel to the one beneath: ticks, the axis's name, the next panel's
    const inner = { wide: across * wide + gap * (across - 1), high: down * high + (down - 1) * below };
    const margin = { l: left, r: width - left - inner.wide, t: 70, b: foot + 26 };
    const height = inner.high + margin.t + margin.b;
    return { same, room, gap, across, wide, high, foot, slanted, below, inner, margin, height };
  }

  function chart({ data, layout, height, names, labels, axes }, width) {
    const room = labels.length ? Math.min(longest(labels) + 8, width * 0.45) : 44;
    const margin = { l: room + 24, r: 12, t: 10, b: 50 }, wide = width - margin.l - margin.r;
    const keyed = names.filter((_, index) => data[index].showlegend !== false);
    const entry = Math.min(longest(keyed) + 4, wide - 45); // beside it are 45 pixels of line and gaps
    const lines = names.length > 1 ? Math.ceil(keyed.length / Math.max(1, Math.floor(wide / (entry + 45)))) : 0;
    data.forEach((trace, index) => { trace.name = literal(shortened(names[index], entry)); });
    margin.b += lines * 20;
    Object.assign(layout.yaxis, ticks(labels, room - 8, height / labels.length));
    return {
      annotations: [named(axes.x, "", beneath(24)), named(axes.y, "", beside(room + 6))],
      width, margin, height: height + margin.t + margin.b, showlegend: lines > 0,
      legend: {
        orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", entrywidth: entry,
        maxheight: lines * 20 + 20,
      },
    };
  }

  function picture() {
    return { annotations: [], margin: { l: 20, r: 20, t: 10, b: 10 } };
  }

  // --- colours ----------------------------------------------------------------------------------------------------
  const screen = document.documentElement, paper = document.querySelector(".light");

  function template(kind, element) {
    const style = getComputedStyle(element), colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: colour("--grid"), zerolinecolor: colour("--line"), exponentformat: "power",
      ticks: "outside", ticklen: 4, tickcolor: "transparent",
    };
    const font = { color: colour("--ink"), size: 12, family: FONT };
    const cell = { fill: { color: colour("--surface") }, line: { color: colour("--line") } };
    return {
      layout: {
        font, paper_bgcolor: colour("--surface"), xaxis: axis, yaxis: axis,
        plot_bgcolor: colour(kind === "grids" ? "--grid" : "--surface"), // seen where a cell is empty
        hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--faint"), font, align: "left" },
      },
      data: { table: [{ header: cell, cells: cell }] },
    };
  }

  // --- drawing ----------------------------------------------------------------------------------------------------
  const touched = matchMedia("(pointer: coarse)"), dark = matchMedia("(prefers-color-scheme: dark)");
  const read = (figure) => JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const plots = [...document.querySelectorAll(".plot")], near = new Set();
  const drawings = new Map(plots.map((plot) => [plot, read(plot.closest("figure"))]));

  function draw(plot, colours = screen) {
    const { kind, data, layout } = arranged(drawings.get(plot), plot.clientWidth);
    plot.dataset.width = plot.clientWidth;
    plot.style.height = `${layout.height}px`;
    if (!near.has(plot)) return;
    layout.template = template(kind, colours);
    layout.uirevision = true; // what the reader enlarged stays so in another width
    layout.dragmode = touched.matches ? false : "zoom"; // a finger scrolls the page
    Plotly.react(plot, data, layout, { displayModeBar: false });
  }

  const approach = new IntersectionObserver((entries) => {
    entries.filter(({ isIntersecting, target }) => isIntersecting && !near.has(target)).forEach(({ target }) => {
      near.add(target);
      draw(target);
    });
  }, { rootMargin: "800px" });
  const resized = new ResizeObserver((entries) => {
    const targets = entries.map(({ target }) => target);
    targets.filter((plot) => plot.dataset.width !== `${plot.clientWidth}`).forEach((plot) => draw(plot));
  });
  plots.forEach((plot) => {
    draw(plot);
    approach.observe(plot);
    resized.observe(plot);
  });
  dark.addEventListener("change", () => plots.forEach((plot) => draw(plot)));
  addEventListener("beforeprint", () => plots.forEach((plot) => {
    near.add(plot);
    draw(plot, paper);
  }));
  addEventListener("afterprint", () => plots.forEach((plot) => draw(plot)));

  // --- saving -----------------------------------------------------------------------------------------------------
  const makers = { PNG: png, CSV: csv };
  const bytes = (base64) => Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));

  async function png(figure) {
    const { kind, title, data, layout } = arranged(read(figure), PICTURE), { margin } = layout;
    const head = 16 + 20 * title.split("<br>").length;
    layout.annotations.push({
      text: title, font: { size: 15 }, showarrow: false, align: "left", xref: "paper", yref: "paper",
      x: 0, xanchor: "left", xshift: 16 - margin.l, y: 1, yanchor: "top", yshift: margin.t + head - 12,
    });
    const empty = Math.max(0, Math.min(margin.r - 20, layout.width - 640)); // beside few panels
    margin.r -= empty;
    layout.width -= empty;
    margin.t += head;
    layout.height += head;
    layout.template = template(kind, paper);
    const size = { format: "png", width: layout.width, height: layout.height, scale: 2 };
    const url = await Plotly.toImage({ data, layout, config: {} }, size);
    return new Blob([bytes(url.split(",")[1])], { type: "image/png" });
  }

  async function csv(figure) {
    const packed = new Blob([bytes(figure.querySelector('script[type="text/plain"]').textContent)]);
    const unpacked = packed.stream().pipeThrough(new DecompressionStream("gzip"));
    return new Blob([await new Response(unpacked).arrayBuffer()], { type: "text/csv" });
  }

  async function save(button) {
    const figure = button.closest("figure"), { kind } = button.dataset;
    const href = URL.createObjectURL(await makers[kind](figure));
    const download = `${figure.dataset.file}.${kind.toLowerCase()}`;
    Object.assign(document.createElement("a"), { href, download }).click();
    setTimeout(() => URL.revokeObjectURL(href), 60000);
  }

  document.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => {
    save(button).catch((error) => Object.assign(button, { textContent: "failed", title: error.message }));
  }));

  // --- tokens -----------------------------------------------------------------------------------------------------
  document.querySelectorAll(".tokens").forEach((view) => {
    const tokens = [...view.querySelectorAll("span")], note = view.closest("figure").querySelector(".note");
    let at = -1;
    const point = (index) => {
      if (!(index in tokens)) return;
      tokens[at]?.classList.remove("at");
      at = index;
      tokens[at].classList.add("at");
      note.textContent = tokens[at].dataset.note;
      note.classList.add("on");
    };
    view.addEventListener("pointerover", ({ target }) => point(tokens.indexOf(target)));
    view.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      point(at + step);
    });
  });
})();
