// The conversation with the server: one streamed answer at a time.

export async function modelNames() {
  const answer = await fetch("/v1/models");
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return (await answer.json()).data.map(({ id }) => id);
}

// Calls onText with each new piece; returns {text, masks, boxes}.
export async function ask(asked, onText, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...asked, stream: true }),
    signal,
  });
  if (!response.ok) throw new Error(await reasonOf(response));
  let text = "";
  let found = { masks: [], boxes: [] };
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const delta = event.choices[0]?.delta ?? {};
    if (delta.content) onText((text += delta.content));
    if (delta.masks) found = delta;
  }
  return { text, masks: found.masks, boxes: found.boxes };
}

export async function reasonOf(response) {
  const busy = response.status === 429 ? ` Try again in ${response.headers.get("Retry-After")} s.` : "";
  try {
    return (await response.json()).error.message + busy;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* events(body) {
  let rest = "";
  for await (const piece of chunks(body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + piece).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}
