/** Wires the page together. */

import { connectControls } from "./controls.js";
import { Game } from "./game.js";
import { listenToGamepads, listenToKeys } from "./input.js";
import { $, WIDE, say, toast } from "./show.js";

const game = new Game();
const command = connectControls(game);
listenToKeys(game, command);
listenToGamepads(game, (text) => {
  say(text);
  toast(text);
});
$("connect").addEventListener("click", () => game.connect());
document.addEventListener("visibilitychange", () => document.hidden || game.catchUp());
setInterval(() => game.rate.show(), 500); // it falls to 0 where nothing comes

// What was clicked or moved by a pointer gives the keyboard back to the game; Tab goes on from there nevertheless.
let isPointing = false;
document.addEventListener("pointerdown", () => (isPointing = true), true);
document.addEventListener("keydown", () => (isPointing = false), true);
for (const kind of ["click", "change"]) {
  document.addEventListener(kind, ({ target }) => {
    const keeps = target instanceof Element && target.matches("input[type=number], dialog, dialog *");
    if (isPointing && !keeps) document.activeElement?.blur();
  });
}
document.addEventListener("keydown", ({ target, key }) => {
  const isNumber = target instanceof Element && target.matches("input[type=number]");
  if (isNumber && (key === "Enter" || key === "Escape")) target.blur();
});

$("help-close").addEventListener("click", () => $("help").close());
$("help").addEventListener("click", ({ target }) => target === $("help") && $("help").close()); // beside it

// On a wide page the settings lie open; on a phone they wait behind a line.
const isWide = matchMedia(WIDE);
const unfold = () => ($("settings").open = isWide.matches);
isWide.addEventListener("change", unfold);
unfold();

game.connect();
