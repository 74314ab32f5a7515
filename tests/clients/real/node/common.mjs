// What the scripts of this folder share.
import assert from "node:assert/strict";
import fs from "node:fs";
import { z } from "zod";

export const BASE = `${process.env.SERVER}/v1`;
export const MODEL = "sightline-tiny";
export const QUESTION = "What's in this image?";
export const PNG = fs.readFileSync(new URL("../../../../src/sightline/demo/samples/shapes.png", import.meta.url));
export const URL_OF_PNG = `data:image/png;base64,${PNG.toString("base64")}`;
export const MESSAGES = [
  {
    role: "user",
    content: [
      { type: "text", text: QUESTION },
      { type: "image_url", image_url: { url: URL_OF_PNG } },
    ],
  },
];

// A schema that leaves a model of three million parameters no room: its values are checked, not its wisdom.
export const Paint = z.strictObject({ color: z.enum(["red", "green", "blue"]) });

export function see(text) {
  assert.match(text, /red circle.*blue square.*green triangle/);
}

export function streamed(pieces) {
  assert(pieces.filter(Boolean).length > 1, "the answer came in one piece");
  see(pieces.join(""));
}

export async function run(checks) {
  for (const [name, check] of Object.entries(checks)) {
    await check();
    console.log(name);
  }
}
