// Draws the charts of a run's page with Bokeh, from the JSON block `charts` that analysis/report/chart.py writes.
// Nothing here evaluates text: the page's Content-Security-Policy permits no eval.
"use strict";
(() => {
  const page = JSON.parse(document.getElementById("charts").textContent);
  const axis = document.getElementById("axis"), smoothing = document.getElementById("smoothing");
  const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const dashes = [[], [7, 4], [2, 4], [10, 3, 2, 3], [4, 2], [1, 2]];
  const dashed = {bad: [1, 3], rollback: [], alert: [1, 1], skip: [6, 3], restart: [2, 3], recipe: [8, 2, 2, 2], defer: [3, 6]};
  const small = "12px", font = "system-ui, sans-serif";
  const drawn = new Map();
  let steps = null;  // {start, end} that every chart shows, once one of them was zoomed

  // The share of the run after which a value weighs half; 0: no smoothing.
  const halfLife = chart => (smoothing.value == 0 ? 0 : chart.last * 2 ** (Number(smoothing.value) - 11));

  // A mean with weights that halve with each half-life of distance, to both sides: it does not lag.
  function smoothed([steps, values], half) {
    const sums = values.map(() => 0), weights = values.map(() => 0);
    for (const backwards of [false, true]) {
      let sum = 0, weight = 0, before = null;
      for (let count = 0; count < steps.length; count++) {
        const place = backwards ? steps.length - 1 - count : count;
        const kept = before === null ? 0 : 0.5 ** (Math.abs(steps[place] - before) / half);
        before = steps[place];
        // The value itself counts in the first pass alone.
        sums[place] += kept * sum + (backwards ? 0 : values[place]);
        weights[place] += kept * weight + (backwards ? 0 : 1);
        sum = kept * sum + values[place];
        weight = kept * weight + 1;
      }
    }
    return sums.map((sum, place) => sum / weights[place]);
  }

  function scale(chart) {
    const chosen = axis.value;
    if (chart.positive && (chosen === "log" || (chosen === "automatic" && chart.log))) {
      return {type: "log", start: chart.range[0] / 1.06, end: chart.range[1] * 1.06};
    }
    let [low, high] = chosen === "clipped" ? chart.clip : chart.range;
    if (chart.level) { low = Math.min(low, chart.level[0]); high = Math.max(high, chart.level[0]); }
    if (chart.zero) low = 0;
    const margin = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
    return {type: "linear", start: chart.zero ? 0 : low - margin, end: high + margin};
  }

  function figure(chart, width) {
    const {type, start, end} = scale(chart);
    const x_range = new Bokeh.Range1d({start: 0, end: chart.last, bounds: [0, chart.last]});
    const plot = Bokeh.Plotting.figure({
      tools: [], toolbar_location: "above", sizing_mode: "stretch_both", x_range, y_axis_type: type,
      y_range: new Bokeh.Range1d({start, end}), output_backend: "canvas",
      background_fill_color: null, border_fill_color: null, outline_line_color: null, min_border: 4, min_border_right: 26,
    });
    plot.toolbar.logo = null;
    const wheel = new Bokeh.WheelZoomTool({modifiers: {ctrl: true}});
    const box = new Bokeh.BoxZoomTool();
    plot.add_tools(box, new Bokeh.PanTool(), wheel, new Bokeh.ResetTool(), new Bokeh.SaveTool());
    Object.assign(plot.toolbar, {active_drag: box, active_scroll: wheel});
    const items = new Map();  // label -> what the legend's entry hides
    bands(plot, chart);
    marks(plot, items, chart);
    const lines = chart.curves.flatMap(curve => line(plot, items, curve, chart));
    plot.add_tools(new Bokeh.HoverTool({
      renderers: lines, mode: "vline", line_policy: "nearest", point_policy: "snap_to_data", attachment: "horizontal",
      tooltips: [["curve", "$name"], ["step", "@x{0,0}"], ["value", "@y{0.[00000]}"]],
    }));
    if (chart.level) {
      plot.add_glyph(new Bokeh.HSpan({
        y: {field: "y"}, line_color: colour("ink"), line_dash: [2, 3],
      }), new Bokeh.ColumnDataSource({data: {y: [chart.level[0]]}}));
    }
    style(plot, chart);
    const names = new Set(chart.curves.filter(curve => !curve.left).map(curve => curve.name));
    if (chart === page.charts[0] || names.size > 1) key(plot, items, width);
    return plot;
  }

  function bands(plot, chart) {
    if (!chart.bands.length) return;
    const source = new Bokeh.ColumnDataSource({data: {
      x0: chart.bands.map(band => band[0]), x1: chart.bands.map(band => band[1]), words: chart.bands.map(band => band[2]),
      fill: chart.bands.map((_, place) => (place % 2 ? colour("band") : "transparent")),
    }});
    plot.add_glyph(new Bokeh.VStrip({
      x0: {field: "x0"}, x1: {field: "x1"}, fill_color: {field: "fill"}, line_color: null,
    }), source);
  }

  function marks(plot, items, chart) {
    for (const [kind, name] of Object.entries(page.marks)) {
      const found = chart.marks.filter(mark => mark[1] === kind);
      if (!found.length) continue;
      const source = new Bokeh.ColumnDataSource({data: {
        x: found.map(mark => mark[0]), words: found.map(mark => mark[3]), alpha: found.map(mark => (mark[2] ? 0.4 : 0.9)),
      }});
      const shown = plot.add_glyph(new Bokeh.VSpan({
        x: {field: "x"}, line_color: colour(kind), line_alpha: {field: "alpha"}, line_dash: dashed[kind], line_width: 1.4,
      }), source);
      plot.add_tools(new Bokeh.HoverTool({renderers: [shown], tooltips: [["", "@words"]], toggleable: false}));
      if (chart === page.charts[0]) legend(items, name, [shown]);
    }
  }

  function line(plot, items, curve, chart) {
    const span = curve.means ? halfLife(chart) : 0;
    const half = span > chart.last / (curve.means?.[0].length ?? 1) ? span : 0;  // shorter than a step does nothing
    const left = curve.left !== "", tint = colour(`c${curve.colour}`);
    const y = curve.y.map(value => (value === null ? NaN : value));
    const name = left ? `${curve.name}, ${curve.left}` : curve.name;
    const add = (x, values, line_width, line_alpha, line_dash) => plot.add_glyph(
      new Bokeh.Line({x: {field: "x"}, y: {field: "y"}, line_color: tint, line_width, line_alpha, line_dash}),
      new Bokeh.ColumnDataSource({data: {x, y: values}}), {name},
    );
    const dash = left ? [4, 3] : dashes[curve.colour];
    const shown = [half ? add(curve.x, y, 1, 0.3, []) : add(curve.x, y, left ? 1.2 : 1.7, left ? 0.6 : 1, dash)];
    if (half) shown.push(add(curve.means[0], smoothed(curve.means, half), 2, 1, dash));
    if (curve.dots) {
      shown.push(plot.add_glyph(
        new Bokeh.Scatter({x: {field: "x"}, y: {field: "y"}, size: 6, fill_color: tint, line_color: null, fill_alpha: left ? 0.4 : 1}),
        new Bokeh.ColumnDataSource({data: {x: curve.x, y}}), {name},
      ));
    }
    legend(items, left ? "abandoned" : curve.name, shown);
    return shown.slice(-1);
  }

  // Curves of one label share an entry, which hides them all.
  function legend(items, label, renderers) {
    items.set(label, [...(items.get(label) ?? []), ...renderers]);
  }

  function style(plot, chart) {
    const ink = colour("soft");
    const [across] = plot.below, [up] = plot.left;
    for (const one of [across, up]) {
      Object.assign(one, {
        axis_line_color: colour("line"), major_tick_line_color: colour("line"), minor_tick_line_color: null,
        major_label_text_color: ink, major_label_text_font_size: small, major_label_text_font: font,
      });
    }
    across.formatter = new Bokeh.NumeralTickFormatter({format: "0,0"});
    const wide = Math.max(...chart.range.map(Math.abs)) >= 1e4;
    up.formatter = wide ? new Bokeh.NumeralTickFormatter({format: "0.[00]a"}) : new Bokeh.BasicTickFormatter();
    for (const one of plot.center) {
      if (one instanceof Bokeh.Grid) Object.assign(one, {grid_line_color: colour("grid"), visible: one.dimension === 1});
    }
  }

  function key(plot, items, width) {
    const short = label => (label.length > 40 ? `${label.slice(0, 39)}…` : label);
    const entries = [...items].map(([label, renderers]) => new Bokeh.LegendItem({label: {value: short(label)}, renderers}));
    const widest = Math.max(...[...items.keys()].map(label => short(label).length));
    plot.add_layout(new Bokeh.Legend({
      items: entries, click_policy: "hide", orientation: "horizontal", ncols: Math.max(1, Math.floor(width / (45 + 6.5 * widest))), location: "left", padding: 0, margin: 2, spacing: width < 500 ? 4 : 14,
      border_line_color: null, background_fill_color: null, label_text_color: colour("soft"), label_text_font_size: small,
      label_text_font: font, inactive_fill_color: colour("card"), inactive_fill_alpha: 0.7,
    }), "above");
  }

  async function draw(number) {
    const chart = page.charts[number], place = document.getElementById(`chart-${number}`);
    if (!chart || !place) return;
    const plot = figure(chart, place.clientWidth), before = drawn.get(number);
    if (steps) plot.x_range.setv(steps);  // what was zoomed into stays in view
    if (before?.axis === axis.value) plot.y_range.setv({start: before.plot.y_range.start, end: before.plot.y_range.end});
    before?.view.remove();
    place.replaceChildren();
    const view = await Bokeh.Plotting.show(plot, place);
    drawn.set(number, {plot, axis: axis.value, view: Array.isArray(view) ? view[0] : view});
    plot.x_range.change.connect(() => {
      steps = {start: plot.x_range.start, end: plot.x_range.end};
      for (const other of drawn.values()) if (other.plot !== plot) other.plot.x_range.setv(steps);
    });
  }

  let turn = Promise.resolve(), newest = 0;

  // One drawing at a time; of several that were asked for meanwhile, the last.
  function redraw() {
    const share = (100 * halfLife({last: 1})).toPrecision(2);
    document.getElementById("smoothed").textContent = smoothing.value == 0 ? "none" : `half-life ${share} % of the run`;
    const mine = ++newest;
    turn = turn.then(async () => {
      for (const number of page.charts.keys()) {
        if (mine !== newest) return;
        await draw(number);
        await new Promise(done => setTimeout(done));  // the page answers between two charts
      }
    });
  }

  Bokeh.set_log_level("warn");
  axis.addEventListener("change", redraw);
  smoothing.addEventListener("input", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  redraw();
})();
