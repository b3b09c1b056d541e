/* The page about a data set that was checked. */

const { findings, splits, unknown_values: unknown, examples } = PAYLOAD;
const content = document.getElementById("content");
const images = splits.reduce((sum, split) => sum + split.images, 0);
const errors = findings.filter(({ level }) => level === "error");
const warnings = findings.filter(({ level }) => level === "warning");

function tile(name, value, tone = "") {
  return element("div", { class: "score" }, element("span", { class: "score-name" }, name), element("span", { class: `score-value ${tone}` }, count(value)));
}

function total(some) {
  return some.reduce((sum, finding) => sum + finding.total, 0);
}

content.append(
  element(
    "header",
    { class: "hero" },
    element("p", { class: "eyebrow" }, "Check of a data set"),
    element("h1", {}, PAYLOAD.data === "image_folder" ? (PAYLOAD.where.split("/").filter(Boolean).at(-1) ?? PAYLOAD.where) : PAYLOAD.data),
    element("p", { class: "run-line" }, `${PAYLOAD.data} in ${PAYLOAD.where} \u00b7 ${PAYLOAD.classes.length} classes`),
    element(
      "div",
      { class: "scores" },
      tile("Images", images),
      ...splits.map((split) => tile(split.name, split.images)),
      tile("Errors", total(errors), errors.length ? "loss" : "gain"),
      tile("Warnings", total(warnings)),
    ),
  ),
);

const UNFOLDED = 5; // files of a finding

/** One finding: what it means, and its files, those after the first few folded. */
function findingCard({ level, title, text, total, items }) {
  const list = (some) => (some.length ? element("ul", { class: "found" }, ...some.map((item) => element("li", {}, item))) : null);
  const rest = items.slice(UNFOLDED);
  const unlisted = items.length && total > items.length ? ` (of ${count(total - UNFOLDED)})` : "";
  return element(
    "article",
    { class: `finding is-${level}` },
    element("h3", {}, element("span", { class: "level" }, level), ` ${title} `, element("span", { class: "muted" }, count(total))),
    text ? element("p", {}, text) : null,
    list(items.slice(0, UNFOLDED)),
    rest.length ? element("details", {}, element("summary", {}, `${count(rest.length)} more${unlisted}`), list(rest)) : null,
  );
}

function plainTable(caption, head, rows) {
  const cells = rows.map(([first, ...rest]) => element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((value) => element("td", {}, value))));
  const heads = head.map((name) => element("th", { scope: "col" }, name));
  return element("div", { class: "fields plain", tabindex: "0", role: "region", "aria-label": caption }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...cells)));
}

function unknownTable() {
  const rows = unknown.map(({ value, pixels, images, files }) => [String(value), count(pixels), count(images), files.slice(0, 3).join(", ") + (images > 3 ? ", \u2026" : "")]);
  return plainTable("Values that the class table does not know", ["Value", "Pixels", "Labels", "Files"], rows);
}

/** The numbers of the splits, one column each. */
function splitTable() {
  const range = (pair) => (pair === null ? "n/a" : pair[0] === pair[1] ? String(pair[0]) : `${pair[0]}\u2013${pair[1]}`);
  const color = (values) => values.map((value) => value.toFixed(1)).join(" \u00b7 ");
  const facts = {
    "Images read": (split) => `${count(split.images)} of ${count(split.pairs)}`,
    "Labels read": (split) => `${count(split.labels)} of ${count(split.pairs)}`,
    Width: (split) => range(split.widths),
    Height: (split) => range(split.heights),
    "Most frequent sizes": (split) => split.sizes.map(([width, height, number]) => `${width}\u00d7${height} (${count(number)})`).join(", "),
    "Mean of red, green, blue": (split) => color(split.mean),
    "Standard deviation": (split) => color(split.deviation),
    "Void pixels": (split) => percentSign(split.void_share),
    "Pixels of unknown values": (split) => percentSign(split.unknown_share),
  };
  const rows = Object.entries(facts).map(([name, text]) => [name, ...splits.map(text)]);
  return plainTable("Splits", ["", ...splits.map(({ name }) => name)], rows);
}

function classTable() {
  const labels = splits.reduce((sum, split) => sum + split.labels, 0) || 1;
  const most = (value) => Math.max(...PAYLOAD.classes.map((row) => value(row) ?? 0)) || 1;
  const bar = (label, value) => barColumn(label, value, most(value), "share");
  const columns = [
    nameColumn(null),
    { label: "Value", value: (row) => row.value, cell: (row) => [String(row.value)], number: true },
    bar("Pixels %", (row) => row.share),
    bar("Images %", (row) => row.images / labels),
    ...(splits.length > 1 ? splits.slice(0, 4).map(({ name }, index) => bar(`Pixels % ${name}`, (row) => row.splits[index][1])) : []),
  ];
  return sortableTable("Frequency of every class", columns, PAYLOAD.classes, 2);
}

if (findings.length) addSection("findings", "Findings", "Errors end a training run or its preparation; warnings are worth a look.", ...findings.map(findingCard));
else addSection("findings", "Findings", null, element("p", {}, "Nothing is wrong, and nothing looks suspicious."));
if (unknown.length) addSection("unknown", "Unknown values", "Values in the labels that are neither a class nor void.", unknownTable());
if (examples.length) {
  const figures = examples.map(({ split, name, picture }) =>
    element(
      "figure",
      { class: "example" },
      element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `Labels over image ${name}` }, element("img", { src: picture, alt: "" })),
      element("figcaption", {}, element("span", { class: "muted" }, `${split} `), element("span", { class: "id" }, name)),
    ),
  );
  addSection("examples", "Examples", "Labels over their images, void dark: do the names fit what is seen?", element("div", { class: "examples" }, ...figures));
}
addSection("classes", "Classes", "Share of the labelled pixels, and of the labels that hold the class.", classTable());
addSection("splits", "Splits", "Sizes and colours in pixels and RGB values 0\u2013255.", splitTable());
startThemeButton();
