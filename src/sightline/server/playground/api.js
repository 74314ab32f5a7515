// The server's public endpoints, and how their errors read.

const KEY = "sightline-key";

export const getKey = () => sessionStorage.getItem(KEY) ?? "";
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A call. body: sent as JSON by POST; without one it is a GET. Throws ServerError with the server's own words. */
export async function call(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (getKey()) headers.authorization = `Bearer ${getKey()}`;
  const options = body === undefined ? { headers, signal } : { method: "POST", body: JSON.stringify(body), headers, signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server did not answer, or refused what was sent before it had all of it.", 0);
  }
  if (!response.ok) throw new ServerError(await message(response), response.status);
  return response;
}

async function message(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `The server answered ${response.status}${text ? `: ${text.slice(0, 200)}` : "."}`;
  }
}

/** Where start-up stands; null when nobody answers. */
export async function startup() {
  try {
    return await (await fetch("startupz")).json();
  } catch {
    return null;
  }
}

/** The objects of a stream of server-sent events, up to [DONE]. Throws ServerError for an error in mid-stream. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended in the middle of the answer.", 0);
    buffer += value;
    const lines = buffer.split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, 0);
      yield event;
    }
  }
}
