// Chat: conversations, answers as they stream, and the settings of requests.
import { useEffect, useRef, useState } from "preact/hooks";
import { added, newAnswer, type Answer } from "./answer";
import { chat, watchPlain, type Info } from "./api";
import { Choice, Coloured, Legend, Markdown, messageOf, Problem, Speed, useFrames } from "./parts";
import { bodyOf, callsOf, DEFAULTS, newConversation, NUMBERS, useConversations, useKept, type Message, type Settings } from "./store";

export function drafterChoices(info: Info): [string, string][] {
  return [
    ["", `server's default (${info.default_drafter})`],
    ["auto", "auto: the controller picks"],
    ["off", "off: plain decoding"],
    ...info.drafters.map((name): [string, string] => [name, name]),
  ];
}

export function Chat({ info }: { info: Info }) {
  const { all, put, remove } = useConversations();
  const [settings, setSettings] = useKept<Settings>("settings", DEFAULTS);
  const [current, setCurrent] = useState(() => all[0] ?? newConversation());
  const [live, setLive] = useFrames<Answer | null>(null);
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState<string | null>(null);
  const [said, setSaid] = useState("");
  const [draft, setDraft] = useState("");
  const stopping = useRef<AbortController | null>(null);
  const box = useRef<HTMLTextAreaElement>(null);
  const log = useRef<HTMLDivElement>(null);

  useEffect(() => () => stopping.current?.abort(), []);
  useEffect(() => {
    const area = log.current;
    if (area && area.scrollHeight - area.scrollTop - area.clientHeight < 160) area.scrollTop = area.scrollHeight;
  });

  async function ask(messages: Message[]) {
    setProblem(null);
    let body: object;
    try {
      body = bodyOf(settings, info.models[0], messages);
    } catch (error) {
      return setProblem(messageOf(error));
    }
    const conversation = { ...current, messages, title: messages[0].content.slice(0, 60) };
    setCurrent(conversation);
    put(conversation);
    setBusy(true);
    setSaid("Answering");
    const control = (stopping.current = new AbortController());
    let answer = newAnswer();
    setLive(answer);
    const watching = new AbortController();
    let share: number | null = null;
    void watchPlain(watching.signal, (found) => (share = found));
    try {
      for await (const piece of chat(body, control.signal)) {
        answer = added(answer, piece);
        if (share !== null && answer.rate !== null) answer.plain = answer.rate * share;
        setLive(answer);
      }
      setSaid("The answer is complete.");
    } catch (error) {
      answer = { ...answer, error: messageOf(error) };
      setSaid(answer.error!);
      if (!answer.tokens) setProblem(answer.error!);
    }
    watching.abort();
    if (answer.tokens) {
      const done = { ...conversation, messages: [...messages, { role: "assistant" as const, content: answer.content, answer }] };
      setCurrent((now) => (now.id === done.id ? done : now)); // another may have been picked meanwhile
      put(done);
    }
    setLive(null);
    setBusy(false);
    box.current?.focus();
  }

  function send() {
    const text = draft.trim();
    if (!text || busy) return;
    setDraft("");
    void ask([...current.messages, { role: "user", content: text }]);
  }

  function pick(id: string) {
    stopping.current?.abort();
    setProblem(null);
    setCurrent(all.find((each) => each.id === id) ?? newConversation());
  }

  function edit(index: number) {
    setDraft(current.messages[index].content);
    setCurrent({ ...current, messages: current.messages.slice(0, index) });
    box.current?.focus();
  }

  const last = current.messages.length - 1;
  return (
    <div class="chat">
      <div class="bar">
        <Choice
          label="Conversation"
          value={all.some((each) => each.id === current.id) ? current.id : ""}
          options={[["", "New conversation"], ...all.map((each): [string, string] => [each.id, each.title])]}
          onPick={pick}
        />
        <button type="button" onClick={() => pick("")}>New</button>
        <button type="button" disabled={busy || !current.messages.length} onClick={() => { remove(current.id); setCurrent(newConversation()); }}>
          Delete
        </button>
        <Choice
          label="Drafter"
          value={settings.speculation}
          options={drafterChoices(info)}
          onPick={(speculation) => setSettings({ ...settings, speculation })}
        />
        <label class="check">
          <input
            type="checkbox"
            checked={settings.colours}
            onChange={(event) => setSettings({ ...settings, colours: event.currentTarget.checked })}
          />
          Colour tokens by drafter
        </label>
      </div>
      <SettingsBox info={info} settings={settings} set={setSettings} />
      <div class="log" role="log" aria-label="Conversation" tabIndex={0} ref={log} aria-live="off">
        {!current.messages.length && (
          <p class="empty">
            Ask something. The answer is the same with any drafter; its speed is not. Turn on the colours to see who proposed what.
          </p>
        )}
        {current.messages.map((message, i) => (
          <article key={i} class={message.role}>
            <h2>{message.role === "user" ? "You" : message.role === "tool" ? "Result" : info.models[0]}</h2>
            {message.answer ? <AnswerView answer={message.answer} colours={settings.colours} /> : <p class="said">{message.content}</p>}
            {!busy && (
              <div class="actions">
                {message.role === "user" && <button type="button" onClick={() => edit(i)}>Edit</button>}
                {message.role === "assistant" && i === last && (
                  <button type="button" onClick={() => void ask(current.messages.slice(0, i))}>Regenerate</button>
                )}
                {message.role !== "assistant" && i === last && (
                  <button type="button" onClick={() => void ask(current.messages)}>Try again</button>
                )}
                <button type="button" onClick={() => void navigator.clipboard?.writeText(message.content)}>Copy</button>
              </div>
            )}
            {!busy && i === last && message.answer && message.answer.calls.length > 0 && (
              <Results key={message.answer.began} answer={message.answer} send={(results) => void ask([...current.messages, ...results])} />
            )}
          </article>
        ))}
        {busy && live && (
          <article class="assistant" aria-busy="true">
            <h2>{info.models[0]}</h2>
            <AnswerView answer={live} colours={settings.colours} />
          </article>
        )}
      </div>
      <Problem text={problem} />
      <p class="hidden" role="status">{said}</p>
      <form class="ask" onSubmit={(event) => { event.preventDefault(); send(); }}>
        <label class="hidden" for="message">Message</label>
        <textarea
          id="message"
          ref={box}
          rows={2}
          value={draft}
          placeholder="Message (Enter sends, Shift+Enter breaks the line, Esc stops)"
          onInput={(event) => setDraft(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
              event.preventDefault();
              send();
            } else if (event.key === "Escape") stopping.current?.abort();
          }}
        />
        {busy ? (
          <button type="button" onClick={() => stopping.current?.abort()}>Stop</button>
        ) : (
          <button type="submit" class="primary" disabled={!draft.trim()}>Send</button>
        )}
      </form>
    </div>
  );
}

function AnswerView({ answer, colours }: { answer: Answer; colours: boolean }) {
  return (
    <>
      {answer.reasoning && (
        <details class="reasoning">
          <summary>Reasoning</summary>
          <p class="said">{answer.reasoning}</p>
        </details>
      )}
      {colours ? <Coloured spans={answer.spans} /> : <Markdown text={answer.content} />}
      {answer.calls.map((each, i) => (
        <div class="call" key={i}>
          <strong>{each.name}</strong>
          <pre tabIndex={0}>{each.arguments}</pre>
        </div>
      ))}
      {colours && answer.spans.length > 0 && <Legend spans={answer.spans} />}
      <Speed answer={answer} />
      <Problem text={answer.error} />
    </>
  );
}

// What the calls of the last answer returned, which the page cannot know.
function Results({ answer, send }: { answer: Answer; send: (results: Message[]) => void }) {
  const calls = callsOf(answer);
  const [texts, setTexts] = useState(() => calls.map(() => ""));
  return (
    <form
      class="results"
      onSubmit={(event) => {
        event.preventDefault();
        send(calls.map(({ id }, i) => ({ role: "tool", content: texts[i], call: id })));
      }}
    >
      {calls.map((each, i) => (
        <label key={each.id}>
          Result of {each.name}
          <textarea
            rows={2}
            value={texts[i]}
            onInput={(event) => setTexts(texts.map((old, j) => (j === i ? event.currentTarget.value : old)))}
          />
        </label>
      ))}
      <button type="submit" disabled={texts.some((text) => !text.trim())}>{calls.length > 1 ? "Give the results" : "Give the result"}</button>
    </form>
  );
}

const NAMES: Record<string, string> = {
  temperature: "Temperature", top_p: "Top p", top_k: "Top k", min_p: "Min p", presence_penalty: "Presence penalty",
  frequency_penalty: "Frequency penalty", repetition_penalty: "Repetition penalty", max_tokens: "Max tokens", seed: "Seed",
};

function SettingsBox({ info, settings, set }: { info: Info; settings: Settings; set: (value: Settings) => void }) {
  const text = (name: "system" | "stop" | "schema" | "tools", label: string, hint: string) => (
    <label>
      {label}
      <textarea
        rows={3}
        value={settings[name]}
        placeholder={hint}
        onInput={(event) => set({ ...settings, [name]: event.currentTarget.value })}
      />
    </label>
  );
  return (
    <details class="settings">
      <summary>Settings</summary>
      <div class="fields">
        {info.models.length > 1 && (
          <Choice label="Model" value={settings.model} options={info.models.map((name) => [name, name])} onPick={(model) => set({ ...settings, model })} />
        )}
        {NUMBERS.map((name) => (
          <label key={name}>
            {NAMES[name]}
            <input
              inputMode="decimal"
              value={settings[name]}
              placeholder={name === "seed" ? "random" : "default"}
              onInput={(event) => set({ ...settings, [name]: event.currentTarget.value })}
            />
          </label>
        ))}
      </div>
      <div class="texts">
        {text("system", "System prompt", "")}
        {text("stop", "Stop strings", "one per line")}
        {text("schema", "JSON schema of the answer", '{"type": "object", ...}')}
        {text("tools", "Tools, as in OpenAI's API", '[{"type": "function", ...}]')}
      </div>
      <button type="button" onClick={() => set({ ...DEFAULTS, colours: settings.colours })}>Reset</button>
    </details>
  );
}
