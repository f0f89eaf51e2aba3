/** The keyboard and the gamepads, as presses in the panes. */

import { ARROWS, keysOf } from "./actions.js";

/**
 * @typedef {import("./actions.js").Component} Component
 * @typedef {import("./actions.js").Binding} Binding
 * @typedef {import("./game.js").Game} Game
 */

const STAND_INS = { KeyW: "ArrowUp", KeyS: "ArrowDown", KeyA: "ArrowLeft", KeyD: "ArrowRight" };
const DEAD_ZONE = 0.2; // of a stick, which never rests at 0 quite
const TILTED = 0.5; // a stick that stands for keys

/** What the keys of a world do: by code, for each component that listens to it. */
export class KeyMap {
  /** @type {Map<string, Binding[]>} */ #keys = new Map();
  /** The component that hears a key which several listen to. @type {Component | null} */ chosen = null;

  constructor(/** @type {Component[]} */ components) {
    for (const component of components) {
      for (const [code, binding] of keysOf(component)) {
        this.#keys.set(code, [...(this.#keys.get(code) ?? []), binding]);
      }
    }
    this.hasChoice = [...this.#keys.values()].some((bindings) => bindings.length > 1);
    if (this.hasChoice) this.chosen = components[0];
    // WASD stand in for the arrows where the world has no use of its own for them.
    const codes = [...this.#keys.keys()];
    this.hasStandIns = codes.some((code) => ARROWS.includes(code)) && !codes.some((code) => code in STAND_INS);
  }

  get codes() {
    return [...this.#keys.keys()];
  }

  /** @returns {Binding | undefined} */
  find(/** @type {string} */ code) {
    const bindings = this.#keys.get(code) ?? [];
    return bindings.find((b) => b.component === this.chosen) ?? bindings[0];
  }

  /** What a key does, and in which of `panes`: the second is played by WASD, or with Shift. */
  locate(/** @type {KeyboardEvent} */ event, /** @type {number} */ panes) {
    const standIn = this.hasStandIns && STAND_INS[event.code];
    const binding = this.find(standIn || event.code);
    return binding && { binding, pane: panes > 1 && (standIn || event.shiftKey) ? 1 : 0 };
  }
}

/** Whether keys belong to a field, and not to the game. */
function isTyping(/** @type {EventTarget | null} */ target) {
  return target instanceof Element && target.closest("input, select, textarea, dialog[open]") !== null;
}

/**
 * Listens to the keyboard for as long as the page lives. `command` does what a key of the page's own asks for, and says
 * whether there is such a thing.
 */
export function listenToKeys(/** @type {Game} */ game, /** @type {(event: KeyboardEvent) => boolean} */ command) {
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
    // A button that has the focus is pushed by these two, as anywhere.
    const pushes = event.key === " " || event.key === "Enter";
    if (pushes && event.target instanceof Element && event.target.closest("button, summary")) return;
    const located = game.map?.locate(event, game.panes);
    if (located && !event.repeat) game.press(located.pane, event.code, located.binding);
    if (located || command(event)) event.preventDefault();
  });
  window.addEventListener("keyup", (event) => game.release(event.code));
  // A key that goes up while nobody looks is never heard of.
  window.addEventListener("blur", () => game.releaseAll());
  document.addEventListener("visibilitychange", () => document.hidden && game.releaseAll());
}

/** Looks at the gamepads at every drawing of the page, while there are any. */
export function listenToGamepads(/** @type {Game} */ game, /** @type {(text: string) => void} */ say) {
  /** What was held when they were last looked at: pane and value by source. @type {Map<string, string>} */
  let held = new Map();
  let isLooking = false;

  function look() {
    const pads = navigator.getGamepads().filter((pad) => pad?.connected);
    const found = new Map();
    pads.forEach((pad, i) => game.map && readPad(pad, Math.min(i, game.panes - 1), game, found));
    const now = new Map([...found].map(([source, { pane, binding }]) => [source, `${pane} ${binding.value}`]));
    for (const source of held.keys()) if (!now.has(source)) game.release(source);
    for (const [source, { pane, binding }] of found) {
      if (held.get(source) !== now.get(source)) game.press(pane, source, binding);
    }
    held = now;
    isLooking = pads.length > 0;
    if (isLooking) requestAnimationFrame(look);
  }

  window.addEventListener("gamepadconnected", ({ gamepad }) => {
    say(`Gamepad connected: ${gamepad.id}`);
    if (!isLooking) look();
  });
  window.addEventListener("gamepaddisconnected", () => say("Gamepad disconnected"));
}

/** What a gamepad holds, by source. The d-pad and the left stick are the arrows; buttons are the other keys in turn. */
function readPad(/** @type {Gamepad} */ pad, /** @type {number} */ pane, /** @type {Game} */ { map, hello }, found) {
  const source = (/** @type {string} */ part) => `gamepad ${pad.index} ${part}`;
  const press = (part, binding, value = 1) => {
    if (binding) found.set(source(part), { pane, binding: { ...binding, value: binding.value * value } });
  };
  const [x = 0, y = 0, ...right] = pad.axes.map((value) => (Math.abs(value) < DEAD_ZONE ? 0 : round(value)));
  const tilts = { ArrowUp: -y, ArrowDown: y, ArrowLeft: -x, ArrowRight: x };
  ARROWS.forEach((code, i) => {
    const binding = map.find(code);
    if (pad.buttons[12 + i]?.pressed) press(code, binding);
    else if (binding?.component.kind === "continuous" && tilts[code] > 0) press(code, binding, tilts[code]);
    else if (tilts[code] > TILTED) press(code, binding);
  });
  const others = map.codes.filter((code) => !ARROWS.includes(code));
  others.forEach((code, i) => i < 12 && pad.buttons[i]?.pressed && press(code, map.find(code)));
  // The right stick: the axes that no key has.
  const component = hello.actions.find((c) => c.kind === "continuous" && c.size > 2);
  right.slice(0, 2).forEach((value, i) => {
    if (component && value && 2 + i < component.size) press(`axis ${2 + i}`, { component, target: 2 + i, value });
  });
}

function round(/** @type {number} */ value) {
  return Math.round(value * 50) / 50; // a hand is never still
}
