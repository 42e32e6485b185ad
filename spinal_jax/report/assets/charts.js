"use strict";
// Charts over the data in the page: lines (uPlot: hover, drag to zoom, double click to reset, legend to toggle) and a
// curve in three dimensions (drag to turn). The still picture beneath is what paper and readers without scripts get.
(() => {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const faded = (name, share) => `color-mix(in srgb, ${colour(name)} ${100 * share}%, transparent)`;
  const text = "12px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
  const shown = (value) => value == null ? "–" : String(+value.toPrecision(4)).replace("-", "−");
  const DASHES = [[], [6, 4], [2, 3]];

  function linesOf(holder, data) {
    const sync = uPlot.sync(holder.dataset.chart);
    const width = () => Math.max(220, holder.clientWidth);
    const plots = data.panels.map((panel, at) => {
      const last = at === data.panels.length - 1;
      const columns = [panel.x];
      const series = [{ label: data.x_label.split(" (")[0], value: (_, v) => v == null ? "point to read" : shown(v) }];
      const bands = [];
      const looks = [0]; // of each series, for the legend
      const banded = new Map(); // the interval goes with its line
      const many = panel.lines.length > 12;
      panel.lines.forEach((line, order) => {
        const dense = panel.x.length > 60 || many;
        columns.push(line.values);
        looks[series.length] = line.look;
        series.push({
          label: line.label,
          stroke: () => many ? faded(line.colour, 0.55) : colour(line.colour),
          width: line.look === 3 ? 0 : 1.6,
          dash: DASHES[line.look] ?? [],
          spanGaps: data.joined,
          value: (_, v, at, index) => index == null ? "" : shown(v),
          points: {
            show: !dense,
            // Later lines have wider, open markers: where lines coincide, all of them show.
            size: 5 + 3 * (order % 3),
            stroke: () => colour(line.colour),
            fill: () => order % 3 ? "transparent" : colour(line.colour),
          },
        });
        if (line.low && line.low.some((v) => v != null)) {
          const from = columns.length;
          columns.push(line.high, line.low);
          const hidden = { stroke: "transparent", width: 0, points: { show: false }, class: "u-hidden" };
          series.push({ ...hidden, label: "high" }, { ...hidden, label: "low" });
          bands.push({ series: [from, from + 1], fill: () => faded(line.colour, 0.18) });
          banded.set(from - 1, [from, from + 1]);
        }
      });
      const under = (u) => {
        const { ctx, bbox } = u;
        ctx.save();
        if (panel.shaded) {
          const [a, b] = panel.shaded.map((v) => Math.min(Math.max(u.valToPos(v, "x", true), bbox.left), bbox.left + bbox.width));
          ctx.fillStyle = colour("shade");
          ctx.fillRect(a, bbox.top, b - a, bbox.height);
        }
        if (panel.zero) {
          const y = u.valToPos(0, "y", true);
          if (y >= bbox.top && y <= bbox.top + bbox.height) {
            ctx.strokeStyle = colour("ink");
            ctx.lineWidth = devicePixelRatio;
            ctx.beginPath();
            ctx.moveTo(bbox.left, y);
            ctx.lineTo(bbox.left + bbox.width, y);
            ctx.stroke();
          }
        }
        ctx.restore();
      };
      const axis = { stroke: () => colour("ink"), font: text, labelFont: text, ticks: { stroke: () => colour("line"), width: 1 } };
      const whole = panel.x.every(Number.isInteger);
      const room = whole && panel.x.length < 200 ? 0.5 : 0; // the ends are points, and the shade reaches beyond them
      const spot = document.createElement("div");
      holder.append(spot);
      const plot = new uPlot({
        width: width(),
        height: data.height + (last ? 24 : 0),
        cursor: { sync: { key: sync.key, setSeries: false }, focus: { prox: many ? 24 : -1 }, drag: { x: true, y: false } },
        focus: { alpha: many ? 0.15 : 1 },
        scales: { x: { time: false, range: (_, min, max) => min === panel.x[0] && max === panel.x.at(-1) ? [min - room, max + room] : [min, max] } },
        axes: [
          { ...axis, ...(whole ? { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] } : {}), values: (_, ticks) => ticks.map((tick) => last ? shown(tick) : ""), label: last ? data.x_label : undefined, labelSize: 18, size: last ? 34 : 10, grid: { show: false } },
          { ...axis, values: (_, ticks) => ticks.map(shown), label: panel.label, labelSize: 18, size: 52, grid: { stroke: () => colour("line"), width: 1 } },
        ],
        legend: { live: true, show: !many, markers: { dash: (_, at) => ["solid", "dashed", "dotted"][looks[at]] ?? "solid" } },
        hooks: { drawClear: [under], setScale: [(u, key) => key === "x" && follow(u)] },
        series,
        bands,
      }, columns, spot);
      plot.hooks.setSeries = [(u, i, options) => {
        if (options.show != null) for (const end of banded.get(i) ?? []) u.setSeries(end, { show: options.show });
      }];
      if (many) {
        const out = document.createElement("output");
        out.className = "read-out";
        out.textContent = "Point at a line to read which run it is.";
        spot.append(out);
        plot.hooks.setSeries.push((u, i) => { if (i != null) out.textContent = u.series[i].label; });
      }
      return plot;
    });
    let following = false;
    function follow(from) {
      if (following || !plots.length) return;
      following = true;
      const { min, max } = from.scales.x;
      for (const plot of plots) if (plot !== from && (plot.scales.x.min !== min || plot.scales.x.max !== max)) plot.setScale("x", { min, max });
      following = false;
    }
    new ResizeObserver(() => {
      for (const plot of plots) if (plot.width !== width()) plot.setSize({ width: width(), height: plot.height });
    }).observe(holder);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.redraw(false)));
    holder.keep = (keep) => plots.forEach((plot, at) => data.panels[at].lines.forEach((line) => {
      const i = plot.series.findIndex((one) => one.label === line.label);
      if (plot.series[i].show !== keep(line.label)) plot.setSeries(i, { show: keep(line.label) });
    }));
  }

  function turnedOf(holder, data) {
    const SVG = "http://www.w3.org/2000/svg";
    const make = (name, attributes, parent) => {
      const element = document.createElementNS(SVG, name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      parent.append(element);
      return element;
    };
    const svg = make("svg", { viewBox: "-170 -125 340 250", class: "turn", role: "img", tabindex: 0 }, holder);
    svg.setAttribute("aria-label", `${data.axes.join(", ")}: drag or use the arrow keys to turn`);
    const out = document.createElement("output");
    out.className = "read-out";
    const hint = "Drag to turn, point at a boundary to read its values.";
    out.textContent = hint;
    holder.append(out);
    const all = data.lines.flatMap((line) => line.points);
    if (!all.length) return;
    const low = [0, 1, 2].map((axis) => Math.min(...all.map((point) => point[axis])));
    const span = [0, 1, 2].map((axis) => Math.max(...all.map((point) => point[axis])) - low[axis] || 1);
    const unit = (point) => point.map((value, axis) => 2 * (value - low[axis]) / span[axis] - 1);
    let [turn, tilt] = [-0.6, 0.4];
    const seen = ([x, y, z]) => {
      const [a, b] = [x * Math.cos(turn) - y * Math.sin(turn), x * Math.sin(turn) + y * Math.cos(turn)];
      return [80 * a, -72 * (z * Math.cos(tilt) - b * Math.sin(tilt))];
    };
    function draw() {
      svg.replaceChildren();
      const corners = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => [i & 1, i >> 1 & 1, i >> 2].map((bit) => 2 * bit - 1));
      corners.forEach((from, i) => [1, 2, 4].forEach((bit) => {
        if (i & bit) return;
        const [[x1, y1], [x2, y2]] = [seen(from), seen(corners[i | bit])];
        make("line", { x1, y1, x2, y2, class: "edge" }, svg);
      }));
      // Each axis has an edge of its own, and its labels stand off that edge, away from the middle.
      [[0, 1, -1], [-1, 0, -1], [-1, -1, 0]].forEach((middle, axis) => {
        const away = seen(middle);
        const length = Math.hypot(...away) || 1;
        const label = (along, distance, kind, words) => {
          const [x, y] = seen(middle.map((value, at) => at === axis ? along : value)).map((v, i) => v + distance * away[i] / length);
          const anchor = Math.abs(away[0]) < 0.4 * length ? "middle" : away[0] < 0 ? "end" : "start";
          make("text", { x, y: y + 3, class: kind, "text-anchor": anchor }, svg).textContent = words;
        };
        label(0, 12, "axis", data.axes[axis]);
        label(-0.92, 7, "tick", shown(low[axis]));
        label(0.92, 7, "tick", shown(low[axis] + span[axis]));
      });
      for (const line of data.lines) {
        const spots = line.points.map((point) => seen(unit(point)));
        make("polyline", { points: spots.map((spot) => spot.map((v) => v.toFixed(1)).join(",")).join(" "), class: "path", stroke: `var(--${line.colour})` }, svg);
        spots.forEach(([cx, cy], at) => {
          const inside = line.points[at][0] >= data.first;
          const dot = make("circle", { cx, cy, r: inside ? 3.4 : 2.2, fill: `var(--${line.colour})`, class: inside ? "inside" : "outside" }, svg);
          dot.addEventListener("pointerenter", () => {
            const words = data.axes.map((axis, i) => `${axis} ${shown(line.points[at][i])}`).join(", ");
            out.textContent = data.lines.length > 1 ? `${line.label}: ${words}` : words;
          });
          dot.addEventListener("pointerleave", () => { out.textContent = hint; });
        });
      }
      data.lines.forEach((line, at) => {
        if (data.lines.length < 2) return;
        make("circle", { cx: -160, cy: -114 + 13 * at, r: 3, fill: `var(--${line.colour})` }, svg);
        make("text", { x: -153, y: -111 + 13 * at, class: "tick" }, svg).textContent = line.label;
      });
    }
    const by = (dx, dy) => {
      turn += dx;
      tilt = Math.min(1.5, Math.max(-1.5, tilt + dy));
      draw();
    };
    let held = null;
    svg.addEventListener("pointerdown", (event) => { held = [event.clientX, event.clientY]; svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointermove", (event) => {
      if (!held) return;
      by((event.clientX - held[0]) / 120, (event.clientY - held[1]) / 120);
      held = [event.clientX, event.clientY];
    });
    svg.addEventListener("pointerup", () => { held = null; });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
      if (!step) return;
      event.preventDefault();
      by(...step);
    });
    draw();
  }

  for (const holder of document.querySelectorAll(".live")) {
    const data = JSON.parse(document.getElementById(holder.dataset.chart).textContent);
    const draw = () => {
      holder.parentElement.classList.add("drawn");
      ({ lines: linesOf, rotated: turnedOf })[data.kind](holder, data);
    };
    // A chart in a folded section has no width: it is drawn when it is first seen. One in sight is drawn before the page is first shown,
    // so that nothing below it moves.
    if (holder.clientWidth > 0) {
      draw();
      continue;
    }
    new IntersectionObserver((entries, watch) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watch.disconnect();
      draw();
    }).observe(holder.parentElement);
  }
})();
