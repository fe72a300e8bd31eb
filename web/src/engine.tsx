// Engine: what it does now, twice a second.
import { useEffect, useState } from "preact/hooks";
import { call, events, type Info } from "./api";
import { Bar, hue, messageOf, Problem } from "./parts";

interface Live {
  state: string;
  seconds: number;
  in_flight: number;
  running: number;
  waiting: number;
  max_num_seqs: number;
  blocks_total: number;
  blocks_used: number;
  blocks_cached: number;
  steps: number;
  rows: number;
  prompt_tokens: number;
  generated_tokens: number;
  prefix_queried_tokens: number;
  prefix_hit_tokens: number;
  preemptions: number;
  tokens: Record<string, number>;
  chosen: Record<string, number>;
  drafted_at: Record<string, number[]>;
  accepted_at: Record<string, number[]>;
  predicted_goodput: number;
  predicted_plain_goodput: number;
  phases: Record<string, number>;
}

const KEPT = 120;
const WINDOW = 20; // ten seconds, for what is rare

export function Engine({ info }: { info: Info }) {
  const [history, setHistory] = useState<Live[]>([]);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    const control = new AbortController();
    (async () => {
      while (!control.signal.aborted) {
        try {
          for await (const data of events(await call("/page/live", { signal: control.signal }))) {
            setProblem(null);
            setHistory((old) => [...old, JSON.parse(data) as Live].slice(-KEPT));
          }
        } catch (error) {
          if (control.signal.aborted) return;
          setProblem(messageOf(error));
        }
        await new Promise((wake) => setTimeout(wake, 2000));
      }
    })();
    return () => control.abort();
  }, []);
  const now = history[history.length - 1];
  if (!now) return <div class="view"><Problem text={problem} /><p>Waiting for the engine.</p></div>;
  const recent = history.slice(-WINDOW);
  const seconds = total(recent, (each) => each.seconds);
  const steps = total(recent, (each) => each.steps);
  const queried = total(recent, (each) => each.prefix_queried_tokens);
  const tokens = merged(recent, (each) => each.tokens);
  const chosen = merged(recent, (each) => each.chosen);
  const picks = Object.values(chosen).reduce((sum, count) => sum + count, 0);
  const phases = Object.entries(merged(recent, (each) => each.phases));
  return (
    <div class="view">
      <Problem text={problem} />
      <dl class="figures">
        <Figure name="Engine" value={now.state} />
        <Figure name="Running" value={`${now.running} of ${now.max_num_seqs}`} />
        <Figure name="Waiting" value={now.waiting} />
        <Figure name="Tokens/s" value={(total(recent.slice(-4), (each) => each.generated_tokens) / total(recent.slice(-4), (each) => each.seconds)).toFixed(1)} />
        <Figure name="Prompt tokens/s" value={(total(recent, (each) => each.prompt_tokens) / seconds).toFixed(1)} />
        <Figure name="Rows per step" value={steps ? (total(recent, (each) => each.rows) / steps).toFixed(1) : "-"} />
        <Figure name="Prefix hits" value={queried ? percent(total(recent, (each) => each.prefix_hit_tokens) / queried) : "-"} />
        <Figure name="Preemptions" value={total(recent, (each) => each.preemptions)} />
      </dl>
      {info.grafana_url && <p><a href={info.grafana_url} target="_blank" rel="noopener noreferrer">History in Grafana</a></p>}
      <h2>Tokens per second</h2>
      <Line values={history.map((each) => each.generated_tokens / each.seconds)} />
      <h2>KV cache</h2>
      <p>
        <Bar parts={[[now.blocks_used / now.blocks_total, "hue1"], [now.blocks_cached / now.blocks_total, "hue2"]]} />
        {now.blocks_used} blocks used, {now.blocks_cached} kept for prefixes, of {now.blocks_total}
      </p>
      <h2>The controller</h2>
      <p>
        {now.predicted_goodput > 0
          ? `It expects ${now.predicted_goodput.toFixed(1)} tokens/s of its choice, ${now.predicted_plain_goodput.toFixed(1)} of plain decoding.`
          : "It has nothing to choose now."}
      </p>
      <table>
        <caption>By drafter, in the last {seconds.toFixed(0)} s</caption>
        <thead><tr><th scope="col">drafter</th><th scope="col">chosen</th><th scope="col">tokens/s</th><th scope="col">accepted by position</th></tr></thead>
        <tbody>
          {Object.keys(tokens).map((name) => (
            <tr key={name}>
              <th scope="row"><span class={`swatch ${name === "none" ? "own" : hue(name)}`} /> {name === "none" ? "none (plain)" : name}</th>
              <td>{picks ? percent((chosen[name] ?? 0) / picks) : "-"}</td>
              <td>{(tokens[name] / seconds).toFixed(1)}</td>
              <td>{acceptance(recent, name)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <h2>Time of a step</h2>
      <p>{steps ? phases.map(([name, spent]) => `${name} ${((1000 * spent) / steps).toFixed(2)} ms`).join(", ") : "No steps in this time."}</p>
    </div>
  );
}

function Figure({ name, value }: { name: string; value: string | number }) {
  return <div><dt>{name}</dt><dd>{value}</dd></div>;
}

function Line({ values }: { values: number[] }) {
  const top = Math.max(1, ...values);
  const points = values.map((value, i) => `${(100 * (KEPT - values.length + i)) / (KEPT - 1)},${30 - (29 * value) / top}`);
  return (
    <figure>
      <svg class="chart" viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label={`Tokens per second in the last minute, up to ${top.toFixed(0)}`}>
        <polyline points={points.join(" ")} />
      </svg>
      <figcaption>the last minute; the top is {top.toFixed(0)}</figcaption>
    </figure>
  );
}

function acceptance(recent: Live[], name: string): string {
  const sums = (pick: (each: Live) => Record<string, number[]>) => {
    const found: number[] = [];
    for (const each of recent) (pick(each)[name] ?? []).forEach((count, i) => (found[i] = (found[i] ?? 0) + count));
    return found;
  };
  const accepted = sums((each) => each.accepted_at);
  return sums((each) => each.drafted_at).slice(0, 8).map((count, i) => percent((accepted[i] ?? 0) / count)).join(", ") || "-";
}

function total(all: Live[], pick: (each: Live) => number): number {
  return all.reduce((sum, each) => sum + pick(each), 0);
}

function merged(all: Live[], pick: (each: Live) => Record<string, number>): Record<string, number> {
  const found: Record<string, number> = {};
  for (const each of all) for (const [name, count] of Object.entries(pick(each))) found[name] = (found[name] ?? 0) + count;
  return found;
}

function percent(share: number): string {
  return `${Math.round(100 * share)} %`;
}
