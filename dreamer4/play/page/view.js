/** The panes: dreams and the truth beside them, as large as there is room, in whole pixels where that fits. */

/** @typedef {import("./socket.js").Picture} Picture */

const KINDS = /** @type {const} */ (["dream", "truth"]);
const SIDE_BY_SIDE = 1.25; // pictures are compared more easily so, at up to so much of a loss
const FILL_BELOW = 2; // times its size, a picture fills its room rather than lose up to half of it to whole pixels

export class View {
  #frame = [1, 1];
  #asked = 0; // how many drawings were, and which of them is to be seen
  #drawn = 0;
  #panes = [0, 1].map((i) => ({
    root: document.getElementById(`pane-${i}`),
    frames: document.getElementById(`frames-${i}`),
    dream: document.getElementById(`dream-${i}`),
    truth: document.getElementById(`truth-${i}`),
  }));

  constructor() {
    const observer = new ResizeObserver(() => this.fit());
    for (const { frames } of this.#panes) observer.observe(frames);
  }

  /** Makes the canvases as large as the world's frames. */
  setFrame(/** @type {number} */ height, /** @type {number} */ width) {
    this.#frame = [height, width];
    for (const pane of this.#panes) for (const kind of KINDS) Object.assign(pane[kind], { height, width });
    this.fit();
  }

  /** Shows so many dreams, with the truth beside them or without it. */
  show(/** @type {number} */ panes, /** @type {boolean} */ hasTruth) {
    this.#panes.forEach(({ root, truth }, i) => {
      root.hidden = i >= panes;
      truth.parentElement.hidden = !hasTruth;
    });
    this.fit();
  }

  /** Decodes the pictures of one tick and draws them all at once, unless later ones came to be drawn meanwhile. */
  async draw(/** @type {Picture[]} */ pictures) {
    const turn = ++this.#asked;
    const bitmaps = await Promise.all(pictures.map(({ blob }) => createImageBitmap(blob)));
    if (turn < this.#drawn) return;
    this.#drawn = turn;
    pictures.forEach(({ pane, what }, i) => {
      this.#panes[pane][what].getContext("2d").drawImage(bitmaps[i], 0, 0);
      bitmaps[i].close();
    });
  }

  /** Side by side, unless one above the other is much larger. */
  fit() {
    const [height, width] = this.#frame;
    for (const { root, frames } of this.#panes) {
      if (root.hidden) continue;
      const figures = [...frames.children].filter((figure) => !figure.hidden);
      const caption = figures[0].querySelector("figcaption").offsetHeight;
      const gap = parseFloat(getComputedStyle(frames).columnGap);
      const scale = (columns, rows) =>
        Math.min(
          (frames.clientWidth - gap * (columns - 1)) / columns / width,
          ((frames.clientHeight - gap * (rows - 1)) / rows - caption) / height,
        );
      const [beside, below] = [scale(figures.length, 1), scale(1, figures.length)];
      const isStacked = below > SIDE_BY_SIDE * beside;
      frames.classList.toggle("stacked", isStacked);
      const size = whole(Math.max(isStacked ? below : beside, 0.1));
      for (const canvas of frames.querySelectorAll("canvas")) {
        canvas.style.width = `${width * size}px`;
        canvas.style.height = `${height * size}px`;
      }
    }
  }
}

/** A scale at which pixels are all of one size on the screen. */
function whole(/** @type {number} */ scale) {
  return scale < FILL_BELOW ? scale : Math.floor(scale * devicePixelRatio) / devicePixelRatio;
}
