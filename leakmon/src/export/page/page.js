"use strict";

// Everything from a process is put into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
let token = null;
let latest = [];
let timer = null;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function ask(path) {
  const headers = token ? { Authorization: "Bearer " + token } : {};
  const answer = await fetch(path, { headers });
  if (answer.status === 401) {
    $("token").hidden = false;
    throw new Error("a bearer token is needed");
  }
  if (!answer.ok) throw new Error((await answer.text()).trim());
  $("token").hidden = true;
  return answer;
}

const number = new Intl.NumberFormat("en");
const show = (value) => (value === null || value === undefined ? "–" : number.format(value));

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return Math.floor(seconds) + "s";
  if (seconds < 3600) return Math.floor(seconds / 60) + "m";
  return Math.floor(seconds / 3600) + "h" + Math.floor((seconds % 3600) / 60) + "m";
}

function most(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a)) : null;
}

function live(process, name) {
  const runtime = process.runtimes.find((runtime) => runtime.name === name);
  return runtime ? runtime.live : null;
}

// Puts something new in the place of what was there. Whoever was in it by the keyboard stays where they were.
function replace(place, made) {
  const active = document.activeElement;
  const key = place.contains(active) ? active.dataset.key : undefined;
  place.replaceChildren(...made);
  if (key !== undefined) [...place.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key)?.focus();
}

function say(text) {
  // What stays the same is not announced again.
  if ($("summary").textContent !== text) $("summary").textContent = text;
}

function drawList() {
  const wanted = $("filter").value.toLowerCase();
  const rows = latest.filter((process) =>
    [process.name, process.user, process.command, String(process.pid)]
      .some((text) => text.toLowerCase().includes(wanted)));
  replace($("rows"), rows.map((process) => {
    const row = element("tr");
    const runtimes = process.runtimes;
    const link = element("a", process.pid);
    link.href = "#" + process.pid;
    link.dataset.key = process.pid;
    const pid = element("td");
    pid.append(link);
    const growth = most([...runtimes.map((r) => r.change_per_minute), process.threads_per_minute]);
    const deadlocks = runtimes.reduce((sum, r) => sum + r.deadlocks, 0);
    const looks = deadlocks ? "deadlock" : process.verdict ? process.verdict.kind : "";
    const verdict = element("td", looks, looks ? "mark" : "");
    if (process.not_read) verdict.append(element("span", process.not_read, "quiet"));
    row.append(pid, element("td", process.user), element("td", process.name, "long"),
      element("td", show(live(process, "go")), "number"),
      element("td", show(live(process, "tokio")), "number"),
      element("td", show(process.threads), "number"),
      element("td", show(runtimes.reduce((sum, r) => sum + r.blocked, 0)), "number"),
      element("td", duration(most(runtimes.map((r) => r.oldest_wait_seconds))), "number"),
      element("td", growth === null ? "–" : show(Math.round(growth)), "number"),
      verdict);
    return row;
  }));
}

async function readList() {
  const table = await (await ask("processes")).json();
  latest = table.processes;
  const suspects = latest.filter((process) => process.verdict).length;
  say(number.format(latest.length) + " processes, " +
    (suspects ? suspects + " with what looks like a leak" : "none with what looks like a leak"));
  drawList();
}

function line(points, key, top, className) {
  const from = points[0].time_unix_seconds;
  const span = Math.max(points[points.length - 1].time_unix_seconds - from, 1);
  const made = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  made.setAttribute("class", className);
  made.setAttribute("points", points.map((point) =>
    ((point.time_unix_seconds - from) / span * 1000).toFixed(1) + "," +
    (100 - point[key] / top * 95).toFixed(1)).join(" "));
  return made;
}

function drawPast(points) {
  const top = Math.max(1, ...points.map((point) => Math.max(point.tasks, point.threads)));
  const last = points[points.length - 1];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 1000 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "from " + points[0].tasks + " to " + last.tasks + " tasks");
  svg.append(line(points, "threads", top, "threads"), line(points, "tasks", top, "tasks"));
  $("past").replaceChildren(svg, element("p",
    "tasks " + show(points[0].tasks) + " → " + show(last.tasks) +
    ", threads " + show(points[0].threads) + " → " + show(last.threads), "quiet"));
}

function frame(place) {
  if (!place) return "–";
  const file = place.file.split("/").slice(-2).join("/");
  return place.function + (file ? "  " + file + (place.line ? ":" + place.line : "") : "");
}

function drawRuntime(runtime) {
  const made = [element("h3", runtime.runtime.name + " " + (runtime.runtime.version || ""))];
  if (runtime.refusal) return [...made, element("p", runtime.refusal, "mark")];
  const tasks = runtime.tasks;
  made.push(element("p", show(tasks.live) + " live: " + Object.entries(tasks.by_state)
    .map(([state, count]) => show(count) + " " + state).join(", "), "quiet"));
  for (const warning of runtime.warnings || []) made.push(element("p", warning, "mark"));
  const table = element("table");
  const head = element("tr");
  for (const [text, className] of [["Live", "number"], ["Blocked", "number"], ["Oldest", "number"],
    ["Site", ""], ["Waits for", ""], ["Looks like", ""]]) {
    const cell = element("th", text, className);
    cell.scope = "col";
    head.append(cell);
  }
  const top = element("thead");
  top.append(head);
  const body = element("tbody");
  for (const site of runtime.sites.slice(0, 50)) {
    const row = element("tr");
    const wait = site.waits[0];
    row.append(element("td", show(site.live), "number"), element("td", show(site.blocked), "number"),
      element("td", duration(site.oldest_wait_seconds), "number"),
      element("td", frame(site.created_by || site.entry), "long"),
      element("td", wait ? wait.reason + (wait.place ? " at " + frame(wait.place) : "") : "–", "long"),
      element("td", site.verdict ? site.verdict.sentence : "", site.verdict ? "mark long" : ""));
    body.append(row);
  }
  table.append(top, body);
  const scroll = element("div", null, "scroll");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Sites of " + runtime.runtime.name);
  scroll.dataset.key = runtime.runtime.name;
  scroll.append(table);
  made.push(scroll);
  return made;
}

async function readOne(pid) {
  const process = latest.find((process) => process.pid === pid);
  if (!process) throw new Error("pid " + pid + ": no such process is watched");
  $("one-title").textContent = process.name + ", pid " + pid;
  $("one-facts").textContent = [process.user, process.cgroup, process.command, process.not_read]
    .filter(Boolean).join(" · ");
  drawPast(await (await ask("processes/" + pid + "/past")).json());
  const names = process.runtimes.map((runtime) => runtime.name);
  if (!names.includes("threads")) names.push("threads");
  if ($("runtime").childElementCount !== names.length) {
    $("runtime").replaceChildren(...names.map((name) => {
      const option = element("option", name);
      option.value = name;
      return option;
    }));
  }
  if (process.runtimes.length) {
    const report = await (await ask("processes/" + pid)).json();
    replace($("runtimes"), report.runtimes.flatMap(drawRuntime));
  } else {
    $("runtimes").replaceChildren();
  }
}

function chosen() {
  const pid = Number(location.hash.slice(1));
  return Number.isInteger(pid) && pid > 0 ? pid : null;
}

async function refresh() {
  clearTimeout(timer);
  try {
    await readList();
    const pid = chosen();
    $("list").hidden = pid !== null;
    $("one").hidden = pid === null;
    if (pid !== null) await readOne(pid);
  } catch (error) {
    say(error.message);
  }
  timer = setTimeout(refresh, 5000);
}

window.addEventListener("hashchange", async (event) => {
  $("stacks").hidden = true;
  $("runtime").replaceChildren();
  await refresh();
  if (chosen() !== null) {
    $("one-title").focus();
    return;
  }
  const before = new URL(event.oldURL).hash.slice(1);
  ([...$("rows").querySelectorAll("a")].find((link) => link.dataset.key === before) || $("filter")).focus();
});
$("filter").addEventListener("input", drawList);
$("token").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").querySelector("input").value;
  refresh();
});
$("dump").addEventListener("click", async () => {
  const query = new URLSearchParams({ runtime: $("runtime").value, format: $("format").value });
  $("stacks").hidden = false;
  $("stacks").textContent = "…";
  try {
    $("stacks").textContent = await (await ask("processes/" + chosen() + "/stacks?" + query)).text();
  } catch (error) {
    $("stacks").textContent = error.message;
  }
});
// Where a token is needed the form is shown from the start, and nothing asked for without it.
if ($("token").hidden) refresh();
else $("summary").textContent = "A bearer token is needed";
