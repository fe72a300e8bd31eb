// Race: the same prompt and seed with several drafters; the texts must be the same.
import { useEffect, useRef, useState } from "preact/hooks";
import { added, newAnswer, type Answer } from "./answer";
import { chat, type Info } from "./api";
import { Coloured, Legend, messageOf, Problem, Speed } from "./parts";
import { useKept } from "./store";

export function Race({ info }: { info: Info }) {
  const lanes = ["off", "auto", ...info.drafters.filter((name) => name !== "prediction" && name !== "grammar")];
  const [form, setForm] = useKept("race", {
    prompt: "List the numbers from 1 to 40, separated by commas.", seed: "1", tokens: "128", temperature: "0",
    lanes: ["off", "auto"], together: false,
  });
  const chosen = lanes.filter((name) => form.lanes.includes(name));
  const [answers, setAnswers] = useState<Record<string, Answer>>({});
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState<string | null>(null);
  const stopping = useRef<AbortController | null>(null);
  useEffect(() => () => stopping.current?.abort(), []);

  async function lane(name: string, signal: AbortSignal) {
    const body = {
      model: info.models[0], messages: [{ role: "user", content: form.prompt }], seed: Number(form.seed),
      max_tokens: Number(form.tokens), temperature: Number(form.temperature), speculation: name,
      // Else a lane would copy the answer of the one before: from the prefix cache, and by suffix-memory.
      cache_salt: `race ${Date.now()} ${Math.random()}`,
    };
    let answer = newAnswer();
    for await (const piece of chat(body, signal)) {
      answer = added(answer, piece);
      setAnswers((old) => ({ ...old, [name]: answer }));
    }
  }

  async function run() {
    const { signal } = (stopping.current = new AbortController());
    setBusy(true);
    setProblem(null);
    setAnswers({});
    try {
      if (form.together) await Promise.all(chosen.map((name) => lane(name, signal)));
      else for (const name of chosen) await lane(name, signal);
    } catch (error) {
      stopping.current.abort();
      setProblem(messageOf(error));
    }
    setBusy(false);
  }

  const done = chosen.filter((name) => answers[name]?.finish);
  const texts = new Set(done.map((name) => answers[name].reasoning + "\0" + answers[name].content));
  const finished = !busy && done.length === chosen.length && done.length > 1;
  const plain = answers.off?.finish ? answers.off.rate : null;
  const field = (name: "seed" | "tokens" | "temperature", label: string) => (
    <label>
      {label}
      <input inputMode="decimal" value={form[name]} onInput={(event) => setForm({ ...form, [name]: event.currentTarget.value })} />
    </label>
  );
  return (
    <div class="view">
      <form onSubmit={(event) => { event.preventDefault(); void run(); }}>
        <label>
          Prompt
          <textarea rows={2} value={form.prompt} onInput={(event) => setForm({ ...form, prompt: event.currentTarget.value })} />
        </label>
        <div class="fields">
          {field("seed", "Seed")}
          {field("tokens", "Max tokens")}
          {field("temperature", "Temperature")}
        </div>
        <fieldset>
          <legend>Drafters</legend>
          {lanes.map((name) => (
            <label class="check" key={name}>
              <input
                type="checkbox"
                checked={chosen.includes(name)}
                onChange={(event) =>
                  setForm({ ...form, lanes: event.currentTarget.checked ? [...chosen, name] : chosen.filter((each) => each !== name) })
                }
              />
              {name}
            </label>
          ))}
        </fieldset>
        <label class="check">
          <input type="checkbox" checked={form.together} onChange={(event) => setForm({ ...form, together: event.currentTarget.checked })} />
          All at once (they share the machine)
        </label>
        {busy ? (
          <button type="button" onClick={() => stopping.current?.abort()}>Stop</button>
        ) : (
          <button type="submit" class="primary" disabled={chosen.length < 2 || !form.prompt.trim()}>Race</button>
        )}
      </form>
      <Problem text={problem} />
      <p role="status" class="verdict">
        {finished && (texts.size === 1 ? "✓ The texts are the same." : "✗ The texts differ.")}
      </p>
      <div class="lanes">
        {chosen.map((name) => {
          const answer = answers[name];
          return (
            <section key={name} aria-label={name}>
              <h2>
                {name}
                {answer?.finish && plain && answer.rate !== null && <small> {(answer.rate / plain).toFixed(2)}×</small>}
                {finished && texts.size === 1 && <small> ✓</small>}
              </h2>
              {answer && <Coloured spans={answer.spans} />}
              {answer && <Legend spans={answer.spans} />}
              {answer && <Speed answer={answer} />}
            </section>
          );
        })}
      </div>
    </div>
  );
}
