// A request as code that can be pasted. The key is never written: the code reads OPENAI_API_KEY.

const indented = (text) => text.replaceAll("\n", "\n  ");

export function curl(origin, body, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $OPENAI_API_KEY"` : "";
  return `curl -sSN ${origin}/v1/chat/completions \\
  -H "Content-Type: application/json"${key} \\
  --data-binary @- <<'REQUEST'
${JSON.stringify(body, null, 2)}
REQUEST
`;
}

// JSON's strings and numbers are Python's too.
function literal(value, indent = "    ") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = indent + "    ";
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, inner))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, inner)}`);
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

export function python(origin, body, withKey) {
  const key = withKey ? "" : `, api_key="none"`;
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  return `from openai import OpenAI  # pip install openai${withKey ? "; the key is read from OPENAI_API_KEY" : ""}

client = OpenAI(base_url="${origin}/v1"${key})
stream = client.chat.completions.create(
${fields.join("")})
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}

export function javascript(origin, body, withKey) {
  const key = withKey ? "\n    authorization: `Bearer ${process.env.OPENAI_API_KEY}`," : "";
  return `const response = await fetch("${origin}/v1/chat/completions", {
  method: "POST",
  headers: {
    "content-type": "application/json",${key}
  },
  body: JSON.stringify(${indented(JSON.stringify(body, null, 2))}),
});
if (!response.ok) throw new Error(await response.text());
let buffer = "";
let answer = "";
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const lines = (buffer + text).split("\\n");
  buffer = lines.pop();
  for (const line of lines) {
    if (!line.startsWith("data: {")) continue;
    answer += JSON.parse(line.slice(6)).choices?.[0]?.delta.content ?? "";
  }
}
console.log(answer);
`;
}

export const WRITERS = { curl, Python: python, JavaScript: javascript };
