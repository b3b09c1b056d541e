/** The mistakes that cost most; with `choose(label, prediction)` each shows its images. */
function pairList(pairs, classes, choose) {
  const most = Math.max(...pairs.map((pair) => pair.cost));
  const items = pairs.map((pair) => {
    const [label, prediction] = [classes[pair.label], classes[pair.prediction]];
    const text = [
      element("span", { class: "pair-names" }, swatch(label.color), label.name, element("span", { class: "muted" }, " taken for "), swatch(prediction.color), prediction.name),
      element("span", { class: "pair-cost" }, points(pair.cost, 2)),
      element("span", { class: "meter cost", "--part": pair.cost / most, "aria-hidden": "true" }),
    ];
    const title = `${count(pair.pixels)} pixels`;
    return element(
      "li",
      {},
      choose
        ? element("button", { type: "button", class: "pair", title, onclick: () => choose(pair.label, pair.prediction) }, ...text)
        : element("div", { class: "pair", title }, ...text),
    );
  });
  return element("ol", { class: "pairs" }, ...items);
}

const LABELLED_CLASSES = 40; // with more, the names along the axes are too small to read
const STRIP = 6; // pixels: colours of the classes along both axes

/**
 * The confusion matrix as a picture: rows are labels, each normalised, so that the diagonal is the accuracy.
 * Pointer and arrow keys tell a cell; a click or Enter chooses it.
 */
function heatMap(confusion, classes, choose) {
  const canvas = element("canvas", {
    tabindex: "0",
    role: "application",
    "aria-label": "Confusion matrix, rows are labels, columns predictions. Arrow keys read the cells.",
  });
  const readout = element("output", { class: "readout" }, "Point at a cell, or focus the matrix and use the arrow keys.");
  const totals = confusion.map((row) => row.reduce((sum, pixels) => sum + pixels, 0));
  const view = { width: 0, margin: 0, cell: 0, at: null };

  function tell(row, column) {
    view.at = [row, column];
    const share = totals[row] ? confusion[row][column] / totals[row] : 0;
    readout.replaceChildren(
      swatch(classes[row].color), element("b", {}, classes[row].name),
      row === column ? " found: " : " taken for ",
      ...(row === column ? [] : [swatch(classes[column].color), element("b", {}, classes[column].name), ": "]),
      totals[row] ? `${percentSign(share, 2)} of its pixels (${count(confusion[row][column])})` : "no pixel has this label",
    );
    drawHeatMap(canvas, view, confusion, totals, classes);
  }

  function cellAt(event) {
    const place = [event.offsetY, event.offsetX].map((offset) => Math.floor((offset - view.margin) / view.cell));
    return place.every((index) => index >= 0 && index < classes.length) ? place : null;
  }

  canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    if (cell && String(cell) !== String(view.at)) tell(...cell);
  });
  canvas.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell) tell(...cell);
    if (cell && choose) choose(...cell);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      event.preventDefault();
      const next = view.at ? view.at.map((index, axis) => index + step[axis]) : [0, 0];
      tell(...next.map((index) => Math.min(classes.length - 1, Math.max(0, index))));
    } else if (event.key === "Enter" && view.at && choose) choose(...view.at);
  });

  const frame = element("div", { class: "heat" }, canvas);
  drawToWidth(frame, (width) => {
    const room = Math.min(width, 640);
    view.margin = Math.min(longestName(canvas, classes), 0.32 * room) + STRIP + 9;
    view.cell = (room - view.margin) / classes.length;
    view.width = room;
    drawHeatMap(canvas, view, confusion, totals, classes);
  });
  return element("div", { class: "heat-block" }, frame, readout);
}

function axisFont(size) {
  return `${size}px system-ui, sans-serif`;
}

/** Pixels that the names along the axes need. */
function longestName(canvas, classes) {
  if (classes.length > LABELLED_CLASSES) return 0;
  const context = canvas.getContext("2d");
  context.font = axisFont(12);
  return Math.max(...classes.map(({ name }) => context.measureText(name).width));
}

function drawHeatMap(canvas, view, confusion, totals, classes) {
  const ratio = devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(view.width * ratio);
  canvas.style.width = canvas.style.height = `${view.width}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const [hit, miss, faint, ink] = ["--hit", "--miss", "--surface-2", "--ink"].map(themeColor);
  const { margin, cell } = view;
  const gap = cell > 8 ? 1 : 0;
  context.fillStyle = faint;
  context.fillRect(margin, margin, cell * classes.length, cell * classes.length);
  confusion.forEach((row, r) =>
    row.forEach((pixels, c) => {
      if (!pixels) return;
      context.globalAlpha = Math.sqrt(pixels / totals[r]); // the root, so that small shares are seen
      context.fillStyle = r === c ? hit : miss;
      context.fillRect(margin + c * cell, margin + r * cell, cell - gap, cell - gap);
    }),
  );
  context.globalAlpha = 1;
  drawAxes(context, view, classes, ink);
  if (view.at) {
    const [row, column] = view.at;
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.strokeRect(margin + column * cell - 1, margin + row * cell - 1, cell + 2 - gap, cell + 2 - gap);
  }
}

function drawAxes(context, { margin, cell }, classes, ink) {
  const named = classes.length <= LABELLED_CLASSES;
  context.font = axisFont(Math.min(12, Math.max(7, cell - 2)));
  context.textAlign = "right";
  context.textBaseline = "middle";
  classes.forEach(({ name, color }, index) => {
    const start = margin + index * cell;
    context.fillStyle = rgb(color);
    context.fillRect(margin - STRIP - 2, start, STRIP, cell);
    context.fillRect(start, margin - STRIP - 2, cell, STRIP);
    if (!named) return;
    context.fillStyle = ink;
    const text = shorten(context, name, margin - STRIP - 8);
    context.fillText(text, margin - STRIP - 6, start + cell / 2);
    context.save();
    context.translate(start + cell / 2, margin - STRIP - 6);
    context.rotate(Math.PI / 2);
    context.fillText(text, 0, 0);
    context.restore();
  });
}

function shorten(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length - 1;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > width) end -= 1;
  return `${text.slice(0, end)}…`;
}
