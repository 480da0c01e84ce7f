// What the page does by itself: it looks again while it is seen, and sends changes to the API.
"use strict";

const byId = (id) => document.getElementById(id);

// Show a message for a while; screen readers hear it too. `link` leads on from it.
function say(text, link, seconds = 6) {
  const box = byId("message");
  byId("heard").textContent = text;
  box.textContent = text;
  if (link) {
    const anchor = document.createElement("a");
    anchor.href = link.href;
    anchor.textContent = link.text;
    box.append(" ", anchor);
  }
  box.hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { box.hidden = true; }, (link ? 20 : seconds) * 1000);
}

function signIn() {
  say("Your session has ended.", { href: `/login?next=${encodeURIComponent(location.pathname + location.search)}`, text: "Sign in" });
}

// --- looking again ---------------------------------------------------------------------------------------------------

// Make `old` like `fresh` and touch only what differs, so that focus, selection, scrolling and what is open stay.
function morph(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value && !(name === "tabindex" && old === document.activeElement)) old.setAttribute(name, value);
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  const low = old.id === "log" && old.scrollHeight - old.scrollTop - old.clientHeight < 40;
  const wanted = [...fresh.childNodes];
  const ids = new Set(wanted.map((node) => node.id).filter(Boolean));
  for (const child of [...old.childNodes]) if (child.id && !ids.has(child.id)) child.remove();
  let place = old.firstChild;
  for (const node of wanted) {
    const known = node.id ? [...old.children].find((child) => child.id === node.id) : place;
    if (!known || (!node.id && known.id)) {
      old.insertBefore(node, place);
    } else {
      if (known !== place) old.insertBefore(known, place);
      place = known.nextSibling;
      morph(known, node);
    }
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
  if (low) old.scrollTop = old.scrollHeight;
}

let timer;
let looking;

function soon() {
  clearTimeout(timer);
  const seconds = Number(document.body.dataset.every);
  if (seconds && !document.hidden) timer = setTimeout(() => look(false), seconds * 1000);
}

// `anew` makes the server read again: for after a change.
async function look(anew) {
  clearTimeout(timer);
  if (looking && !anew) return;
  const mine = looking = new AbortController();
  const late = setTimeout(() => mine.abort(), 15000);
  try {
    const answer = await fetch(location.pathname + location.search, {
      headers: { "X-Requested-With": "page" }, cache: anew ? "reload" : "no-store", redirect: "manual", signal: mine.signal,
    });
    if (answer.type === "opaqueredirect" || answer.status === 401) {
      signIn();
      return;
    }
    const text = await answer.text();
    // a look that a change overtook shows what was before
    if (mine !== looking) return;
    if (answer.ok) show(new DOMParser().parseFromString(text, "text/html"));
    else stale(answer.status === 404 ? "This is not there any more." : undefined);
  } catch {
    if (mine === looking) stale();
  } finally {
    clearTimeout(late);
    if (mine === looking) {
      looking = undefined;
      soon();
    }
  }
}

function show(fresh) {
  const before = new Map([...document.querySelectorAll("[data-heard]")].map((one, place) => [place, one.textContent]));
  for (const part of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(part.id);
    if (now) morph(part, document.importNode(now, true));
  }
  document.title = fresh.title;
  document.body.dataset.every = fresh.body.dataset.every;
  const heard = [...document.querySelectorAll("[data-heard]")].map((one, place) => (one.textContent === before.get(place) ? "" : one.textContent.trim()));
  if (heard.some(Boolean)) byId("heard").textContent = heard.join(" ");
}

function stale(text = "The platform does not answer; this is what was seen last.") {
  byId("stamp").textContent = text;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (Number(document.body.dataset.every)) look(false);
});

// --- changes ---------------------------------------------------------------------------------------------------------

// Send a change to the API; returns its answer, or throws an Error whose message is for the reader.
async function send(method, url, body) {
  let answer;
  try {
    answer = await fetch(url, {
      method,
      headers: {
        "Accept": "application/json",
        "Content-Type": "application/json",
        "X-CSRFToken": document.querySelector("meta[name=csrf-token]").content,
        "X-Requested-With": "page",
      },
      body: JSON.stringify(body),
      redirect: "manual",
    });
  } catch {
    throw new Error("The platform does not answer; nothing was changed as far as this page knows.");
  }
  if (answer.status === 401 || answer.type === "opaqueredirect") {
    signIn();
    throw new Error("Your session has ended; sign in again.");
  }
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.detail || said.title || `The change was refused (${answer.status}).`);
  return said;
}

function agreed(question) {
  const dialog = byId("confirm");
  byId("confirm-text").textContent = question;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

async function change(button) {
  const { change: url, method, body, ask, done } = button.dataset;
  if (ask && !(await agreed(ask))) return;
  button.setAttribute("aria-busy", "true");
  try {
    await send(method, url, JSON.parse(body));
    say(done || "Done");
    await look(true);
  } catch (error) {
    say(error.message, undefined, 20);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function openDialog(button) {
  const dialog = byId(button.dataset.dialog);
  const form = dialog.querySelector("form");
  if (form.dataset.dag !== button.dataset.dag) form.reset();
  form.dataset.dag = button.dataset.dag;
  dialog.querySelector("[data-fill=dag]").textContent = button.dataset.dag;
  byId("trigger-paused").hidden = !button.dataset.paused;
  wrong("");
  dialog.showModal();
  form.elements.conf.focus();
}

function wrong(text) {
  byId("trigger-error").textContent = text;
  byId("trigger-conf").setAttribute("aria-invalid", String(Boolean(text)));
  return !text;
}

function parsed(text) {
  let conf;
  try {
    conf = JSON.parse(text.trim() || "{}");
  } catch (error) {
    throw new Error(`This is no JSON: ${error.message}`);
  }
  if (conf === null || typeof conf !== "object" || Array.isArray(conf)) throw new Error("The configuration must be a JSON object, such as {\"trial\": \"simulated\"}.");
  return conf;
}

const forms = {
  async trigger(form) {
    const { conf, logical_date: date, note } = form.elements;
    const dag = form.dataset.dag;
    const submit = form.querySelector("[type=submit]");
    submit.disabled = true;
    try {
      const body = { conf: parsed(conf.value) };
      if (date.validity.badInput) throw new Error("The logical date is not complete.");
      if (date.value) body.logical_date = `${date.value}Z`;
      if (note.value) body.note = note.value;
      const run = await send("POST", `/api/v1/dags/${encodeURIComponent(dag)}/dagRuns`, body);
      wrong("");
      form.closest("dialog").close();
      form.reset();
      say(`${dag} is triggered.`, {
        href: `/runs/${encodeURIComponent(dag)}/${encodeURIComponent(run.dag_run_id)}`, text: "Show the run",
      });
      await look(true);
    } catch (error) {
      wrong(error.message);
      conf.focus();
    } finally {
      submit.disabled = false;
    }
  },
  async note(form) {
    try {
      await send("PATCH", form.dataset.url, { note: form.elements.note.value });
      say("The note is saved.");
      await look(true);
    } catch (error) {
      say(error.message, undefined, 20);
    }
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.disabled) return;
  if (button.dataset.change && !button.hasAttribute("aria-busy")) change(button);
  else if (button.dataset.dialog) openDialog(button);
  else if ("close" in button.dataset) button.closest("dialog").close();
});

document.addEventListener("submit", (event) => {
  const act = forms[event.target.dataset.form];
  if (!act) return;
  event.preventDefault();
  act(event.target);
});

// Bars and nodes of the graph are one stop of the tabulator; arrow keys move inside.
document.addEventListener("keydown", (event) => {
  const group = event.target.closest("[data-arrows]");
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!group || (!step && event.key !== "Home" && event.key !== "End")) return;
  const links = [...group.querySelectorAll("a")];
  const here = links.indexOf(event.target.closest("a"));
  const next = event.key === "Home" ? 0 : event.key === "End" ? links.length - 1 : Math.min(links.length - 1, Math.max(0, here + step));
  event.preventDefault();
  links[next].focus();
});

byId("log")?.scrollTo(0, byId("log").scrollHeight);
soon();
