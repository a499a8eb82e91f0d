// The page of `flowcache serve`: makes videos, and shows one of them and the engine while it is made.
// Text of others is only ever set as text. Requests carry the key, if there is one, so no plain links are used.

import { play } from "./player.js";
import { drawKept, drawMap } from "./map.js";

const at = (id) => document.getElementById(id);
const EXAMPLES = ["a red circle moving right", "a blue cross moving up", "a green triangle standing still"];
const WORDS = {
  queued: "waits for a gang", in_progress: "is being made", completed: "is finished", failed: "has failed", cancelled: "was cancelled",
};
const UNFINISHED = ["queued", "in_progress"];

let chunkFrames = 24;
let watched = null; // what is shown: id, AbortController, video, rows, made

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) at("key").hidden = false;
  let message = `the service answers with ${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* no words came with it */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

function showError(error, where = "error") {
  if (error.name === "AbortError") return;
  at(where).textContent = error instanceof TypeError ? "The service does not answer." : error.message;
}

const clearError = () => { at("error").textContent = ""; };

// ---- making

function useExample(event) {
  at("prompt").value = event.target.textContent;
  at("prompt").focus();
}

async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

async function send(path, body) {
  clearError();
  try {
    watch(await post(path, body));
    await showQueue();
  } catch (error) { showError(error); }
}

async function changePrompt(event) {
  event.preventDefault();
  at("change-error").textContent = "";
  const mine = watched;
  try {
    await post(`v1/videos/${mine.id}/prompt`, { prompt: at("new-prompt").value });
    if (mine === watched) at("new-prompt").value = "";
  } catch (error) {
    if (mine === watched) showError(error, "change-error");
  }
}

function make(event) {
  event.preventDefault();
  const form = new FormData(at("make"));
  const [seconds, seed] = ["seconds", "seed"].map((name) => Number(form.get(name)));
  return send("v1/videos", { prompt: form.get("prompt"), seconds, seed });
}

function makeLonger() { // by what the form says
  if (!at("make").reportValidity()) return null;
  const form = new FormData(at("make"));
  const body = { video: { id: watched.id }, prompt: form.get("prompt"), seconds: Number(form.get("seconds")) };
  return send("v1/videos/extensions", body);
}

// ---- the list

async function showQueue() {
  const { data } = await (await ask("v1/videos?limit=50")).json();
  const list = at("queue");
  const before = new Map([...list.children].map((item) => [item.dataset.id, item]));
  list.replaceChildren(...data.map((video) => row(video, before.get(video.id))));
  at("nothing").hidden = data.length > 0;
  return data;
}

function row(video, item) {
  if (!item) {
    item = document.createElement("li");
    item.dataset.id = video.id;
    const button = document.createElement("button");
    button.type = "button";
    button.append(document.createElement("span"), document.createElement("span"));
    button.lastChild.className = "meta";
    item.append(button);
  }
  const [title, meta] = item.firstChild.children;
  item.firstChild.onclick = () => watch(video);
  item.firstChild.setAttribute("aria-current", String(watched?.id === video.id));
  title.textContent = video.prompt;
  const percent = video.status === "in_progress" ? `, ${video.progress} %` : "";
  meta.textContent = `${video.seconds} s, ${video.size}, ${WORDS[video.status]}${percent}`;
  return item;
}

// ---- watching

async function watch(video) {
  if (watched?.id === video.id && !watched.over) return;
  watched?.stop.abort();
  watched = { id: video.id, stop: new AbortController(), rows: [], kept: [], made: [], over: false, status: null };
  const mine = watched;
  history.replaceState(null, "", `#${video.id}`);
  clearError();
  at("change-error").textContent = at("new-prompt").value = "";
  at("panes").hidden = false;
  at("video").removeAttribute("src");
  showVideo(video);
  redraw();
  for (const item of at("queue").children) item.firstChild.setAttribute("aria-current", String(item.dataset.id === video.id));
  const url = `v1/videos/${video.id}`;
  if (video.status !== "failed" && video.status !== "cancelled") {
    play(at("video"), () => ask(`${url}/stream`, { signal: mine.stop.signal })).catch(showError);
  }
  while (!mine.over && mine === watched) {
    try {
      await follow(mine, await ask(`${url}/events`, { signal: mine.stop.signal }));
    } catch (error) {
      if (error.name === "AbortError" || error.status) { showError(error); return; }
      at("status").textContent = "The service does not answer. It is asked again.";
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

async function follow(mine, answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done || mine !== watched) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const found = /^event: (\w+)\ndata: (.*)$/.exec(block);
      if (found) HANDLERS[found[1]]?.(JSON.parse(found[2]));
    }
    redraw();
  }
}

const HANDLERS = {
  video: showVideo,
  gangs: showGangs,
  snapshot(all) {
    watched.rows = all.rows.slice(all.first).map((text) => [...text]);
    Object.assign(watched, { first: all.first, kept: all.kept });
    showFigures(all);
  },
  news(one) {
    for (const [chunk, step, mark] of one.cells ?? []) watched.rows[chunk - watched.first][step] = mark;
    if (one.kept) watched.kept = one.kept;
    showFigures(one);
  },
  chunks(stored) {
    watched.made.push([performance.now(), stored]);
    showFigures({});
  },
};

function showVideo(video) {
  const unfinished = UNFINISHED.includes(video.status);
  at("watch-title").textContent = video.prompt;
  at("cancel").textContent = unfinished ? "Cancel" : "Delete";
  at("download").disabled = video.status !== "completed";
  at("longer").hidden = !video.continues;
  at("change").hidden = !unfinished;
  showPrompts(video.prompts);
  watched.over = !unfinished;
  watched.seconds = Number(video.seconds);
  const percent = Math.floor(video.progress / 25) * 25; // so that it is not read out all the time
  const text = `The video ${WORDS[video.status]}${video.status === "in_progress" ? `, ${percent} % and more` : ""}`
    + `${video.restarts ? `; a gang was lost ${video.restarts} times` : ""}${video.error ? `: ${video.error.message}` : ""}.`;
  if (at("status").textContent !== text) at("status").textContent = text;
}

function showPrompts(prompts) {
  const texts = prompts.map(({ seconds, prompt }) => `From second ${seconds} on: ${prompt}`);
  at("parts").hidden = texts.length < 2;
  if (at("prompts").dataset.shown === JSON.stringify(texts)) return; // so that it is read out once
  at("prompts").dataset.shown = JSON.stringify(texts);
  at("prompts").replaceChildren(...texts.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

function showFigures({ kv_fill: fill }) {
  if (fill !== undefined) {
    at("fill").value = fill;
    at("fill-text").textContent = `${Math.round(100 * fill)} %`;
  }
  const cells = watched.rows.flat();
  const [computed, reused] = ["c", "rx"].map((marks) => cells.filter((mark) => marks.includes(mark)).length);
  at("computed").textContent = computed + reused ? `${Math.round((100 * computed) / (computed + reused))} %` : "-";
  const words = `${computed} steps computed, ${reused} reused, ${cells.length - computed - reused} not yet taken`;
  at("map").setAttribute("aria-label", words);
  const [first, last] = [watched.made[0], watched.made.at(-1)];
  if (watched.made.length > 1) {
    const frames = (last[1] - first[1]) * chunkFrames;
    at("rate").textContent = (frames / ((last[0] - first[0]) / 1000)).toFixed(1);
  }
}

function showGangs(gangs) {
  at("gangs").replaceChildren(...gangs.map(({ gang, state, attempt, ranks }) => {
    const item = document.createElement("li");
    const doing = ranks.map(({ rank, doing: what }) => `rank ${rank}: ${what || "waits"}`).join("; ");
    item.textContent = `${gang} is ${state}${attempt ? `, started again ${attempt} times` : ""}${doing ? `. ${doing}` : ""}`;
    return item;
  }));
}

function redraw() {
  drawMap(at("map"), watched.rows);
  drawKept(at("kept"), watched.kept);
}

// ---- what can be done with the video

async function remove() {
  clearError();
  const { id, over } = watched; // an event may say that it is cancelled before the answer does
  try {
    const answer = await (await ask(`v1/videos/${id}`, { method: "DELETE" })).json();
    if (watched?.id === id && (over || answer.status !== "cancelled")) {
      watched.stop.abort();
      watched = null;
      history.replaceState(null, "", "#");
      at("panes").hidden = true;
      at("watch-title").textContent = "Nothing is watched";
      at("status").textContent = "The video was deleted.";
    }
    await showQueue();
  } catch (error) { showError(error); }
}

async function download() {
  clearError();
  try {
    const content = await (await ask(`v1/videos/${watched.id}/content`)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = `${watched.id}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) { showError(error); }
}

// ---- from the start

async function begin() {
  const { data: [model] } = await (await ask("v1/models")).json();
  at("service").textContent = `${model.id}, ${model.size}, ${model.fps} frames per second`;
  chunkFrames = model.chunk_frames;
  at("make").elements.seconds.max = model.max_seconds;
  at("examples").replaceChildren(...(EXAMPLES).map((text) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: text, onclick: useExample });
    return button;
  }));
  const videos = await showQueue();
  const wanted = location.hash.slice(1);
  const found = videos.find((video) => video.id === wanted);
  if (found && !watched) watch(found);
}

at("make").addEventListener("submit", make);
at("change").addEventListener("submit", changePrompt);
at("cancel").addEventListener("click", remove);
at("download").addEventListener("click", download);
at("longer").addEventListener("click", makeLonger);
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("secret").value);
  at("key").hidden = true;
  clearError();
  begin().catch(showError);
});
addEventListener("resize", () => watched && redraw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => watched && redraw());
setInterval(() => showQueue().catch(() => {}), 2000);
begin().catch(showError);
