const CHART = { height: 220, right: 10, top: 10, bottom: 24 };
const DIGIT = 7; // pixels, at most, of a character of a label

/**
 * Curves over the steps of training. Pointer and arrow keys move a line that reads the values.
 *
 * @param series [{name, color: a custom property, steps, values (null is a gap), dashed}]
 * @param format turns a value into text.
 */
function chart(title, series, format) {
  const all = series.flatMap(({ values }) => values.filter((value) => value !== null));
  const last = Math.max(...series.flatMap(({ steps }) => steps));
  const values = ticks(Math.min(0, ...all), Math.max(...all));
  const left = Math.max(44, 10 + DIGIT * Math.max(...values.map((value) => format(value).length)));
  const axes = { last, steps: ticks(0, last).filter((step) => step <= last), values, left };
  const svg = svgElement("svg", { role: "application", tabindex: "0", "aria-label": `${title}. Arrow keys read the values.` });
  const readouts = series.map(() => element("b"));
  const place = element("span", { class: "muted" });
  const legend = series.map(({ name, color, dashed }, index) =>
    element("span", { class: "key" }, element("span", { class: dashed ? "line dashed" : "line", "--line": `var(${color})` }), name, " ", readouts[index]),
  );
  let at = last;
  let scale = null;

  function read(step) {
    at = Math.min(last, Math.max(0, step));
    const nearest = series.map(({ steps }) => nearestIndex(steps, at));
    series.forEach(({ values }, index) => {
      const value = values[nearest[index]];
      readouts[index].textContent = value === null ? "n/a" : format(value);
    });
    at = series[0].steps[nearest[0]];
    place.textContent = `step ${count(at)}`;
    svg.querySelector(".cursor")?.setAttribute("transform", `translate(${scale.x(at)} 0)`);
  }

  drawToWidth(svg, (width) => {
    scale = drawChart(svg, width, axes, series, format);
    read(at);
  });
  svg.addEventListener("pointermove", (event) => scale && read(scale.step(event.offsetX)));
  svg.addEventListener("pointerleave", () => scale && read(last));
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const { steps } = series[0];
    read(steps[Math.min(steps.length - 1, Math.max(0, nearestIndex(steps, at) + move))]);
  });
  return element(
    "figure",
    { class: "chart" },
    element("figcaption", {}, element("span", { class: "chart-title" }, title), place),
    element("div", { class: "keys", "aria-live": "polite" }, ...legend),
    svg,
  );
}

function drawChart(svg, width, axes, series, format) {
  const { height, right, top, bottom } = CHART;
  const { left } = axes;
  const [low, high] = [axes.values[0], axes.values.at(-1)];
  const x = (step) => left + (step / (axes.last || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const text = (attributes, content) => svgElement("text", attributes, content);
  svg.replaceChildren(
    ...axes.values.map((value) => svgElement("path", { class: "grid", d: `M${left} ${y(value)}H${width - right}` })),
    ...axes.values.map((value) => text({ x: left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value))),
    ...axes.steps
      .filter((step, index) => x(step) < width - 16 && (width > 300 || index % 2 === 0))
      .map((step) => text({ x: x(step), y: height - 6, "text-anchor": step ? "middle" : "start" }, shortCount(step))),
    ...series.map((line) => curve(line, x, y)),
    svgElement("path", { class: "cursor", d: `M0 ${top}V${height - bottom}` }),
  );
  return { x, step: (offset) => ((offset - left) / (width - left - right)) * axes.last };
}

/** A line with gaps where values are missing; few points are drawn as dots too. */
function curve({ steps, values, color, dashed }, x, y) {
  let path = "";
  let pen = "M";
  const dots = [];
  values.forEach((value, index) => {
    if (value === null) pen = "M";
    else {
      path += `${pen}${x(steps[index]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
      if (values.length <= 30) dots.push(svgElement("circle", { cx: x(steps[index]), cy: y(value), r: 2.6 }));
    }
  });
  const line = svgElement("path", { class: dashed ? "curve dashed" : "curve", d: path });
  return svgElement("g", { "--line": `var(${color})` }, line, ...dots);
}

/** About five round numbers from at most `low` to at least `high`. */
function ticks(low, high) {
  const range = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(range / 4));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => range / size <= 5);
  const first = Math.floor(low / step);
  const length = Math.max(1, Math.ceil(high / step - 1e-9) - first);
  return Array.from({ length: length + 1 }, (_, index) => (first + index) * step);
}

function nearestIndex(sorted, value) {
  return sorted.reduce((best, item, index) => (Math.abs(item - value) < Math.abs(sorted[best] - value) ? index : best), 0);
}

function shortCount(number) {
  return number >= 10000 ? `${number / 1000}k` : count(number);
}

/** The charts of one or more runs; `runs` is [{name, training, validation}], the second run's lines are dashed. */
function trainingCharts(runs) {
  const lines = (part, keys) =>
    runs.flatMap((run, index) =>
      Object.entries(keys)
        .filter(([key]) => run[part]?.[key]?.some((value) => value !== null))
        .map(([key, [name, color]]) => ({
          name: runs.length > 1 ? `${name}, ${run.name}` : name,
          color: index ? "--line-2" : color,
          steps: run[part].step,
          values: run[part][key],
          dashed: index > 0,
        })),
    );
  const loss = { loss: ["loss", "--line-1"] };
  const parts = {
    main_loss: ["main", "--line-2"],
    aux_loss: ["auxiliary", "--line-3"],
    se_loss: ["classes present", "--line-4"],
    dice_loss: ["Dice", "--line-5"],
    lovasz_loss: ["Lovász", "--line-6"],
  };
  const scores = { mean_iou: ["mean IoU", "--line-1"], pixel_accuracy: ["pixels", "--line-2"], mean_accuracy: ["mean accuracy", "--line-3"] };
  const plain = (value) => (value && Math.abs(value) < 0.001 ? value.toExponential(1) : Number(value.toPrecision(3)).toString());
  const charts = [
    ["Loss", lines("training", runs.length > 1 ? loss : { ...loss, ...parts }), plain],
    ["Validation, %", lines("validation", runs.length > 1 ? { mean_iou: scores.mean_iou } : scores), (value) => plain(100 * value)],
    ["Learning rate", lines("training", { learning_rate: ["rate", "--line-1"] }), plain],
  ];
  return charts.filter(([, series]) => series.length).map(([title, series, format]) => chart(title, series, format));
}
