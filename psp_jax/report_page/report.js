/* The page about one run. */

const run = PAYLOAD;
const classes = run.classes.map((row, index) => ({ ...row, index }));
const content = document.getElementById("content");

content.append(
  element(
    "header",
    { class: "hero" },
    element("p", { class: "eyebrow" }, "Evaluation report"),
    element("h1", {}, run.name),
    element("p", { class: "run-line" }, runLine(run)),
    element("div", { class: "scores" }, ...run.scores.map(scoreTile)),
    element("div", { class: "background" }, protocolLine(run.protocol), run.histogram ? histogram(run.histogram) : null),
  ),
);

function scoreTile({ name, value }) {
  return element(
    "div",
    { class: "score" },
    element("span", { class: "score-name" }, name),
    element("span", { class: "score-value" }, percent(value), value === null ? null : element("small", {}, `${THIN_SPACE}%`)),
  );
}

const images = run.gallery.length ? gallery(run.gallery, classes, {
  layers: { image: "image", prediction: "prediction", truth: "ground truth", errors: "errors" },
  left: "image",
  right: "prediction",
  errors: ["image", "errors"],
  maps: ["truth", "prediction"],
  orders: [
    ["worst first", byNumber((item) => item.mean_iou, 1)],
    ["best first", byNumber((item) => item.mean_iou, -1)],
    ["by name", byId],
  ],
  caption: (item) => [`IoU ${percentSign(item.mean_iou)}`, element("span", { class: "muted" }, `pixels ${percentSign(item.pixel_accuracy)}`)],
}) : null;

function classTable() {
  const most = Math.max(...classes.map(({ share }) => share ?? 0)) || 1;
  const columns = [
    nameColumn(images?.showClass),
    barColumn("IoU %", ({ iou }) => iou, 1, "iou"),
    barColumn("Accuracy %", ({ accuracy }) => accuracy, 1, "accuracy"),
    barColumn("Pixels %", ({ share }) => share ?? null, most, "share"),
  ];
  const known = columns.filter(({ value }) => classes.some((row) => value(row) !== null));
  return sortableTable("Scores of every class", known, classes, known.length > 1 ? 1 : 0);
}

if (images) {
  addSection("images", "Images", "Drag across a picture, or focus it and use the arrow keys.", ...images.nodes);
}
addSection("classes", "Classes", "Share of all labelled pixels, and how well each class is found.", classTable());
if (run.confusion) {
  const matrix = heatMap(run.confusion, classes, images?.showMistake);
  const pairs = element("div", {}, element("h3", {}, "What would be won if these were right"), pairList(run.pairs, classes, images?.showMistake));
  const lead = "Rows are labels, columns predictions, each row normalised. The costliest mistakes stand beside, in points of mean IoU.";
  addSection("mistakes", "Mistakes", lead, element("div", { class: "mistakes" }, matrix, run.pairs.length ? pairs : null));
}
const charts = trainingCharts([run]);
if (charts.length) addSection("training", "Training", null, element("div", { class: "charts" }, ...charts));
if (Object.keys(run.config).length) addSection("configuration", "Configuration", null, configuration(run.config));
startThemeButton();
