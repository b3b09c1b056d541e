const FIRST_CARDS = 6; // more on demand: pictures take memory when they are shown

/**
 * The images with a slider between two layers, and the controls above them.
 *
 * @param items [{id, width, height, layers: {key: data URI}, classes: [[class, share]], mistakes: [[label, prediction, pixels]]}]
 * @param classes [{name, color}]
 * @param options {layers: {key: name}, left, right, errors: [left, right] when the switch is on,
 *   maps: keys of label maps to read under the pointer, orders: [[name, compare(a, b)]], caption(item) -> nodes}
 * @returns {nodes, showClass(class), showMistake(label, prediction)}
 */
function gallery(items, classes, options) {
  const view = { left: options.left, right: options.right, order: 0, chosen: null, mistake: null, text: "", all: false };
  const grid = element("div", { class: "cards", "--opacity": 0.85 });
  const cards = new Map(items.map((item) => [item, card(item, classes, options, showClass)]));
  const summary = element("p", { class: "muted", role: "status" });
  const chip = element("button", { type: "button", class: "chip", onclick: () => update({ mistake: null }) });
  const more = element("button", { type: "button", class: "more", onclick: () => update({ all: true }) });

  function update(changes) {
    Object.assign(view, changes);
    const matching = items.filter((item) => matches(item, view)).sort(comparison(view, options.orders));
    const shown = view.all ? matching : matching.slice(0, FIRST_CARDS);
    shown.forEach((item) => cards.get(item).showLayers(view.left, view.right));
    grid.replaceChildren(...shown.map((item) => cards.get(item).node));
    summary.textContent = tally(shown.length, matching.length, items.length);
    more.hidden = shown.length === matching.length;
    more.textContent = `Show all ${matching.length}`;
    chip.hidden = view.mistake === null;
    if (view.mistake) {
      const [label, prediction] = view.mistake.map((index) => classes[index].name);
      chip.textContent = `most ${label} taken for ${prediction} first \u00d7`;
      chip.setAttribute("aria-label", `Stop sorting by ${label} taken for ${prediction}`);
    }
    controls.show(view);
  }

  const controls = galleryControls(items, classes, options, view, update, grid);

  /** Show the images of a class; with a mistake, those with the most of it first. */
  function showClass(chosen, mistake = null) {
    update({ chosen, mistake, text: "" });
    const heading = grid.closest("section").querySelector("h2");
    heading.scrollIntoView();
    heading.focus({ preventScroll: true });
  }

  update({});
  return {
    nodes: [controls.node, element("div", { class: "row tally" }, summary, chip), grid, more],
    showClass,
    showMistake: (label, prediction) => showClass(label, label === prediction ? null : [label, prediction]),
  };
}

function tally(shown, matching, all) {
  if (matching === 0) return "None of these images matches.";
  const first = shown < matching ? `, the first ${shown} are shown` : "";
  return matching === all ? `${counted(all, "image")}${first}.` : `${matching} of ${all} images match${first}.`;
}

function matches(item, { chosen, text }) {
  return (chosen === null || item.classes.some(([index]) => index === chosen)) && item.id.toLowerCase().includes(text.toLowerCase());
}

function comparison(view, orders) {
  if (!view.mistake) return orders[view.order][1];
  const pixels = (item) => item.mistakes.find((mistake) => mistake[0] === view.mistake[0] && mistake[1] === view.mistake[1])?.[2] ?? 0;
  return (a, b) => pixels(b) - pixels(a);
}

function galleryControls(items, classes, options, view, update, grid) {
  const select = (label, choices, onchoose) => {
    const node = element("select", { onchange: () => onchoose(node.value) }, ...choices.map(([value, name]) => element("option", { value }, name)));
    return { node, field: element("label", { class: "field" }, element("span", {}, label), node) };
  };
  const layers = Object.entries(options.layers);
  const left = select("Left", layers, (value) => update({ left: value }));
  const right = select("Right", layers, (value) => update({ right: value }));
  const order = select("Order", options.orders.map(([name], index) => [index, name]), (value) => update({ order: Number(value), mistake: null }));
  const frequency = classes.map((_, index) => items.filter((item) => item.classes.some(([present]) => present === index)).length);
  const present = classes.map(({ name }, index) => [index, `${name} (${frequency[index]})`]).filter(([index]) => frequency[index]);
  const chosen = select("Class", [["", "all"], ...present], (value) => update({ chosen: value === "" ? null : Number(value), mistake: null }));
  const search = element("input", { type: "search", placeholder: "part of an id", oninput: () => update({ text: search.value }) });
  const opacity = element("input", {
    type: "range", min: 20, max: 100, value: 85, class: "plain",
    oninput: () => grid.style.setProperty("--opacity", opacity.value / 100),
  });
  const switchErrors = element("button", { type: "button", class: "toggle", onclick: () => update(toggleErrors(view, options)) }, "Error map");
  const large = element("button", { type: "button", class: "toggle", "aria-pressed": "false", onclick: () => {
    large.setAttribute("aria-pressed", grid.classList.toggle("large"));
  } }, "Large");
  const node = element(
    "div",
    { class: "controls", role: "group", "aria-label": "Choose what the gallery shows" },
    left.field, right.field, order.field, chosen.field,
    element("label", { class: "field" }, element("span", {}, "Search"), search),
    element("label", { class: "field" }, element("span", {}, "Strength of colours"), opacity),
    element("div", { class: "field buttons" }, switchErrors, large),
  );
  const show = (now) => {
    left.node.value = now.left;
    right.node.value = now.right;
    order.node.value = now.order;
    chosen.node.value = now.chosen ?? "";
    search.value = now.text;
    switchErrors.setAttribute("aria-pressed", showsErrors(now, options));
  };
  return { node, show };
}

function showsErrors({ left, right }, { errors }) {
  return left === errors[0] && right === errors[1];
}

function toggleErrors(view, options) {
  const [left, right] = showsErrors(view, options) ? [options.left, options.right] : options.errors;
  return { left, right };
}

/** One image: {node, showLayers(left, right)}. The slider lies invisible over the picture, so it can be dragged there. */
function card(item, classes, options, showClass) {
  const cut = element("input", { type: "range", min: 0, max: 100, value: 50, oninput: () => stage.style.setProperty("--cut", `${cut.value}%`) });
  const tags = ["left", "right"].map((side) => element("span", { class: `tag ${side}` }));
  const layers = ["left", "right"].map((side) => element("img", { class: side, alt: "", draggable: "false" }));
  const point = element("span", { class: "tag point" });
  const stage = element(
    "div",
    { class: item.width < 512 ? "stage small" : "stage", "--ratio": item.width / item.height, "--cut": "50%" },
    element("img", { src: item.layers.image, alt: `Image ${item.id}`, draggable: "false" }),
    ...layers, element("span", { class: "handle" }), ...tags, point, cut,
  );
  readUnderPointer(cut, point, item, classes, options);
  const legend = item.classes.map(([index, share]) =>
    element(
      "li",
      {},
      element(
        "button",
        { type: "button", class: share ? "" : "absent", title: share ? `${percentSign(share)} of the pixels` : "predicted only", onclick: () => showClass(index) },
        swatch(classes[index].color), classes[index].name,
      ),
    ),
  );
  const node = element(
    "figure",
    { class: "card" },
    stage,
    element("figcaption", {}, element("span", { class: "id" }, item.id), element("span", { class: "card-scores" }, ...options.caption(item))),
    element("ul", { class: "legend", "aria-label": "Classes in this image" }, ...legend),
  );
  const showLayers = (...keys) => {
    keys.forEach((key, side) => {
      layers[side].hidden = key === "image";
      layers[side].classList.toggle("errors", key.startsWith("errors"));
      if (key !== "image" && layers[side].getAttribute("src") !== item.layers[key]) layers[side].src = item.layers[key];
      tags[side].textContent = options.layers[key];
    });
    cut.setAttribute("aria-label", `Wipe from ${options.layers[keys[0]]} to ${options.layers[keys[1]]}, ${item.id}`);
  };
  return { node, showLayers };
}

const pointed = { item: null, maps: null }; // the label maps of one image at a time, as pixels

/** Write the classes at the pointer. */
function readUnderPointer(target, output, item, classes, { maps }) {
  target.addEventListener("pointermove", (event) => {
    if (pointed.item !== item) {
      Object.assign(pointed, { item, maps: null });
      Promise.all(maps.map((key) => pixelsOf(item.layers[key], item))).then((pixels) => {
        if (pointed.item === item) pointed.maps = pixels;
      });
    }
    if (!pointed.maps) return;
    const column = Math.min(item.width - 1, Math.max(0, Math.floor((event.offsetX / target.clientWidth) * item.width)));
    const row = Math.min(item.height - 1, Math.max(0, Math.floor((event.offsetY / target.clientHeight) * item.height)));
    const names = pointed.maps.map((pixels) => className(classes, pixels.subarray(4 * (row * item.width + column))));
    output.textContent = names.map((name, index) => `${maps[index].replace("_", " ")}: ${name}`).join(" \u00b7 ");
  });
  target.addEventListener("pointerleave", () => (output.textContent = ""));
}

async function pixelsOf(uri, { width, height }) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height).data;
}

/** The class of a colour; two classes of one colour are both named. */
function className(classes, pixel) {
  const names = classes.filter(({ color }) => color.every((value, channel) => value === pixel[channel])).map(({ name }) => name);
  return names.join(" or ") || "void";
}

/** Order by a number, what has none last. */
function byNumber(value, sign) {
  return (a, b) => (value(a) === null || value(b) === null ? (value(a) === null) - (value(b) === null) : sign * (value(a) - value(b)));
}

function byId(a, b) {
  return a.id.localeCompare(b.id, undefined, { numeric: true });
}
