// STATE as pictures. It comes in the network's own normalised units, 3 x 16 x 16, channel first.

import { call, formOf } from "./api.js";
import { ownPicture } from "./pictures.js";

export const SIDE = 16;
const PLANE = SIDE * SIDE;
const scales = new Map();

/**
 * {black, white}: what a black and a white picture are in the network's units, by channel. Measured at t_end = 1,
 * where the state is the picture itself, so no model has to say its mean and deviation.
 */
export function scaleOf(model, signal) {
  const known = `${model.name} ${model.default_version}`;
  if (!scales.has(known)) {
    const measured = measure(model, signal);
    scales.set(known, measured);
    measured.catch(() => scales.delete(known));
  }
  return scales.get(known);
}

async function measure(model, signal) {
  const pictures = await Promise.all(["black", "white"].map((name) => ownPicture(`samples/${name}.png`)));
  const options = { model: model.name, t_end: 1, feature: "state" };
  const { body } = await call("embed", { form: formOf(pictures, options), signal });
  const [black, white] = body.data.map(({ embedding }) => [0, 1, 2].map((channel) => embedding[channel * PLANE]));
  return { black, white };
}

/** Draw a state; with `fit` its own range is squeezed into what a screen shows, else what is beyond is cut off. */
export function draw(canvas, state, { black, white }, fit) {
  const values = state.map((x, i) => {
    const channel = Math.floor(i / PLANE);
    return (x - black[channel]) / (white[channel] - black[channel]);
  });
  const low = fit ? Math.min(0, ...values) : 0;
  const high = fit ? Math.max(1, ...values) : 1;
  const image = new ImageData(SIDE, SIDE);
  for (let pixel = 0; pixel < PLANE; pixel++) {
    for (let channel = 0; channel < 3; channel++)
      image.data[pixel * 4 + channel] = (255 * (values[channel * PLANE + pixel] - low)) / (high - low);
    image.data[pixel * 4 + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
