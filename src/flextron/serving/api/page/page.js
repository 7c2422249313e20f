"use strict";
// The page of `flextron serve`. Text of the model is only ever set as textContent.

const $ = (id) => document.getElementById(id);
const POLL_MS = 1000;
const SECONDS_SHOWN = 60;
const IDEAS = ["Why is the sky blue?", "Write a haiku about rivers.", "Explain what a budget is."];

const state = { levels: [], name: "", defaults: null, losses: null, columns: [], running: null, history: [] };

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** Width of a level from 0, the smallest, to 1, the full model. */
function width(index) {
  return state.levels.length > 1 ? index / (state.levels.length - 1) : 1;
}

function levelIndex(name) {
  return state.levels.findIndex((level) => level.name === name);
}

const ms = (value) => (value === null || value === undefined ? "–" : value < 10 ? value.toFixed(1) : value.toFixed(0));

// ---------------------------------------------------------------- columns

class Column {
  constructor() {
    this.element = $("column").content.firstElementChild.cloneNode(true);
    this.messages = this.element.querySelector(".messages");
    this.slider = this.element.querySelector(".slider");
    this.time = this.element.querySelector(".time");
    this.milliseconds = this.time.querySelector("input");
    this.kinds = [...this.element.querySelectorAll("[data-kind]")];
    this.kind = "auto";
    this.said = [];
    for (const button of this.kinds) button.addEventListener("click", () => this.choose(button.dataset.kind));
    this.slider.addEventListener("input", () => { if (this.kind === "auto") this.choose("share"); else this.show(); });
    this.milliseconds.addEventListener("input", () => this.show());
    this.clear();
  }

  setLevels() {
    const last = state.levels.length - 1;
    const timed = state.levels[last].step_ms !== null;
    this.slider.max = last;
    this.slider.value = last;
    const time = this.kinds.find((button) => button.dataset.kind === "time");
    time.disabled = !timed;
    time.title = timed ? "" : "This server's engine gives no times.";
    if (timed) this.milliseconds.value = state.levels[Math.floor(last / 2)].step_ms.toFixed(1);
    this.show();
  }

  choose(kind, level) {
    this.kind = kind;
    if (level !== undefined) this.slider.value = level;
    this.show();
  }

  show() {
    for (const button of this.kinds) button.setAttribute("aria-pressed", String(button.dataset.kind === this.kind));
    this.time.hidden = this.kind !== "time";
    this.slider.hidden = this.kind === "time";
    this.slider.classList.toggle("unused", this.kind === "auto");
    const readout = this.element.querySelector(".readout");
    readout.replaceChildren();
    if (!state.levels.length) return;
    if (this.kind === "auto") {
      const { budget, adaptive, floor } = state.defaults;
      readout.append(make("b", "", "auto"), ` · the server's default, ${budget}${adaptive ? `, down to ${floor} under load` : ""}`);
    } else if (this.kind === "time") {
      readout.append(make("b", "", `tpot=${this.milliseconds.value || "?"}ms`), " · the widest level that fits, narrowed under load");
    } else {
      const level = state.levels[Number(this.slider.value)];
      const loss = level.loss === null ? "" : ` · ${state.losses === "sensitivities" ? "+" : ""}${level.loss.toFixed(2)} nats predicted`;
      const time = level.step_ms === null ? "" : ` · ${ms(level.step_ms)} ms a token`;
      readout.append(make("b", "", level.name), ` · ${(100 * level.share).toFixed(0)}% of the cost${time}${loss}`);
      this.slider.setAttribute("aria-valuetext", level.name);
    }
  }

  budget() {
    if (this.kind === "auto") return {};
    if (this.kind === "time") return { budget: `tpot=${this.milliseconds.value}ms` };
    return { budget: state.levels[Number(this.slider.value)].name };
  }

  clear() {
    this.said = [];
    const empty = make("div", "empty");
    empty.append(make("strong", "", "One model, every budget"), "Choose how much of the model may compute, and see what each token got.");
    const chips = make("div", "chips");
    for (const idea of IDEAS) {
      const chip = make("button", "", idea);
      chip.type = "button";
      chip.addEventListener("click", () => { $("prompt").value = idea; submit(); });
      chips.append(chip);
    }
    empty.append(chips);
    this.messages.replaceChildren(empty);
  }

  add(element) {
    this.messages.querySelector(".empty")?.remove();
    const atEnd = this.messages.scrollHeight - this.messages.scrollTop - this.messages.clientHeight < 60;
    this.messages.append(element);
    if (atEnd) this.messages.scrollTop = this.messages.scrollHeight;
  }

  fail(message) {
    const box = make("p", "error", message);
    box.setAttribute("role", "alert");
    this.add(box);
  }

  /** Ask for an answer and show it as it comes. */
  async ask(text, signal) {
    this.add(make("div", "mine", text));
    this.said.push({ role: "user", content: text });
    const answer = new Answer(this);
    try {
      await answer.read(signal);
      this.said.push({ role: "assistant", content: answer.written });
    } catch (error) {
      if (error.name === "AbortError" && answer.written) this.said.push({ role: "assistant", content: answer.written });
      else this.said.pop();
      if (error.name !== "AbortError") this.fail(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    } finally {
      answer.end();
    }
  }
}

// ---------------------------------------------------------------- one answer

class Answer {
  constructor(column) {
    this.column = column;
    this.element = make("div", "answer");
    this.text = make("div", "text writing");
    this.measure = make("div", "measure");
    this.element.append(this.text, this.measure);
    this.written = "";
    this.counts = new Map();
    this.tokens = 0;
    this.begun = performance.now();
    this.first = this.last = null;
    column.add(this.element);
  }

  async read(signal) {
    const body = {
      model: state.name, messages: this.column.said, stream: true, flextron: { levels: true },
      temperature: Number($("temperature").value), max_tokens: Number($("tokens").value), ...this.column.budget(),
    };
    const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await complaint(response));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ") && event !== "data: [DONE]") this.take(JSON.parse(event.slice(6)));
    }
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const column = this.column.messages;
    const atEnd = column.scrollHeight - column.scrollTop - column.clientHeight < 60;
    for (const choice of chunk.choices) {
      const { texts, levels } = choice.flextron ?? { texts: [], levels: [] };
      texts.forEach((text, place) => this.token(text, levels[place]));
    }
    if (chunk.usage) this.usage = chunk.usage.flextron;
    this.show();
    if (atEnd) column.scrollTop = column.scrollHeight;
  }

  token(text, name) {
    const index = levelIndex(name);
    if (name !== null) {
      this.last = performance.now();
      this.first ??= this.last;
      this.tokens += 1;
      this.counts.set(index, (this.counts.get(index) ?? 0) + 1);
    }
    if (!text) return;
    this.written += text;
    const span = make("span", index < 0 ? "" : "token", text);
    if (index >= 0) {
      span.style.setProperty("--w", width(index));
      span.title = `${name}: ${(100 * state.levels[index].share).toFixed(0)}% of the model's cost`;
    }
    this.text.append(span);
  }

  show() {
    const first = this.usage?.ttft_ms ?? (this.first === null ? null : this.first - this.begun);
    const each = this.usage?.tpot_ms ?? (this.tokens > 1 ? (this.last - this.first) / (this.tokens - 1) : null);
    const mix = make("span", "mix");
    const used = [...this.counts].sort((one, other) => one[0] - other[0]);
    for (const [index, count] of used) {
      const part = make("i");
      part.style.setProperty("--w", width(index));
      part.style.flexGrow = count;
      mix.append(part);
    }
    const names = used.map(([index, count]) => `${state.levels[index]?.name ?? "?"} ×${count}`).join(", ");
    const met = Object.entries(this.usage?.met ?? {}).filter(([, kept]) => kept !== null).map(([name, kept]) => `${name} ${kept ? "kept" : "missed"}`);
    this.measure.replaceChildren(mix, make("span", "", names), make("span", "", `first token ${ms(first)} ms`), make("span", "", `${ms(each)} ms a token`), ...met.map((text) => make("span", "", text)));
  }

  end() {
    this.text.classList.remove("writing");
    if (!this.tokens && !this.written) this.element.remove();
  }
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

// ---------------------------------------------------------------- sending

async function submit() {
  const text = $("prompt").value.trim();
  if (!text || state.running || !state.levels.length) return;
  $("prompt").value = "";
  grow();
  state.running = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  await Promise.all(state.columns.map((column) => column.ask(text, state.running.signal)));
  state.running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("done").textContent = "The answer is complete.";
  $("prompt").focus();
}

function grow() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, 180)}px`;
}

/** Show one column or two; of two, one is at the smallest level and the other is the full model. */
function view(count) {
  state.running?.abort();
  $("view-one").setAttribute("aria-pressed", String(count === 1));
  $("view-two").setAttribute("aria-pressed", String(count === 2));
  state.columns = Array.from({ length: count }, () => new Column());
  $("columns").replaceChildren(...state.columns.map((column) => column.element));
  if (!state.levels.length) return;
  for (const column of state.columns) column.setLevels();
  if (count === 2) {
    state.columns[0].choose("share", Math.min(2, state.levels.length - 1));
    state.columns[1].choose("share", state.levels.length - 1);
  }
}

// ---------------------------------------------------------------- load

async function poll() {
  try {
    const response = await fetch("/v1/flextron/levels", { headers: headers() });
    if (!response.ok) throw new Error(response.status === 401 ? "needs the API key" : await complaint(response));
    const found = await response.json();
    if (found.model !== state.name || found.levels.length !== state.levels.length) meet(found);
    state.history.push({ at: performance.now(), ...found.stats });
    health("ok", "ready");
    glance(found.stats);
  } catch (error) {
    health("bad", error instanceof TypeError ? "not reached" : error.message);
  } finally {
    setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
  }
  const since = performance.now() - 1000 * SECONDS_SHOWN;
  state.history = state.history.filter((each) => each.at >= since - 2 * POLL_MS);
  draw();
}

/** Take over the levels of the server. */
function meet(found) {
  Object.assign(state, { levels: found.levels, name: found.model, defaults: found.default, losses: found.losses ?? null });
  $("model").textContent = found.model;
  $("least").textContent = found.levels[0].name;
  $("legend").replaceChildren(...found.levels.map((level, index) => {
    const part = make("i");
    part.style.setProperty("--w", width(index));
    return part;
  }));
  for (const column of state.columns) column.setLevels();
}

function health(kind, text) {
  const element = $("health");
  element.className = `health ${kind}`;
  if (element.textContent !== text) element.textContent = text;
}

function glance(stats) {
  const rows = {
    "running, waiting": `${stats.running}, ${stats.waiting}`,
    "cap": state.levels[stats.cap].name,
    "cache in use": `${(100 * stats.cache_used).toFixed(0)}%`,
    "predicted over measured": stats.steps ? stats.predicted_over_measured.toFixed(2) : "–",
  };
  $("stats").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
  $("plot").setAttribute("aria-label", `Over the last minute: ${stats.running} running, ${stats.waiting} waiting, cap ${state.levels[stats.cap].name}`);
}

function draw() {
  const canvas = $("plot");
  const scale = window.devicePixelRatio || 1;
  const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = wide * scale;
  canvas.height = high * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const [left, right, top, bottom] = [24, wide - 34, 8, high - 18];
  const now = performance.now();
  const most = Math.max(4, ...state.history.map((each) => Math.max(each.running, each.waiting)));
  const x = (at) => right - ((now - at) / (1000 * SECONDS_SHOWN)) * (right - left);
  const y = (value) => bottom - (value / most) * (bottom - top);
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = colour("--soft");
  pen.strokeStyle = colour("--line");
  for (const [value, level] of [[0, 0], [most, state.levels.length - 1]]) {
    pen.beginPath();
    pen.moveTo(left, y(value));
    pen.lineTo(right, y(value));
    pen.stroke();
    pen.textAlign = "right";
    pen.fillText(String(value), left - 6, y(value) + 4);
    pen.textAlign = "left";
    pen.fillText(state.levels[level]?.name ?? "", right + 5, y(value) + 4);
  }
  pen.fillText("60 s ago", left, high - 3);
  pen.textAlign = "right";
  pen.fillText("now", right, high - 3);
  pen.save();
  pen.beginPath();
  pen.rect(left, 0, right - left, high);
  pen.clip();
  const line = (value, stroke, wideness, dash) => {
    pen.beginPath();
    let before = null;
    for (const each of state.history) {
      if (before !== null) pen.lineTo(x(each.at), before);
      before = y(value(each));
      pen.lineTo(x(each.at), before);
    }
    if (before !== null) pen.lineTo(right, before);
    pen.strokeStyle = stroke;
    pen.lineWidth = wideness;
    pen.setLineDash(dash);
    pen.stroke();
    pen.setLineDash([]);
  };
  line((each) => each.running, colour("--accent"), 2.5, []);
  if (state.history.length) {
    pen.lineTo(right, bottom);
    pen.lineTo(x(state.history[0].at), bottom);
    pen.globalAlpha = 0.14;
    pen.fillStyle = colour("--accent");
    pen.fill();
    pen.globalAlpha = 1;
  }
  line((each) => each.waiting, colour("--soft"), 1.5, [4, 3]);
  line((each) => most * width(each.cap), colour("--narrow"), 2, []);
  pen.restore();
}

// ---------------------------------------------------------------- start

$("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", () => state.running?.abort());
$("clear").addEventListener("click", () => { state.running?.abort(); for (const column of state.columns) column.clear(); });
$("view-one").addEventListener("click", () => view(1));
$("view-two").addEventListener("click", () => view(2));
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  draw();
});
$("options").addEventListener("submit", (event) => event.preventDefault());
window.addEventListener("resize", draw);
$("key").value = sessionStorage.getItem("flextron key") ?? "";
$("key").addEventListener("change", () => sessionStorage.setItem("flextron key", $("key").value));
view(1);
poll();
