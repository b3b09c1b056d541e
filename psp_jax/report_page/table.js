/**
 * A table that sorts by any column.
 *
 * @param columns {label, value(row) to sort by, cell(row) -> nodes, number: bool}; the first is the row's header.
 * @param sorted index of the column to start with, the largest first; null keeps the order of the rows.
 */
function sortableTable(caption, columns, rows, sorted) {
  const body = element("tbody");
  const heads = columns.map((column, index) =>
    element(
      "th",
      { scope: "col", class: column.number ? "number" : null },
      element("button", { type: "button", onclick: () => sortBy(index) }, column.label),
    ),
  );
  const lines = rows.map((row) => {
    const cells = columns.map((column, index) =>
      element(
        index ? "td" : "th",
        { scope: index ? null : "row", class: column.number ? "number" : null },
        ...column.cell(row),
      ),
    );
    return { row, node: element("tr", {}, ...cells) };
  });
  body.append(...lines.map((line) => line.node));

  function sortBy(index) {
    const former = heads[index].getAttribute("aria-sort");
    const first = columns[index].number ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    const next = former === first ? other : first;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[index].setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    body.append(...lines.toSorted((a, b) => order(columns[index], a.row, b.row, sign)).map((line) => line.node));
  }

  if (sorted !== null) sortBy(sorted);
  return element(
    "div",
    { class: "table-frame", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", { class: "unseen" }, caption), element("thead", {}, element("tr", {}, ...heads)), body),
  );
}

/** Compare two rows; what has no value comes last in both directions. */
function order(column, a, b, sign) {
  const [left, right] = [column.value(a), column.value(b)];
  if (left === null || right === null) return (left === null) - (right === null);
  return sign * (typeof left === "string" ? left.localeCompare(right) : left - right);
}

/** A column of fractions with a bar of `value / most`. */
function barColumn(label, value, most, kind) {
  const cell = (row) => [
    element("span", {}, percent(value(row))),
    element("span", { class: `meter ${kind}`, "--part": (value(row) ?? 0) / most, "aria-hidden": "true" }),
  ];
  return { label, value, cell, number: true };
}

/** The column of class names; a name shows its images where there is a gallery. */
function nameColumn(showClass) {
  const name = (row) =>
    showClass
      ? element("button", { type: "button", class: "link", title: "Show its images", onclick: () => showClass(row.index) }, row.name)
      : row.name;
  return { label: "Class", value: (row) => row.name, cell: (row) => [element("span", { class: "named" }, swatch(row.color), name(row))], number: false };
}
