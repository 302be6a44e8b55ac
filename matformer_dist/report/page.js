// Tooltips of the charts and the copy buttons. The page is complete without this.
"use strict";
const tooltip = document.getElementById("tooltip");
const listed = document.getElementById("submodel-list");
const submodelList = listed ? JSON.parse(listed.textContent) : { cells: [], items: [] };
const marks = []; // of every chart of submodels: shows where the one of a number lies
const markSubmodel = (number) => marks.forEach((mark) => mark(number));

function element(tag, text, parent) {
  const made = document.createElement(tag);
  made.textContent = text; // never markup: names and texts come from files
  parent.append(made);
  return made;
}

function fillTooltip(data, [, , title, rows]) {
  tooltip.replaceChildren();
  element("strong", title, tooltip);
  const table = element("table", "", tooltip);
  if (data.head.some(Boolean)) {
    const head = element("tr", "", table);
    for (const word of data.head) element("th", word, head);
  }
  rows.forEach(([name, ...cells], i) => {
    const row = element("tr", "", table);
    const header = element("th", "", row);
    if (data.colors[i]) element("i", "", header).style.setProperty("--c", data.colors[i]);
    header.append(name);
    for (const cell of cells) element("td", cell, row);
  });
}

// Charts of submodels carry places and numbers; the words are in the page's list of submodels.
function read(data) {
  if (!data.points) return data;
  const at = data.points.map(([left, top, number]) => {
    const [name, cells] = submodelList.items[number];
    const rows = submodelList.cells.map((title, i) => [title, cells[i]]);
    return [left, top, name, rows.filter(([, cell]) => cell !== "–")];
  });
  return { head: [], colors: [], at, numbers: data.points.map(([, , number]) => number) };
}

function mark(ring, data, number) {
  const place = data.at[data.numbers.indexOf(number)];
  ring.hidden = !place;
  if (!place) return;
  ring.style.left = `${100 * place[0]}%`;
  ring.style.top = `${100 * place[1]}%`;
}

function placeTooltip(x, y) {
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  tooltip.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  tooltip.style.top = `${Math.max(8, Math.min(y - height - 12, innerHeight - height - 8))}px`;
}

function watch(figure) {
  const source = figure.querySelector("script[type='application/json']");
  if (!source) return;
  const data = read(JSON.parse(source.textContent));
  const plot = figure.querySelector(".plot");
  const cursor = figure.querySelector(".cursor");
  if (!data.at.length) return;
  if (data.numbers) marks.push((number) => mark(figure.querySelector(".chosen"), data, number));
  let shown = data.at.length - 1;

  function show(index) {
    shown = Math.max(0, Math.min(index, data.at.length - 1));
    const [left, top] = data.at[shown];
    const box = plot.getBoundingClientRect();
    cursor.hidden = false;
    cursor.classList.toggle("point", top !== null);
    cursor.style.left = `${100 * left}%`;
    cursor.style.top = top === null ? "0" : `${100 * top}%`;
    fillTooltip(data, data.at[shown]);
    placeTooltip(box.left + left * box.width, box.top + (top ?? 0.35) * box.height);
  }
  function nearest(event) {
    const box = plot.getBoundingClientRect();
    let best = 0, least = Infinity;
    data.at.forEach(([left, top], i) => {
      const across = box.left + left * box.width - event.clientX;
      const down = top === null ? 0 : box.top + top * box.height - event.clientY;
      if (Math.hypot(across, down) < least) [best, least] = [i, Math.hypot(across, down)];
    });
    return best;
  }
  function hide() {
    tooltip.hidden = cursor.hidden = true;
  }
  plot.addEventListener("pointermove", (event) => show(nearest(event)));
  plot.addEventListener("pointerdown", (event) => show(nearest(event)));
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  addEventListener("scroll", hide, { passive: true }); // the tooltip stands still, the plot goes
  addEventListener("resize", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(cursor.hidden ? shown : shown + moves[event.key]);
  });
}
document.querySelectorAll(".chart").forEach(watch);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code); // no clipboard here: one key copies the selection
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
