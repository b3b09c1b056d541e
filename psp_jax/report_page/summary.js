/** What was scored: network, classes, step, split. */
function runLine(run) {
  const parts = [run.network, `${run.classes.length} classes of ${run.data}`, `step ${count(run.step)}`, `${run.split}, ${counted(run.images, "image")}`];
  return parts.join(" \u00b7 ");
}

/** How it was scored, in words and with every other value of the protocol. */
function protocolLine({ name, description, ...values }) {
  const details = Object.entries(values).map(([key, value]) => `${key.replaceAll("_", " ")} ${valueText(value)}`);
  return element(
    "p",
    { class: "protocol" },
    element("b", {}, `Protocol ${name}`), ": ", description, details.length ? element("span", { class: "muted" }, ` (${details.join("; ")})`) : null,
  );
}

/** A value of a configuration in words. */
function valueText(value) {
  if (value === null || value === undefined) return "none";
  if (Array.isArray(value)) return value.map(valueText).join(", ");
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "object" ? JSON.stringify(value) : value === "" ? "(empty)" : String(value);
}

/** How many images reach which mean IoU, as bars of a twentieth each. */
function histogram(counts) {
  const most = Math.max(...counts);
  const bars = counts.map((images, index) => {
    const range = `${5 * index}\u2013${5 * index + 5} %`;
    return element("span", { "--part": images / most, title: `mean IoU ${range}: ${counted(images, "image")}` });
  });
  const total = counts.reduce((sum, images) => sum + images, 0);
  const median = counts.findIndex((_, index) => counts.slice(0, index + 1).reduce((sum, images) => sum + images, 0) >= total / 2);
  const label = `Images by their own mean IoU; the median lies between ${5 * median} and ${5 * median + 5} %`;
  return element(
    "figure",
    { class: "histogram" },
    element("div", { class: "histogram-bars", role: "img", "aria-label": label }, ...bars),
    element("div", { class: "histogram-axis", "aria-hidden": "true" }, ...["0", "50", "100 %"].map((text) => element("span", {}, text))),
    element("figcaption", {}, label),
  );
}

/** The configuration as a folded list. */
function configuration(config) {
  const rows = Object.entries(config).map(([field, value]) => element("tr", {}, element("th", { scope: "row" }, field), element("td", {}, valueText(value))));
  return element("details", {}, element("summary", {}, "Every field of the configuration"), element("div", { class: "fields" }, element("table", {}, element("tbody", {}, ...rows))));
}
