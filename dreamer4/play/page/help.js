/** What the help says of this world. */

import { chordsOf, labelOf } from "./actions.js";
import { element, nameOfKey, titleOf } from "./pad.js";

const KINDS = {
  dynamics: "Dreamer 4: denoises the next frame's latents",
  maskgit: "TinyWorlds: fills in the next frame's codes",
  next_frame: "TinyDreams: predicts the next frame from the last one",
};

/** Fills the lists of the dialog from the server's hello. */
export function describe(/** @type {any} */ hello, /** @type {import("./input.js").KeyMap} */ map) {
  const [height, width, channels] = hello.frame;
  const count = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
  fill("about", [
    ["world", hello.title],
    ["kind", KINDS[hello.kind] ?? hello.kind],
    ["trained on", hello.trained_on],
    ["training", `${count.format(hello.training_step)} steps`],
    ["parameters", count.format(hello.parameters)],
    ["frames", `${width} x ${height}, ${channels === 1 ? "grey" : "colour"}`],
    ["actions", hello.actions.map((component) => describeAction(component, hello.actions.length > 1)).join("; ")],
  ]);
  const row = (codes, { component, target, value }) => {
    const sign = component.kind === "continuous" ? (value < 0 ? " −" : " +") : "";
    const what = component.kind === "categorical" && !component.labels ? "choice " : "";
    return [codes.map(nameOfKey).join(" + "), what + labelOf(component, target) + sign];
  };
  const alone = map.codes.map((code) => [[code], map.find(code)]).filter(([, { target }]) => target !== null);
  const together = hello.actions.flatMap((component) =>
    chordsOf(component).map(({ codes, target }) => [codes, { component, target }]),
  );
  fill("world-keys", [...alone, ...together].map(([codes, binding]) => row(codes, binding)), "kbd");
  document.getElementById("stand-ins").hidden = !map.hasStandIns;
  document.getElementById("shift").hidden = map.hasStandIns;
  document.getElementById("chosen").hidden = !map.hasChoice;
}

function describeAction(/** @type {any} */ component, /** @type {boolean} */ isOneOfSeveral) {
  const units = { categorical: "choices", continuous: "axes", binary: "switches" }[component.kind];
  return `${titleOf(component, isOneOfSeveral)} (${component.size} ${units})`;
}

function fill(/** @type {string} */ id, /** @type {string[][]} */ rows, term = "") {
  const list = document.getElementById(id);
  list.replaceChildren();
  for (const [name, text] of rows) {
    const dt = element("dt", "", term ? "" : name);
    if (term) dt.append(element(term, "", name));
    list.append(dt, element("dd", "", text));
  }
}
