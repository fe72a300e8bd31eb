// What the browser keeps: conversations and settings, in localStorage.
import { useState } from "preact/hooks";
import type { Answer } from "./answer";
import type { Call } from "./api";

export interface Message {
  role: "user" | "assistant" | "tool";
  content: string;
  answer?: Answer;
  call?: string; // the id of the call that this is the result of
}

export interface Conversation {
  id: string;
  title: string;
  messages: Message[];
}

export interface Settings {
  model: string;
  system: string;
  speculation: string;
  temperature: string;
  top_p: string;
  top_k: string;
  min_p: string;
  presence_penalty: string;
  frequency_penalty: string;
  repetition_penalty: string;
  max_tokens: string;
  seed: string;
  stop: string;
  schema: string;
  tools: string;
  colours: boolean;
}

export const DEFAULTS: Settings = {
  model: "", system: "", speculation: "", temperature: "0.7", top_p: "", top_k: "", min_p: "", presence_penalty: "",
  frequency_penalty: "", repetition_penalty: "", max_tokens: "512", seed: "", stop: "", schema: "", tools: "",
  colours: false,
};

const KEPT = 50;

function read<T>(name: string, otherwise: T): T {
  try {
    const found = localStorage.getItem(`pilotfish.${name}`);
    return found === null ? otherwise : (JSON.parse(found) as T);
  } catch {
    return otherwise;
  }
}

function write(name: string, value: unknown): void {
  try {
    localStorage.setItem(`pilotfish.${name}`, JSON.stringify(value));
  } catch {
    // full, or forbidden: the page goes on without
  }
}

// State that outlives the page.
export function useKept<T>(name: string, otherwise: T): [T, (value: T | ((old: T) => T)) => void] {
  const [value, set] = useState<T>(() => {
    const found = read(name, otherwise);
    return Array.isArray(otherwise) || typeof otherwise !== "object" ? found : { ...otherwise, ...found };
  });
  return [
    value,
    (next) =>
      set((old) => {
        const made = next instanceof Function ? next(old) : next;
        write(name, made);
        return made;
      }),
  ];
}

export function useConversations() {
  const [all, set] = useKept<Conversation[]>("conversations", []);
  const put = (one: Conversation) =>
    set((old) => [one, ...old.filter((each) => each.id !== one.id)].slice(0, KEPT));
  const remove = (id: string) => set((old) => old.filter((each) => each.id !== id));
  return { all, put, remove };
}

export function newConversation(): Conversation {
  return { id: String(Date.now()), title: "New conversation", messages: [] };
}

// The calls of an answer with their ids, which answers that were kept long ago lack.
export function callsOf(answer: Answer): Call[] {
  return answer.calls.map((each, i) => ({ ...each, id: each.id || `call_${i}` }));
}

// A message in the API's form. Calls whose results were not given are left out.
function sent(message: Message, i: number, all: Message[]): object {
  const { role, content, answer } = message;
  if (role === "tool") return { role, content, tool_call_id: message.call };
  if (!answer?.calls.length || all[i + 1]?.role !== "tool") return { role, content };
  const calls = callsOf(answer).map(({ id, ...called }) => ({ id, type: "function", function: called }));
  return { role, content, tool_calls: calls };
}

// The request's body, or an error that names the field. Empty settings are left out: they are the server's.
export function bodyOf(settings: Settings, model: string, messages: Message[]): Record<string, unknown> {
  const body: Record<string, unknown> = { model: settings.model || model };
  const system = settings.system.trim();
  body.messages = [
    ...(system ? [{ role: "system", content: system }] : []),
    ...messages.map(sent),
  ];
  for (const name of NUMBERS) {
    const text = settings[name].trim();
    if (!text) continue;
    if (!Number.isFinite(Number(text))) throw new Error(`${name} is ${text}, but must be a number`);
    body[name] = Number(text);
  }
  if (settings.speculation) body.speculation = settings.speculation;
  if (settings.stop) body.stop = settings.stop.split("\n").filter(Boolean);
  if (settings.schema.trim()) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: json("JSON schema", settings.schema) } };
  }
  if (settings.tools.trim()) body.tools = json("Tools", settings.tools);
  return body;
}

export const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens", "seed",
] as const;

function json(name: string, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not JSON: ${(error as Error).message}`);
  }
}
