/** A picture that somebody dropped or chose, as the frame that a world can begin from. */

const LARGEST_FILE = 20 * 2 ** 20; // bytes
const LONGEST_SIDE = 8192; // pixels
const LONGEST_CANVAS = 2048; // phones refuse canvases of 8192 x 8192

/**
 * The bytes of a frame, row by row: the middle of the picture in the frame's shape, averaged down to its size.
 *
 * @param {File} file
 * @param {[number, number, number]} frame  height, width and channels (1: grey)
 * @returns {Promise<Uint8Array>}
 * Throws an Error whose message is for the user.
 */
export async function readPicture(file, [height, width, channels]) {
  if (!file.type.startsWith("image/")) {
    throw new Error(`${file.name || "This"} is not a picture: ${file.type || "a file of an unknown type"} found.`);
  }
  if (file.size > LARGEST_FILE) {
    throw new Error(`${file.name} is too large: ${megabytes(file.size)} MB found, at most 20 MB expected.`);
  }
  const url = URL.createObjectURL(file);
  try {
    const picture = await load(file, url);
    const pixels = scaleDown(picture, width, height).getContext("2d").getImageData(0, 0, width, height).data;
    return channels === 1 ? grey(pixels) : colour(pixels);
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** Its size is known, and refused, before its pixels are unpacked. */
async function load(/** @type {File} */ file, /** @type {string} */ url) {
  const { name } = file;
  const picture = new Image();
  const unreadable = () => new Error(`${name} cannot be read as a picture: it may be damaged, or of a rare format.`);
  await new Promise((resolve, reject) => {
    picture.onload = resolve;
    picture.onerror = () => reject(unreadable());
    picture.src = url;
  });
  const { naturalWidth: width, naturalHeight: height } = picture;
  if (!width || !height) throw unreadable();
  if (Math.max(width, height) > LONGEST_SIDE) {
    const found = `${width} x ${height} pixels`;
    throw new Error(`${name} is too large: ${found} found, at most ${LONGEST_SIDE} a side expected.`);
  }
  // An <img> would make do with the upper half of a damaged picture.
  return createImageBitmap(file).catch(() => Promise.reject(unreadable()));
}

/**
 * The middle of a picture, halved as often as possible: each halving is a true mean of 2 x 2 pixels, where a browser
 * that scales at once may skip pixels.
 */
function scaleDown(/** @type {ImageBitmap} */ picture, /** @type {number} */ width, /** @type {number} */ height) {
  const scale = Math.min(picture.width / width, picture.height / height);
  const [w, h] = [width * scale, height * scale];
  const halvings = Math.max(0, Math.floor(Math.log2(Math.min(scale, LONGEST_CANVAS / Math.max(width, height)))));
  let size = 2 ** halvings; // of the canvas, in frames
  const left = (picture.width - w) / 2;
  const top = (picture.height - h) / 2;
  let canvas = draw(picture, [left, top, w, h], width * size, height * size);
  for (; size > 1; size /= 2) {
    canvas = draw(canvas, [0, 0, canvas.width, canvas.height], canvas.width / 2, canvas.height / 2);
  }
  return canvas;
}

function draw(source, part, width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "low"; // linear, which is the mean when it halves; "high" sharpens
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(source, ...part, 0, 0, width, height);
  return canvas;
}

function colour(/** @type {Uint8ClampedArray} */ pixels) {
  return Uint8Array.from({ length: (pixels.length / 4) * 3 }, (_, i) => pixels[Math.floor(i / 3) * 4 + (i % 3)]);
}

/** ITU-R 601 luma in whole numbers, as `to_gray` of the data has it. */
function grey(/** @type {Uint8ClampedArray} */ pixels) {
  const luma = (i) => (19595 * pixels[i] + 38470 * pixels[i + 1] + 7471 * pixels[i + 2] + 0x8000) >> 16;
  return Uint8Array.from({ length: pixels.length / 4 }, (_, i) => luma(4 * i));
}

function megabytes(/** @type {number} */ bytes) {
  return (bytes / 2 ** 20).toFixed(1);
}
