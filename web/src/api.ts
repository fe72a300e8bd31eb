// The server's API: the key, errors, server-sent events over fetch (EventSource cannot send a key).
export interface Info {
  version: string;
  state: string;
  models: string[];
  drafters: string[];
  default_drafter: string;
  max_model_len: number;
  log_prompts: boolean;
  grafana_url: string | null;
}

export interface Origin {
  token: string;
  drafter: string | null;
  position: number | null;
  rejected?: number;
  rejected_tokens?: string[];
  rejected_drafter?: string;
}

export interface Timings {
  queue_ms: number | null;
  ttft_ms: number | null;
  decode_ms: number | null;
  tokens_per_second: number | null;
  drafter: string;
  drafted_tokens: number;
  accepted_tokens: number;
}

export interface Call {
  id: string;
  name: string;
  arguments: string;
}

export interface Piece {
  content?: string;
  reasoning?: string;
  calls?: { index: number; id?: string; name?: string; arguments?: string }[];
  origins?: Origin[];
  timings?: Timings;
  tokens?: number;
  finish?: string;
}

const KEY = "pilotfish.key";
const listeners = new Set<() => void>();

export function setKey(key: string): void {
  localStorage.setItem(KEY, key);
}

export function onKeyNeeded(listener: () => void): () => void {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

export class ApiError extends Error {
  constructor(message: string, readonly status: number) {
    super(message);
  }
}

export async function call(path: string, init: RequestInit = {}): Promise<Response> {
  const key = localStorage.getItem(KEY);
  const headers: Record<string, string> = { accept: "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  if (init.body) headers["content-type"] = "application/json";
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if ((error as Error).name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  if (response.status === 401) listeners.forEach((listener) => listener());
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not JSON: a proxy's page
  }
  throw new ApiError(message, response.status);
}

// Yield the data of each event.
export async function* events(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
        const lines = held.slice(0, end).split("\n");
        held = held.slice(end + 2);
        const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

// Yield the pieces of a chat's answer.
export async function* chat(body: object, signal: AbortSignal): AsyncGenerator<Piece> {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, include_provenance: true };
  const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 500);
    const choice = chunk.choices[0];
    const delta = choice?.delta ?? {};
    yield {
      content: delta.content ?? undefined,
      reasoning: delta.reasoning_content,
      calls: delta.tool_calls?.map(({ index, id, function: called }: { index: number; id?: string; function?: Partial<Call> }) => ({ index, id, ...called })),
      origins: choice?.provenance,
      finish: choice?.finish_reason ?? undefined,
      timings: chunk.timings,
      tokens: chunk.usage?.completion_tokens,
    };
  }
}

// While a request runs, what the controller thinks plain decoding would give, as a share of what it expects of its choice.
export async function watchPlain(signal: AbortSignal, tell: (share: number) => void): Promise<void> {
  let steps = 0;
  let sum = 0;
  try {
    for await (const data of events(await call("/page/live", { signal }))) {
      const now = JSON.parse(data) as { steps: number; predicted_goodput: number; predicted_plain_goodput: number };
      if (!(now.steps && now.predicted_goodput > 0 && now.predicted_plain_goodput > 0)) continue;
      steps += now.steps;
      sum += (now.steps * now.predicted_plain_goodput) / now.predicted_goodput;
      tell(sum / steps);
    }
  } catch {
    // no comparison, then
  }
}
