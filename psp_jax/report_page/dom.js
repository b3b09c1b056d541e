"use strict";

/* Building blocks of the page. All text goes in as text nodes, never as markup: names and ids come from the data. */

const PAYLOAD = JSON.parse(document.getElementById("payload").textContent);
const SVG_NAMESPACE = document.querySelector("svg").namespaceURI;
const THIN_SPACE = "\u202f";

/** Fill a node: functions become listeners of "on..." attributes, null and false leave an attribute out. */
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svgElement(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG_NAMESPACE, tag), attributes, children);
}

/** A fraction as a percentage without its sign, "n/a" for null. */
function percent(fraction, digits = 1) {
  return fraction === null || fraction === undefined ? "n/a" : (100 * fraction).toFixed(digits);
}

function percentSign(fraction, digits = 1) {
  const text = percent(fraction, digits);
  return text === "n/a" ? text : text + THIN_SPACE + "%";
}

/** A difference of two fractions in points, with its sign. */
function points(difference, digits = 1) {
  if (difference === null) return "n/a";
  const text = (100 * Math.abs(difference)).toFixed(digits);
  if (Number(text) === 0) return text;
  return (difference > 0 ? "+" : "\u2212") + text;
}

function count(number) {
  return number.toLocaleString("en-US");
}

/** "1 image", "2 images". */
function counted(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

function rgb(color) {
  return `rgb(${color.join(" ")})`;
}

function swatch(color) {
  return element("span", { class: "swatch", "--swatch": rgb(color), "aria-hidden": "true" });
}

/** Where a difference points: the class name of its colour. */
function direction(difference) {
  return difference > 0 ? "gain" : difference < 0 ? "loss" : "";
}

/** Add a section to the page and to its navigation. */
function addSection(id, title, lead, ...children) {
  const heading = element("h2", { id: `${id}-title`, tabindex: "-1" }, title);
  const section = element(
    "section",
    { id, "aria-labelledby": heading.id },
    element("div", { class: "section-head" }, heading, lead ? element("p", {}, lead) : null),
    ...children,
  );
  document.getElementById("content").append(section);
  document.querySelector("nav").append(element("a", { href: `#${id}` }, title));
  return section;
}

/** The colour that a custom property has in the present theme. */
function themeColor(name) {
  const probe = element("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

/** Call `draw` with the width of `node` now, whenever that changes, and when the theme changes. */
function drawToWidth(node, draw) {
  let width = 0;
  const redraw = () => width > 0 && draw(width);
  new ResizeObserver(([entry]) => {
    const next = Math.floor(entry.contentRect.width);
    if (next !== width) {
      width = next;
      redraw();
    }
  }).observe(node);
  document.addEventListener("themechange", redraw);
}

/** Let the button switch between light and dark; until it is used, the system decides. */
function startThemeButton() {
  const button = document.querySelector(".theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  matchMedia("print").addEventListener("change", show); // paper is light in both themes
  show();
}
