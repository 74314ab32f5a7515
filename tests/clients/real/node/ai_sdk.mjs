// Vercel's AI SDK, with its provider for compatible servers and with its own for OpenAI (chat completions and responses).
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, streamText, tool } from "ai";
import { BASE, MODEL, PNG, Paint, QUESTION, run, see, streamed } from "./common.mjs";

const compatible = createOpenAICompatible({
  name: "sightline",
  baseURL: BASE,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: BASE, apiKey: "none" });
const models = [compatible(MODEL), openai.chat(MODEL), openai.responses(MODEL)];
const messages = [
  {
    role: "user",
    content: [
      { type: "text", text: QUESTION },
      { type: "image", image: PNG },
    ],
  },
];
const given = { messages, temperature: 0, maxOutputTokens: 200, maxRetries: 0 };

await run({
  async picture() {
    for (const model of models) {
      const answer = await generateText({ ...given, model });
      see(answer.text);
      assert(answer.usage.inputTokens > 64);
    }
  },
  async streaming() {
    for (const model of models) {
      const answer = streamText({ ...given, model });
      const pieces = [];
      for await (const piece of answer.textStream) pieces.push(piece);
      streamed(pieces);
      assert((await answer.usage).outputTokens > 0);
    }
  },
  async structured() {
    for (const model of models) {
      const answer = await generateText({ ...given, model, output: Output.object({ schema: Paint }) });
      Paint.parse(answer.output);
    }
  },
  async tools() {
    for (const model of models) {
      const painted = [];
      const paint = tool({
        description: "Paint a wall.",
        inputSchema: Paint,
        execute: ({ color }) => painted.push(color),
      });
      const forced = { ...given, model, tools: { paint }, toolChoice: { type: "tool", toolName: "paint" } };
      const answer = await generateText(forced);
      assert.deepEqual(painted, [answer.toolCalls[0].input.color]);
      const stream = streamText(forced);
      assert.deepEqual((await stream.toolCalls)[0].input, answer.toolCalls[0].input);
      const next = [...messages, ...(await stream.response).messages];
      assert((await generateText({ ...given, model, tools: { paint }, messages: next })).text);
    }
  },
});
