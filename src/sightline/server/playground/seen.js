// "What the model sees": the resized picture with its patches or tiles.

import { $, make } from "./dom.js";

let current = null;
let opener = null;

const plural = (number, word) => `${number} ${number === 1 ? word : word.endsWith("ch") ? `${word}es` : `${word}s`}`;

/** part: the picture as the user gave it; seen: an entry of /v1/images/preview. */
export async function show(part, seen) {
  opener = document.activeElement;
  $("seen-summary").textContent =
    `${part.name}, ${seen.width} × ${seen.height} pixels, takes ${plural(seen.image_tokens, "token")} in the prompt.`;
  const figures = await Promise.all(
    seen.views.map(async (view) => {
      const image = new Image();
      image.src = view.image_url.url;
      await image.decode();
      const canvas = make("canvas", { width: view.width, height: view.height, role: "img" });
      const { unit, rows, columns, width, height } = view.cells;
      const text = `Resized to ${view.width} × ${view.height}: ${rows} × ${columns} ${unit === "tile" ? "tiles" : "patches"} of ${width} × ${height} pixels`;
      canvas.setAttribute("aria-label", text);
      return { view, image, canvas, figure: make("figure", {}, canvas, make("figcaption", { textContent: text })) };
    }),
  );
  current = figures;
  $("views").replaceChildren(...figures.map(({ figure }) => figure));
  if (!$("seen").open) $("seen").showModal();
  draw();
}

function draw() {
  for (const { view, image, canvas } of current ?? []) {
    const { rows, columns, width, height, unit } = view.cells;
    // As many pixels as the screen shows, so that lines are equally thin; the picture's own are enlarged, not blurred.
    const room = $("views").clientWidth * devicePixelRatio;
    const scale = room / view.width;
    canvas.width = room;
    canvas.height = view.height * scale;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = scale < 1;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (!$("grid").checked) continue;
    const line = (x0, y0, x1, y1) => {
      // Dark beside light: seen on any picture.
      [x0, y0, x1, y1] = [x0, y0, x1, y1].map(Math.round);
      for (const [colour, offset] of [["rgba(0,0,0,.55)", 0], ["rgba(255,255,255,.8)", 1]]) {
        context.fillStyle = colour;
        const thick = Math.round((unit === "tile" ? 2 : 1) * devicePixelRatio);
        context.fillRect(x0 + (x0 === x1 ? offset * thick : 0), y0 + (y0 === y1 ? offset * thick : 0), Math.max(x1 - x0, thick), Math.max(y1 - y0, thick));
      }
    };
    for (let i = 1; i < columns; i++) line(i * width * scale, 0, i * width * scale, rows * height * scale);
    for (let i = 1; i < rows; i++) line(0, i * height * scale, columns * width * scale, i * height * scale);
  }
}

$("grid").addEventListener("change", draw);
$("close-seen").addEventListener("click", () => $("seen").close());
$("seen").addEventListener("click", (event) => event.target === $("seen") && $("seen").close());
$("seen").addEventListener("close", () => opener?.isConnected && opener.focus());
