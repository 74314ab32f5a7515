// @langchain/openai.
import assert from "node:assert/strict";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { BASE, MESSAGES, MODEL, Paint, run, see, streamed } from "./common.mjs";

const given = { model: MODEL, apiKey: "none", temperature: 0, maxTokens: 200, maxRetries: 0, configuration: { baseURL: BASE } };
const llm = new ChatOpenAI(given);
const messages = [new HumanMessage({ content: MESSAGES[0].content })];

async function collect(model) {
  const chunks = [];
  for await (const chunk of await model.stream(messages)) chunks.push(chunk);
  return chunks;
}

await run({
  async picture() {
    const answer = await llm.invoke(messages);
    see(answer.text);
    assert(answer.usage_metadata.input_tokens > 64);
  },
  async streaming() {
    const chunks = await collect(llm);
    streamed(chunks.map((chunk) => chunk.text));
    assert(chunks.reduce((a, b) => a.concat(b)).usage_metadata.output_tokens > 0);
  },
  async structured() {
    for (const method of ["jsonSchema", "functionCalling"]) {
      Paint.parse(await llm.withStructuredOutput(Paint, { method, strict: true }).invoke(messages));
    }
  },
  async tools() {
    const paint = tool(({ color }) => `The wall is ${color}.`, { name: "paint", description: "Paint a wall.", schema: Paint });
    const forced = llm.bindTools([paint], { tool_choice: "required", parallel_tool_calls: false, strict: true });
    const said = await forced.invoke(messages);
    assert.equal(said.tool_calls.length, 1);
    const result = await paint.invoke(said.tool_calls[0]);
    assert(result instanceof ToolMessage);
    assert.match(result.content, /^The wall is /);
    assert((await llm.bindTools([paint]).invoke([...messages, said, result])).text);
    const whole = (await collect(forced)).reduce((a, b) => a.concat(b));
    assert.deepEqual(whole.tool_calls[0].args, said.tool_calls[0].args);
  },
  async responses() {
    const other = new ChatOpenAI({ ...given, useResponsesApi: true });
    see((await other.invoke(messages)).text);
    streamed((await collect(other)).map((chunk) => chunk.text));
  },
});
