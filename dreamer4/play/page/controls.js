/** The commands of the page: what its buttons, fields and keys ask for. */

import { throttle } from "./game.js";
import { readPicture } from "./picture.js";
import { $, toast } from "./show.js";

const SEEDS = 2 ** 32;
const NEW_SEEDS = 1e6; // short enough to tell somebody
const KEYS = {
  " ": "pause",
  p: "pause",
  ".": "step",
  enter: "step",
  backspace: "undo",
  z: "undo",
  x: "again",
  n: "another",
  b: "branch",
  "[": "keep-0",
  "]": "keep-1",
  t: "truth",
  r: "record",
  "?": "help-open",
};
const REPEATING = ["step", "undo"];

/**
 * Connects the controls, and returns what a key does: whether there is something that it asks for.
 *
 * @param {import("./game.js").Game} game
 * @returns {(event: KeyboardEvent) => boolean}
 */
export function connectControls(game) {
  const reset = (from, { seed = game.status.seed, clip = from === "nothing" ? 0 : game.status.clip } = {}) =>
    game.send({ type: "reset", start: from, seed, clip });
  /** By the id of the button. @type {Record<string, () => void>} */
  const commands = {
    pause: () => game.togglePause(),
    step: () => game.send({ type: "step" }),
    undo: () => game.undo(),
    again: () => reset("same"),
    branch: () => game.branch(),
    "keep-0": () => game.keep(0),
    "keep-1": () => game.keep(1),
    truth: () => game.toggleTruth(),
    record: () => game.send({ type: "record", on: !game.status.recording }),
    data: () => readField("clip", game.hello.starts, game.status.clip, (clip) => reset("data", { clip })),
    another() {
      if (game.hello.starts < 2) return;
      const clip = Math.floor(Math.random() * (game.hello.starts - 1));
      reset("data", { clip: clip < game.status.clip ? clip : clip + 1 });
    },
    picture: () => $("file").click(),
    nothing: () => reset("nothing"),
    "new-seed": () => reset("same", { seed: Math.floor(Math.random() * NEW_SEEDS) }),
    "help-open"() {
      game.releaseAll();
      $("help").showModal();
    },
  };
  const run = (name) => (name === "help-open" || game.isPlaying) && commands[name]();

  for (const name of Object.keys(commands)) $(name).addEventListener("click", () => run(name));
  onChange("clip", () => run("data"));
  onChange("seed", () => readField("seed", SEEDS, game.status.seed, (seed) => reset("same", { seed })));
  for (const type of ["k", "context"]) onChange(type, () => game.send({ type, value: Number($(type).value) }));
  for (const mode of ["always", "held"]) onChange(`clock-${mode}`, () => game.send({ type: "clock", mode }));
  $("speed").addEventListener("input", throttle(() => game.send({ type: "speed", rate: $("speed").valueAsNumber })));
  takePictures(game);

  function onChange(/** @type {string} */ id, /** @type {() => void} */ call) {
    $(id).addEventListener("change", () => game.isPlaying && call());
  }

  return (event) => {
    const name = KEYS[event.key.toLowerCase()];
    // A key that is kept down goes on, no faster than the world follows.
    if (name && (!event.repeat || (REPEATING.includes(name) && game.isAnswered))) run(name);
    return Boolean(name);
  };
}

/** Goes on with the whole number in a field; where there is none, says so and puts back what was there. */
function readField(/** @type {string} */ id, count, before, /** @type {(value: number) => void} */ then) {
  const value = $(id).valueAsNumber;
  if (Number.isInteger(value) && value >= 0 && value < count) return then(value);
  toast(`${id}: ${$(id).value || "no number"} found, a whole number from 0 to ${count - 1} expected.`);
  $(id).value = before;
}

/** A picture may be chosen, or dropped anywhere. */
function takePictures(/** @type {import("./game.js").Game} */ game) {
  async function take(/** @type {File} */ file) {
    if (!game.isPlaying) return;
    try {
      game.sendPicture(await readPicture(file, game.hello.frame));
    } catch (error) {
      toast(error.message);
    }
  }

  $("file").addEventListener("change", () => {
    take($("file").files[0]);
    $("file").value = ""; // so that the same one can be chosen again
  });
  window.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").hidden = false;
  });
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").hidden = true; // it has left the page
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").hidden = true;
    const [file] = event.dataTransfer.files;
    if (file) take(file);
    else toast("That is no picture: drop a picture file.");
  });
}
