// Requests: the recent ones, and where their time went.
import { useEffect, useState } from "preact/hooks";
import { call } from "./api";
import { messageOf, Problem } from "./parts";

interface Recent {
  request_id: string;
  time: number;
  path: string;
  status: number;
  error: string | null;
  finish_reason: string;
  prompt_tokens: number;
  cached_tokens: number;
  tokens: number;
  queue_ms: number | null;
  ttft_ms: number | null;
  decode_ms: number | null;
  duration_ms: number;
  tokens_per_second: number | null;
  preemptions: number;
  drafters: Record<string, { steps: number; drafted_tokens: number; accepted_tokens: number }>;
  prompts: string[] | null;
}

export function Requests() {
  const [all, setAll] = useState<Recent[] | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    const control = new AbortController();
    const load = async () => {
      try {
        setAll((await (await call("/page/requests", { signal: control.signal })).json()).requests);
        setProblem(null);
      } catch (error) {
        if (!control.signal.aborted) setProblem(messageOf(error));
      }
    };
    void load();
    const timer = setInterval(() => document.hidden || void load(), 2000);
    return () => {
      control.abort();
      clearInterval(timer);
    };
  }, []);
  const longest = Math.max(1, ...(all ?? []).map((each) => each.duration_ms));
  return (
    <div class="view">
      <Problem text={problem} />
      {all?.length === 0 && <p>No requests yet.</p>}
      {!!all?.length && (
        <div class="scroll" tabIndex={0} role="region" aria-label="Recent requests">
          <table>
            <caption>
              The newest first. <span class="swatch fill-own" /> queue <span class="swatch fill-hue2" /> prefill <span class="swatch fill-hue1" /> decode
            </caption>
            <thead>
              <tr>
                {["time", "request", "end", "prompt (cached)", "tokens", "tokens/s", "queue, first token, end", "drafters (accepted of drafted)", "preempted"].map((name) => (
                  <th scope="col" key={name}>{name}</th>
                ))}
              </tr>
            </thead>
            <tbody>{all.map((each) => <Row key={each.request_id} each={each} longest={longest} />)}</tbody>
          </table>
        </div>
      )}
    </div>
  );
}

function Row({ each, longest }: { each: Recent; longest: number }) {
  const scale = 100 / longest;
  const queue = each.queue_ms ?? 0;
  const prefill = Math.max(0, (each.ttft_ms ?? each.duration_ms) - queue);
  const drafters = Object.entries(each.drafters).map(([name, own]) => `${name} ${own.accepted_tokens}/${own.drafted_tokens}`);
  return (
    <tr>
      <td>{new Date(1000 * each.time).toLocaleTimeString()}</td>
      <th scope="row" title={each.request_id}>
        {each.path.replace("/v1/", "")}
        {each.prompts && <details><summary>prompt</summary><pre tabIndex={0}>{each.prompts.join("\n---\n")}</pre></details>}
      </th>
      <td>{each.error ?? (each.finish_reason || each.status)}</td>
      <td>{each.prompt_tokens} ({each.cached_tokens})</td>
      <td>{each.tokens}</td>
      <td>{each.tokens_per_second?.toFixed(1) ?? "-"}</td>
      <td>
        <svg class="chart thin" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">
          <rect class="fill-own" x="0" y="0" width={queue * scale} height="4" />
          <rect class="fill-hue2" x={queue * scale} y="0" width={prefill * scale} height="4" />
          <rect class="fill-hue1" x={(queue + prefill) * scale} y="0" width={(each.decode_ms ?? 0) * scale} height="4" />
        </svg>
        {[each.queue_ms, each.ttft_ms, each.duration_ms].map((ms) => (ms === null ? "-" : `${ms.toFixed(0)} ms`)).join(", ")}
      </td>
      <td class="wrap">{drafters.join(", ") || "-"}</td>
      <td>{each.preemptions}</td>
    </tr>
  );
}
