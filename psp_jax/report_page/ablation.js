/* The page about an ablation: every table with a dot for each seed, and the IoU of the classes. */

const { tables, variants, classes, columns } = PAYLOAD;
const content = document.getElementById("content");
const runs = Object.values(variants).reduce((sum, { seeds }) => sum + seeds.length, 0);

function listed(key) {
  return PAYLOAD[key].join(" and ");
}

content.append(
  element(
    "header",
    { class: "hero" },
    element("p", { class: "eyebrow" }, "Ablation"),
    element("h1", {}, element("span", { class: "muted" }, "Variants on "), PAYLOAD.data),
    element("p", { class: "run-line" }, `${PAYLOAD.file}: ${count(runs)} runs of ${listed("steps")} steps with ${listed("batch_size")} images \u00b7 ${PAYLOAD.machines.join("; ")} \u00b7 jax ${listed("jax")}`),
    element("p", { class: "protocol" }, "Percent, mean \u00b1 standard deviation over seeds. Under each figure stands a dot for every seed and a bar at their mean."),
  ),
);

function scoreText({ mean, deviation }) {
  return percent(mean) + (deviation === null ? "" : ` \u00b1 ${percent(deviation)}`);
}

/** Dots of all seeds on an axis from `low` to `high`. */
function strip({ each, mean }, [low, high]) {
  const place = (value) => (value - low) / (high - low);
  const dots = each.filter((value) => value !== null).map((value) => element("span", { class: "dot", "--part": place(value) }));
  const bar = mean === null ? [] : [element("span", { class: "mean", "--part": place(mean) })];
  return element("span", { class: "strip", "aria-hidden": "true" }, ...dots, ...bar);
}

/** The tens of percent that enclose all scores. */
function axisOf(scores) {
  const values = scores.flatMap(({ each }) => each).filter((value) => value !== null);
  const low = Math.floor(10 * Math.min(...values)) / 10;
  return [low, Math.max(low + 0.1, Math.ceil(10 * Math.max(...values)) / 10)];
}

function scoreColumn(label, score, axis) {
  return { label, value: (row) => score(row).mean, cell: (row) => [scoreText(score(row)), strip(score(row), axis)], number: true };
}

function scoreTable({ title, rows }, first) {
  const scores = ({ variant }) => variants[variant].scores;
  const axis = axisOf(rows.flatMap((row) => Object.values(scores(row))));
  const base = scores(rows[0]).mean_iou.mean;
  const difference = (row) => scores(row).mean_iou.mean - base;
  const [main, ...others] = Object.entries(columns).map(([name, label]) => scoreColumn(label, (row) => scores(row)[name], axis));
  const published = { label: "published", value: (row) => row.published, cell: (row) => [row.published === null ? "n/a" : row.published.toFixed(2)], number: true };
  const shown = [
    { label: "Variant", value: (row) => row.label, cell: (row) => [row.label] },
    main,
    { label: "difference", value: difference, cell: (row) => [element("span", { class: direction(difference(row)) }, points(difference(row)))], number: true },
    ...(rows.some((row) => row.published !== null) ? [published] : []),
    ...others,
    ...(first ? [{ label: "parameters", value: (row) => variants[row.variant].parameters, cell: (row) => [count(variants[row.variant].parameters)], number: true }] : []),
  ];
  const lead = `The dots lie between ${percentSign(axis[0], 0)} and ${percentSign(axis[1], 0)}.`;
  return [lead, sortableTable(title, shown, rows, null)];
}

tables.forEach((table, index) => {
  const [lead, node] = scoreTable(table, index === 0);
  const note = table.rows.some((row) => row.published !== null) ? ` Published: ${PAYLOAD.published_for}.` : "";
  addSection(`table-${index}`, table.title, lead + note, node);
});

const grouped = classes.some((row) => row.group);
const perClass = tables[0].rows.map(({ variant, label }) => scoreColumn(label, (row) => variants[variant].classes[row.name], [0, 1]));
const classColumns = [
  { label: "Class", value: (row) => row.name, cell: (row) => [element("span", { class: "named" }, swatch(row.color), row.name)] },
  ...(grouped ? [{ label: "Group", value: (row) => row.group, cell: (row) => [row.group] }] : []),
  ...perClass,
];
addSection("classes", "Classes", "IoU of every class in percent; the dots lie between 0 and 100 %.", sortableTable("IoU of every class", classColumns, classes, null));
startThemeButton();
