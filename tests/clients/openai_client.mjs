// The npm package `openai`: a text, streamed and not, a demanded call by the stream helper, a response. Prints JSON.

import OpenAI from "openai";

const [url, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const asked = { model: "smollm2", temperature: 0, max_tokens: 48, messages: [{ role: "user", content: prompt }] };
const parameters = {
  type: "object",
  properties: { on: { type: "boolean" }, room: { enum: ["kitchen", "hall"] } },
  required: ["on", "room"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "SetLight", parameters } }];

const text = (await client.chat.completions.create(asked)).choices[0].message.content;
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const demand = { tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 128 };
const answer = await client.chat.completions.stream({ ...asked, ...demand }).finalChatCompletion();
const call = answer.choices[0].message.tool_calls[0].function;
const events = client.responses.stream({ model: "smollm2", input: prompt, temperature: 0, max_output_tokens: 48 });
const response = (await events.finalResponse()).output_text;
console.log(JSON.stringify({ text, streamed, call: [call.name, JSON.parse(call.arguments)], response }));
