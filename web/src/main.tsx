// The page: its views, the state of the server, and the API key, which is asked for once.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { call, onKeyNeeded, setKey, type Info } from "./api";
import { Chat } from "./chat";
import { Engine } from "./engine";
import { messageOf, Problem } from "./parts";
import { Race } from "./race";
import { Requests } from "./requests";
import "./style.css";

const VIEWS = ["Chat", "Race", "Engine", "Requests"] as const;
type View = (typeof VIEWS)[number];

function viewOf(hash: string): View {
  return VIEWS.find((name) => `#${name.toLowerCase()}` === hash) ?? "Chat";
}

function Page() {
  const [view, setView] = useState(viewOf(location.hash));
  const [info, setInfo] = useState<Info | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const [needed, setNeeded] = useState(false);
  const [tries, setTries] = useState(0);

  useEffect(() => {
    const turn = () => setView(viewOf(location.hash));
    addEventListener("hashchange", turn);
    const off = onKeyNeeded(() => setNeeded(true));
    return () => {
      removeEventListener("hashchange", turn);
      off();
    };
  }, []);
  useEffect(() => {
    let timer = 0;
    const load = async () => {
      try {
        const found: Info = await (await call("/page/info")).json();
        setInfo(found.state === "ready" ? found : null);
        setProblem(found.state === "ready" ? null : `The engine is ${found.state}.`);
        if (found.state === "starting") timer = window.setTimeout(load, 1000);
      } catch (error) {
        setProblem(messageOf(error));
      }
    };
    void load();
    return () => clearTimeout(timer);
  }, [tries]);

  return (
    <>
      <header>
        <h1>Pilotfish</h1>
        <nav aria-label="Views">
          {VIEWS.map((name) => (
            <a key={name} href={`#${name.toLowerCase()}`} aria-current={name === view ? "page" : undefined}>{name}</a>
          ))}
        </nav>
        <span class="model">{info ? `${info.models[0]}, ${info.version}` : ""}</span>
      </header>
      {needed && (
        <form
          class="key"
          onSubmit={(event) => {
            event.preventDefault();
            setKey(String(new FormData(event.currentTarget).get("key")).trim());
            setNeeded(false);
            setProblem(null);
            setTries(tries + 1);
          }}
        >
          <label>
            API key (kept in this browser)
            <input name="key" type="password" autocomplete="off" required autofocus />
          </label>
          <button type="submit" class="primary">Use it</button>
        </form>
      )}
      <main tabIndex={view === "Chat" ? undefined : 0}>
        <Problem text={problem} />
        {problem && !needed && <button type="button" onClick={() => setTries(tries + 1)}>Try again</button>}
        {info && view === "Chat" && <Chat info={info} />}
        {info && view === "Race" && <Race info={info} />}
        {info && view === "Engine" && <Engine info={info} />}
        {info && view === "Requests" && <Requests />}
      </main>
    </>
  );
}

render(<Page />, document.getElementById("page")!);
