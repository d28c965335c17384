// SPDX-License-Identifier: Apache-2.0
// OpenAI's client for Node.
import OpenAI from "openai";

const env = process.env;
const client = new OpenAI({ baseURL: `${env.CHECK_URL}/v1`, apiKey: env.CHECK_KEY, timeout: 120_000, maxRetries: 0 });
const messages = [{ role: "user", content: env.CHECK_QUESTION }];
const asked = { model: env.CHECK_MODEL, messages, max_tokens: 200, temperature: 0 };
const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters } }];

function expect(found, expected) {
  if (found !== expected) throw new Error(`found ${JSON.stringify(found)}, expected ${JSON.stringify(expected)}`);
}
const whole = async () => (await client.chat.completions.create(asked)).choices[0].message.content;

const checks = {
  async "a chat"() {
    const text = await whole();
    if (!text.trim().endsWith(env.CHECK_ANSWER)) throw new Error(`${text} is not right`);
  },
  async "a streamed chat"() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? "";
    }
    expect(text, await whole());
  },
  async "the streaming helper"() {
    const stream = client.chat.completions.stream(asked);
    expect(await stream.finalContent(), await whole());
  },
  async "a stream that is aborted"() {
    const stream = await client.chat.completions.create({ ...asked, stream: true });
    for await (const _ of stream) break;
    stream.controller.abort();
  },
  async "a tool that has to be called"() {
    const stream = client.chat.completions.stream({ ...asked, tools, tool_choice: "required" });
    const call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
    expect(["Paris", "Oslo"].includes(JSON.parse(call.function.arguments).city), true);
  },
  async "a response"() {
    const found = await client.responses.create({
      model: env.CHECK_MODEL, input: env.CHECK_QUESTION, max_output_tokens: 200, temperature: 0,
    });
    expect(found.output_text.trim().endsWith(env.CHECK_ANSWER), true);
  },
  async "errors are the client's own"() {
    const error = await client.chat.completions.create({ ...asked, model: "no-such-model" }).catch((e) => e);
    expect(error instanceof OpenAI.NotFoundError, true);
  },
};

let failed = 0;
for (const [name, run] of Object.entries(checks)) {
  const began = performance.now();
  try {
    await run();
    console.log(`ok      openai_node: ${name} (${((performance.now() - began) / 1000).toFixed(1)} s)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  openai_node: ${name}: ${String(error).replace(/\s+/g, " ").slice(0, 600)}`);
  }
}
process.exit(failed ? 1 : 0);
