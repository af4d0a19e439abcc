"use strict";

// Everything that comes from the index is set as text or as a number: captions and paths are never read as HTML.

const byId = (id) => document.getElementById(id);

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) target.play().catch(() => {});
    else target.pause();
  }
});

function tell(message, failed = false) {
  byId("status").textContent = message;
  byId("status").classList.toggle("error", failed);
}

async function ask(address) {
  const response = await fetch(address);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || "the question was refused: " + response.status);
  return answer;
}

function still(hit) {
  const picture = document.createElement("img");
  picture.src = "/preview/" + hit.row;
  picture.alt = hit.caption || hit.id;
  picture.loading = "lazy";
  return picture;
}

// A muted video that repeats the clip's own stretch of the file; a still where the browser cannot play the file.
function moving(hit) {
  const video = document.createElement("video");
  const start = hit.start_seconds || 0;
  const end = hit.end_seconds === null ? Infinity : hit.end_seconds;
  video.muted = true;
  video.playsInline = true;
  video.loop = true;
  video.preload = "metadata";
  video.poster = "/preview/" + hit.row;
  video.addEventListener("loadedmetadata", () => { video.currentTime = start; });
  video.addEventListener("timeupdate", () => {
    if (video.currentTime < start - 0.05 || video.currentTime >= end) video.currentTime = start;
  });
  video.addEventListener("error", () => video.replaceWith(still(hit)), { once: true });
  video.src = "/media/" + hit.row;
  seen.observe(video);
  return video;
}

function times(hit) {
  if (hit.start_seconds === null && hit.end_seconds === null) return "";
  const end = hit.end_seconds === null ? "the end" : hit.end_seconds + " s";
  return ", " + (hit.start_seconds || 0) + " s to " + end;
}

function item(hit) {
  const node = byId("result").content.cloneNode(true);
  node.querySelector("li").dataset.id = hit.id;
  node.querySelector(".picture").append(hit.playable ? moving(hit) : still(hit));
  node.querySelector(".caption").textContent = hit.caption || "";
  node.querySelector(".where").textContent = hit.id + times(hit);
  node.querySelector(".where").title = hit.path;
  node.querySelector(".score").textContent = hit.rank + ". score " + hit.score.toFixed(4);
  node.querySelector(".similar").addEventListener("click", () => {
    show("/api/similar/" + hit.row, "Clips similar to " + hit.id);
  });
  return node;
}

async function show(address, title) {
  tell("Searching");
  try {
    const condition = byId("where").value.trim();
    const where = condition ? (address.includes("?") ? "&" : "?") + "where=" + encodeURIComponent(condition) : "";
    const { hits } = await ask(address + where);
    for (const video of document.querySelectorAll("video")) seen.unobserve(video);
    byId("results").replaceChildren(...hits.map(item));
    tell(title + ": " + hits.length + (hits.length === 1 ? " clip" : " clips"));
  } catch (error) {
    byId("results").replaceChildren();
    tell(error.message, true);
  }
}

function addFact(name, value) {
  const term = document.createElement("dt");
  const text = document.createElement("dd");
  term.textContent = name;
  text.textContent = value !== null && typeof value === "object" ? JSON.stringify(value) : String(value);
  byId("facts").append(term, text);
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = byId("query").value.trim();
  if (query) show("/api/search?q=" + encodeURIComponent(query), "Clips for \u201c" + query + "\u201d");
});

ask("/api/facts").then((facts) => {
  for (const [name, value] of Object.entries(facts)) addFact(name.replaceAll("_", " "), value);
  tell(facts.clips + " clips");
}).catch((error) => tell(error.message, true));
