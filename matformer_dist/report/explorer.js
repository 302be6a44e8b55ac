// The Mix'n'Match explorer: the best measured submodel within a budget, looked up in the frontiers
// that the page carries. Needs page.js: element, submodelList and markSubmodel.
"use strict";

function explore(panel) {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const slider = document.getElementById("budget");
  const part = (id) => document.getElementById(id);
  const kindNow = () =>
    data.kinds.find(({ kind }) => kind === panel.querySelector("[name=budget-kind]:checked").value);

  // The last entry [cost, loss, number] of a frontier that the budget pays for.
  function within(frontier, budget) {
    return frontier.findLast(([cost]) => cost <= budget);
  }

  function show() {
    const kind = kindNow();
    const budget = kind.low + (kind.high - kind.low) * (slider.value / slider.max);
    panel.dataset.budget = budget;
    part("budget-text").textContent = said(kind, budget);
    slider.setAttribute("aria-valuetext", `${said(kind, budget)}, budget of ${kind.title}`);
    part("budget-low").textContent = said(kind, kind.low);
    part("budget-high").textContent = said(kind, kind.high);
    const best = within(kind.best, budget);
    const heuristic = within(kind.heuristic, budget);
    showChoice(kind, best);
    showRival(kind, best, heuristic);
    markSubmodel(best[2]);
  }

  function showChoice(kind, [, , number]) {
    const submodel = data.submodels[number];
    const [name, cells] = submodelList.items[number];
    part("choice-name").textContent = name;
    part("choice-name").classList.toggle("long", name.length > 40);
    part("choice-tags").textContent = tags(kind, submodel).join(" · ");
    drawLayers(part("choice-layers"), submodel.layers);
    const words = runs(submodel.layers);
    part("choice-runs").textContent = (words.length > 8 ? counts(submodel.layers) : words).join(", ");
    part("choice-figures").replaceChildren();
    if (ACCURACY >= 0) figure("expected accuracy", cells[ACCURACY], `95%: ${cells[ACCURACY + 1]}`);
    figure("expected loss", cells[LOSS], `nats per ${data.unit}; 95%: ${cells[LOSS + 1]}`);
    figure(`agrees with ${data.names.at(-1)}`, cells[LOSS + 2], `KL ${cells[LOSS + 3]} nats`);
    submodelList.cells.slice(0, ACCURACY >= 0 ? ACCURACY : LOSS).forEach((title, i) => {
      if (cells[i] !== "–") figure(title, cells[i], "");
    });
    part("choice-command").textContent = submodel.command;
  }

  function tags(kind, submodel) {
    const words = { uniform: "trained granularity", heuristic: "of the heuristic", mix: "" };
    const ofKind = (mine) => submodel.slices.filter(([of]) => (of === kind.kind) === mine);
    const names = [...ofKind(true), ...ofKind(false)].map(([, name]) => name);
    const slices = names.length ? `slice ${[...new Set(names)].slice(0, 4).join(", ")}` : "";
    return [slices, words[submodel.kind]].filter(Boolean);
  }

  function figure(title, value, remark) {
    const box = element("div", "", part("choice-figures"));
    element("dt", title, box);
    element("dd", value, box);
    if (remark) element("dd", remark, box).className = "remark";
  }

  function showRival(kind, best, heuristic) {
    const drawing = part("rival-layers");
    const same = !heuristic || heuristic[2] === best[2];
    drawing.hidden = same;
    part("rival-text").replaceChildren();
    const say = (text, tag = "span") => element(tag, text, part("rival-text"));
    if (!heuristic) return say("No submodel of the paper's heuristic was measured within this budget.");
    if (same) return say("The paper's heuristic gives the same submodel within this budget.");
    const [name, cells] = submodelList.items[heuristic[2]];
    const slice = data.submodels[best[2]].slices.find(([of, , rival]) => of === kind.kind && rival === name);
    say("Within this budget the paper's heuristic gives ");
    say(name, "b");
    const accuracy = ACCURACY >= 0 ? `, accuracy ${cells[ACCURACY]}` : "";
    say(`${accuracy}, loss ${cells[LOSS]}; the gain is `);
    say((heuristic[1] - best[1]).toFixed(4), "b").id = "gain";
    say(` nats per ${data.unit}${slice && slice[3] !== "–" ? ` (95%: ${slice[3]})` : ""}.`);
    drawLayers(drawing, data.submodels[heuristic[2]].layers);
  }

  function drawLayers(picture, layers) {
    picture.replaceChildren();
    for (const granularity of layers) {
      const bar = element("i", "", picture);
      bar.style.setProperty("--c", `var(--g${granularity})`);
      bar.style.height = `${(100 * data.widths[granularity]) / data.widths.at(-1)}%`;
    }
    picture.setAttribute("aria-label", `FFN width by layer, first to last: ${runs(layers).join(", ")}`);
  }

  const named = (i) => `${data.names[i]} (${data.widths[i].toLocaleString("en")})`;

  // ["3 layers S (128)", "1 layer M (256)"]
  function counts(layers) {
    return data.names
      .map((_, i) => [i, layers.filter((granularity) => granularity === i).length])
      .filter(([, count]) => count)
      .map(([i, count]) => `${count} ${count === 1 ? "layer" : "layers"} ${named(i)}`);
  }

  // ["layers 1 to 3 S (128)", "layer 4 M (256)"]
  function runs(layers) {
    const found = [];
    layers.forEach((granularity, i) => {
      const last = found.at(-1);
      if (last && last[2] === granularity) last[1] = i + 1;
      else found.push([i + 1, i + 1, granularity]);
    });
    return found.map(([first, last, granularity]) => {
      const where = first === last ? `layer ${first}` : `layers ${first} to ${last}`;
      return `${where} ${named(granularity)}`;
    });
  }

  function said({ kind, title }, value) {
    if (kind === "latency") return `${value.toLocaleString("en", { maximumSignificantDigits: 3 })} ms`;
    if (kind === "memory") return compact(value, "B", "G");
    return `${compact(value, "", kind === "flops" ? "G" : "B")} ${title}`;
  }

  // As report/text.py: three digits and a letter.
  function compact(value, unit, billion) {
    const sizes = [[1e12, "T"], [1e9, billion], [1e6, "M"], [1e3, "k"], [1, ""]];
    const [size, letter] = sizes.find(([size]) => value >= size * 0.9995) ?? [1, ""];
    const scaled = value / size;
    const digits = size === 1 ? 0 : 2 - (scaled >= 9.995) - (scaled >= 99.95);
    return `${scaled.toFixed(digits)} ${letter}${unit}`.trim();
  }

  const [ACCURACY, LOSS] = ["accuracy", "loss"].map((name) => submodelList.cells.indexOf(name));
  slider.addEventListener("input", show);
  panel.querySelector(".kinds").addEventListener("change", show);
  slider.disabled = data.kinds.every(({ low, high }) => low === high);
  panel.hidden = false;
  show();
}

if (document.getElementById("explorer")) explore(document.getElementById("explorer"));
