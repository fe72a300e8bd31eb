// An answer in the making, and what it is made of.
import type { Call, Origin, Piece, Timings } from "./api";

export interface Span {
  text: string;
  drafter: string | null;
  title: string;
}

export interface Answer {
  content: string;
  reasoning: string;
  calls: Call[];
  spans: Span[];
  tokens: number;
  accepted: number;
  began: number;
  rate: number | null;
  plain?: number; // tokens/s of plain decoding, by the controller's estimate
  timings?: Timings;
  finish?: string;
  error?: string;
}

export function newAnswer(): Answer {
  return { content: "", reasoning: "", calls: [], spans: [], tokens: 0, accepted: 0, began: 0, rate: null };
}

// Return the answer with a piece added.
export function added(answer: Answer, piece: Piece): Answer {
  const next = { ...answer };
  if (piece.content) next.content += piece.content;
  if (piece.reasoning) next.reasoning += piece.reasoning;
  for (const each of piece.calls ?? []) {
    const known = next.calls[each.index] ?? { id: "", name: "", arguments: "" };
    next.calls = [...next.calls];
    next.calls[each.index] = { id: each.id ?? known.id, name: known.name + (each.name ?? ""), arguments: known.arguments + (each.arguments ?? "") };
  }
  const text = piece.content ?? "";
  if (piece.origins?.length || text) {
    const before = next.tokens;
    next.tokens += piece.origins?.length ?? 0;
    next.accepted += (piece.origins ?? []).filter((origin) => origin.drafter !== null).length;
    next.spans = next.spans.concat(spansOf(text, piece.origins ?? []));
    const now = performance.now();
    if (!before) next.began = now;
    else if (now > next.began) next.rate = (next.tokens - 1) / ((now - next.began) / 1000);
  }
  if (piece.timings) {
    next.timings = piece.timings;
    next.rate = piece.timings.tokens_per_second ?? next.rate;
  }
  if (piece.tokens !== undefined) next.tokens = piece.tokens;
  if (piece.finish) next.finish = piece.finish;
  return next;
}

// Cut a chunk's text at its tokens. A token that is part of a character joins the one before it.
function spansOf(text: string, origins: Origin[]): Span[] {
  const spans: Span[] = [];
  let at = 0;
  for (const origin of origins) {
    const found = origin.token ? text.indexOf(origin.token, at) : -1;
    if (found < 0) continue;
    if (found > at) push(spans, text.slice(at, found));
    spans.push({ text: origin.token, drafter: origin.drafter, title: titleOf(origin) });
    at = found + origin.token.length;
  }
  if (at < text.length) push(spans, text.slice(at));
  return spans;
}

function push(spans: Span[], text: string): void {
  const last = spans[spans.length - 1];
  if (last) last.text += text;
  else spans.push({ text, drafter: null, title: "" });
}

function titleOf(origin: Origin): string {
  if (origin.drafter !== null) return `drafted by ${origin.drafter}, position ${origin.position}`;
  if (origin.rejected) {
    const what = origin.rejected === 1 ? "the rejected token" : `${origin.rejected} rejected tokens`;
    return `the model's own, in place of ${what} of ${origin.rejected_drafter}: ${JSON.stringify(origin.rejected_tokens?.join(""))}`;
  }
  return "the model's own";
}

// How many tokens a pass of the model gave, on average; plain decoding gives 1.
export function perPass(answer: Answer): number | null {
  const accepted = answer.timings?.accepted_tokens ?? answer.accepted;
  return answer.tokens > accepted ? answer.tokens / (answer.tokens - accepted) : null;
}
