// openai-node.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { BASE, MESSAGES, MODEL, Paint, QUESTION, URL_OF_PNG, run, see, streamed } from "./common.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: "none", maxRetries: 0 });
const given = { model: MODEL, messages: MESSAGES, temperature: 0 };

await run({
  async picture() {
    const answer = await client.chat.completions.create(given);
    see(answer.choices[0].message.content);
    assert(answer.usage.prompt_tokens > 64);
  },
  async streaming() {
    const pieces = [];
    let usage = null;
    const stream = await client.chat.completions.create({ ...given, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      pieces.push(chunk.choices[0]?.delta.content ?? "");
      usage = chunk.usage ?? usage;
    }
    streamed(pieces);
    assert(usage.completion_tokens > 0);
    see(await client.chat.completions.stream(given).finalContent());
  },
  async structured() {
    const format = zodResponseFormat(Paint, "paint");
    const answer = await client.chat.completions.parse({ ...given, response_format: format });
    Paint.parse(answer.choices[0].message.parsed);
  },
  async tools() {
    const tool = zodFunction({ name: "paint", parameters: Paint });
    const forced = { ...given, tools: [tool], tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 };
    const { message } = (await client.chat.completions.parse(forced)).choices[0];
    assert.equal(message.tool_calls.length, 1);
    Paint.parse(message.tool_calls[0].function.parsed_arguments);
    const again = (await client.chat.completions.stream(forced).finalChatCompletion()).choices[0].message;
    assert.equal(again.tool_calls[0].function.arguments, message.tool_calls[0].function.arguments);
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "done" };
    const messages = [...MESSAGES, { role: "assistant", tool_calls: message.tool_calls }, result];
    const second = await client.chat.completions.create({ ...given, messages, tools: [tool], max_tokens: 20 });
    assert(second.choices[0].message.content);
  },
  async responses() {
    const content = [
      { type: "input_text", text: QUESTION },
      { type: "input_image", image_url: URL_OF_PNG, detail: "auto" },
    ];
    const input = [{ role: "user", content }];
    see((await client.responses.create({ model: MODEL, input, temperature: 0 })).output_text);
    const pieces = [];
    for await (const event of await client.responses.create({ model: MODEL, input, temperature: 0, stream: true })) {
      if (event.type === "response.output_text.delta") pieces.push(event.delta);
    }
    streamed(pieces);
  },
  async errors() {
    const broken = [{ type: "image_url", image_url: { url: "data:image/png;base64,aGVsbG8=" } }];
    const messages = [{ role: "user", content: broken }];
    await assert.rejects(client.chat.completions.create({ ...given, messages }), (error) => {
      return error instanceof OpenAI.BadRequestError && error.code === "invalid_image_format";
    });
  },
});
