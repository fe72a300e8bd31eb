// Parts that several views share.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Answer, Span } from "./answer";
import { perPass } from "./answer";
import { ApiError } from "./api";
import { html } from "./markdown";

// The colour of a drafter: one of nine, by its name.
export function hue(drafter: string | null): string {
  if (drafter === null) return "own";
  const known: Record<string, number> = { ngram: 1, suffix: 2, prediction: 3, grammar: 4 };
  let sum = 0;
  for (const letter of drafter) sum = (sum * 31 + letter.charCodeAt(0)) % 1009;
  return `hue${known[drafter] ?? 5 + (sum % 4)}`;
}

export function Markdown({ text }: { text: string }) {
  return <div class="markdown" dangerouslySetInnerHTML={{ __html: html(text) }} />;
}

export function Coloured({ spans }: { spans: Span[] }) {
  return (
    <p class="coloured">
      {spans.map((span, i) => (
        <span key={i} class={hue(span.drafter)} title={span.title}>
          {span.text}
        </span>
      ))}
    </p>
  );
}

export function Legend({ spans }: { spans: Span[] }) {
  const counts = new Map<string | null, number>();
  for (const { drafter } of spans) counts.set(drafter, (counts.get(drafter) ?? 0) + 1);
  return (
    <ul class="legend" aria-label="Where the tokens came from">
      {[...counts].map(([drafter, count]) => (
        <li key={drafter}>
          <span class={`swatch ${hue(drafter)}`} /> {drafter ?? "the model's own"}: {count}
        </li>
      ))}
    </ul>
  );
}

export function Bar({ parts }: { parts: [number, string][] }) {
  let at = 0;
  return (
    <svg class="chart thin" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">
      {parts.map(([share, colour]) => {
        const x = at;
        at += 100 * share;
        return <rect key={colour} class={`fill-${colour}`} x={x} y="0" width={100 * share} height="4" />;
      })}
    </svg>
  );
}

// Tokens per second beside what plain decoding would give.
function Against({ rate, plain }: { rate: number; plain: number }) {
  const most = Math.max(rate, plain);
  return (
    <dl class="against">
      <dt>this answer</dt>
      <dd><Bar parts={[[rate / most, "hue1"]]} /> {rate.toFixed(1)} tokens/s, {(rate / plain).toFixed(2)}×</dd>
      <dt>plain decoding</dt>
      <dd><Bar parts={[[plain / most, "own"]]} /> about {plain.toFixed(1)} tokens/s, as the controller estimates</dd>
    </dl>
  );
}

export function Speed({ answer }: { answer: Answer }) {
  const passes = perPass(answer);
  if (!answer.tokens) return null;
  return (
    <>
      {answer.plain !== undefined && answer.rate !== null && <Against rate={answer.rate} plain={answer.plain} />}
      <p class="speed">
        {answer.tokens} tokens
        {answer.rate !== null && <>, <strong>{answer.rate.toFixed(1)}</strong> tokens/s</>}
        {passes !== null && <>, {passes.toFixed(2)} tokens per pass (plain decoding: 1)</>}
        {answer.finish === "length" && <>, cut off at max_tokens</>}
      </p>
    </>
  );
}

export function Problem({ text }: { text: string | null | undefined }) {
  return text ? <p class="problem" role="alert">{text}</p> : null;
}

export function messageOf(error: unknown): string {
  const { message, name } = error as Error;
  if (name === "AbortError") return "Stopped.";
  return error instanceof ApiError && error.status === 401 ? `${message} Enter a key above.` : message;
}

export function Choice(props: { label: string; value: string; options: [string, string][]; onPick: (value: string) => void }) {
  return (
    <label>
      {props.label}
      <select value={props.value} onChange={(event) => props.onPick(event.currentTarget.value)}>
        {props.options.map(([value, text]) => (
          <option key={value} value={value}>{text}</option>
        ))}
      </select>
    </label>
  );
}

// State that is set at most once a frame, however often it is asked for.
export function useFrames<T>(initial: T): [T, (value: T) => void] {
  const [value, set] = useState(initial);
  const waiting = useRef<{ value: T; frame: number } | null>(null);
  useEffect(() => () => cancelAnimationFrame(waiting.current?.frame ?? 0), []);
  return [
    value,
    (next) => {
      if (waiting.current) waiting.current.value = next;
      else {
        const frame = requestAnimationFrame(() => {
          set(waiting.current!.value);
          waiting.current = null;
        });
        waiting.current = { value: next, frame };
      }
    },
  ];
}
