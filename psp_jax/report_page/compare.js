/* The page about two runs. A difference is always the second run minus the first. */

const { runs, fields, warnings } = PAYLOAD;
const names = runs.map((run) => run.name);
const classes = PAYLOAD.classes.map((row, index) => ({ ...row, index, difference: difference(...row.iou) }));
const content = document.getElementById("content");

function difference(first, second) {
  return first === null || second === null ? null : second - first;
}

content.append(
  element(
    "header",
    { class: "hero" },
    element("p", { class: "eyebrow" }, "Comparison of two runs"),
    element("h1", {}, names[0], element("span", { class: "muted" }, " and "), names[1]),
    ...runs.map((run) => element("p", { class: "run-line" }, element("b", {}, run.name), ` ${runLine(run)}`)),
    ...warnings.map((warning) => element("p", { class: "warning", role: "note" }, warning)),
    element("div", { class: "scores" }, ...PAYLOAD.scores.map(scoreTile)),
    ...(warnings.length ? runs : runs.slice(0, 1)).map((run) => protocolLine(run.protocol)),
  ),
);

function scoreTile({ name, values }) {
  const change = difference(...values);
  return element(
    "div",
    { class: "score" },
    element("span", { class: "score-name" }, name),
    element("span", { class: `score-value ${direction(change)}` }, points(change), element("small", {}, " points")),
    element("span", { class: "score-pair" }, ...values.flatMap((value, index) => [index ? " \u2192 " : "", percentSign(value)])),
  );
}

function classTable(showClass) {
  const most = Math.max(...classes.map((row) => Math.abs(row.difference ?? 0))) || 1;
  const bar = (row) => [
    element("span", { class: direction(row.difference) }, points(row.difference)),
    element("span", { class: `swing ${direction(row.difference)}`, "--part": Math.abs(row.difference ?? 0) / most, "aria-hidden": "true" }),
  ];
  const columns = [
    nameColumn(showClass),
    { label: "Change", value: (row) => row.difference, cell: bar, number: true },
    ...names.map((name, index) => ({ label: name, value: (row) => row.iou[index], cell: (row) => [percent(row.iou[index])], number: true })),
  ];
  const moved = classes.toSorted((a, b) => Math.abs(b.difference ?? 0) - Math.abs(a.difference ?? 0));
  return sortableTable("IoU of every class in both runs, in percent", columns, moved, null);
}

function fieldTable() {
  const head = ["Field", ...names].map((name) => element("th", { scope: "col" }, name));
  const rows = fields.map(({ field, values }) => element("tr", {}, element("th", { scope: "row" }, field), ...values.map((value) => element("td", {}, valueText(value)))));
  return element("div", { class: "fields", tabindex: "0", role: "region", "aria-label": "Fields that differ" }, element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
}

const change = (item) => difference(...item.mean_iou);
const images = PAYLOAD.gallery.length ? gallery(PAYLOAD.gallery, classes, {
  layers: { first: names[0], second: names[1], truth: "ground truth", image: "image", errors_first: `errors, ${names[0]}`, errors_second: `errors, ${names[1]}` },
  left: "first",
  right: "second",
  errors: ["errors_first", "errors_second"],
  maps: ["truth", "first", "second"],
  orders: [
    ["most lost first", byNumber(change, 1)],
    ["most won first", byNumber(change, -1)],
    ["by name", byId],
  ],
  caption: (item) => [
    `IoU ${percent(item.mean_iou[0])} \u2192 ${percent(item.mean_iou[1])}`,
    element("span", { class: direction(change(item)) }, points(change(item))),
  ],
}) : null;

addSection("classes", "Classes that moved", "IoU in percent and its difference in points, the largest first.", classTable(images?.showClass));
if (images) addSection("images", "Images", "Drag across a picture to go from one prediction to the other.", ...images.nodes);
else addSection("images", "Images", "No image is in the galleries of both runs; evaluate both on the same split with a larger eval.gallery.");
const charts = trainingCharts(runs);
if (charts.length) addSection("training", "Training", "The second run is dashed.", element("div", { class: "charts" }, ...charts));
addSection("configuration", "Configuration", fields.length ? "The fields that differ." : "No field differs.", ...(fields.length ? [fieldTable()] : []));
startThemeButton();
