// The page: one image, its findings, the labels they are judged by, and cases like it.

import { base64, get, post, Refusal, useKey } from "/page/api.js";
import { rendered } from "/page/card.js";
import { Cases } from "/page/cases.js";
import { Labels } from "/page/labels.js";
import { drawMap, element, showFacts, showFindings, showImageFacts, showProblem, status } from "/page/view.js";

const DELAY = 350;
const state = { models: null, data: null, frame: null, sent: null, seen: null, running: null, timer: null };
const labels = new Labels(() => soon());
const cases = new Cases(attempt, image);

// Runs a piece of work and shows what goes wrong with it; a missing key opens the form for one.
async function attempt(work) {
  try {
    showProblem(null);
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    status("");
    element("bars").classList.remove("stale");
    if (error instanceof Refusal && error.status === 401) {
      element("key-form").hidden = false;
      element("key").focus();
      if (state.models === null && !element("key").value) return undefined;
    }
    showProblem(error, () => attempt(work));
    if (error.message.includes("`frame`")) element("frame-line").hidden = element("image-tools").hidden = false;
    return undefined;
  }
}

async function start() {
  const [models, sets] = await Promise.all([get("/v1/models"), get("/v1/labelsets")]);
  state.models = models;
  element("key-form").hidden = true;
  element("model").textContent = `${models.model.name}, ${models.model.fingerprint.slice(0, 12)}`;
  element("card").replaceChildren(rendered(models.card));
  showFacts(element("hashes"), {
    Model: models.model.fingerprint.slice(0, 16), Weights: models.model.weights.slice(0, 16),
    Input: `${models.image_size} x ${models.image_size} pixels`, Version: models.version,
  });
  labels.fill(sets);
  await cases.start(models);
}

function image() {
  return { data: state.data, ...(state.frame === null ? {} : { frame: state.frame }) };
}

async function choose(file) {
  if (!file) return;
  const limit = state.models?.limits.max_body ?? Infinity;
  await attempt(async () => {
    if (file.size * 1.37 > limit) throw new Refusal(413, "The file is too large", `It may have ${Math.floor(limit / 1.37 / 2 ** 20)} MB.`, null);
    forget();
    state.data = await base64(file);
    state.sent = URL.createObjectURL(file);
    await classify();
    if (!element("cases").hidden && state.seen) await cases.similar();
  });
}

function forget() {
  state.running?.abort();
  if (state.sent) URL.revokeObjectURL(state.sent);
  Object.assign(state, { data: null, frame: null, sent: null, seen: null });
  for (const id of ["stage", "image-tools", "map", "map-tools", "frame-line", "flag", "domain-note"]) element(id).hidden = true;
  element("drop").classList.remove("full");
  element("drop").querySelector(".call").hidden = false;
  for (const id of ["facts", "bars"]) element(id).replaceChildren();
  element("took").textContent = "";
  element("meaning").textContent = "Findings appear here once there is an image.";
  cases.forget();
  element("similar").disabled = true;
  element("file").value = "";
}

function soon() {
  clearTimeout(state.timer);
  if (state.data) state.timer = setTimeout(() => attempt(classify), DELAY);
}

async function classify() {
  const asked = labels.body();
  if (!state.data) return;
  if (!asked) {
    element("bars").replaceChildren();
    element("meaning").textContent = "No label has a name yet.";
    return;
  }
  state.running?.abort();
  const running = (state.running = new AbortController());
  status("Asking the model ...");
  element("bars").classList.add("stale");
  const answer = await post("/v1/classify", { images: [image()], preview: true, ...asked }, running.signal);
  status("");
  const result = answer.results[0];
  state.seen = `data:image/png;base64,${result.preview}`;
  element("similar").disabled = false;
  hideMap();
  showImageFacts(result.image);
  showFindings(answer, state.models.can_explain, (name, button) => attempt(() => explain(name, button)));
  for (const id of ["stage", "image-tools"]) element(id).hidden = false;
  element("drop").querySelector(".call").hidden = true;
  element("drop").classList.add("full");
  element("view-sent").disabled = !["png", "jpg", "webp"].includes(result.image.format);
  if (element("view-sent").disabled) element("view-seen").checked = true;
  look();
}

function look() {
  const sent = element("view-sent").checked;
  element("picture").src = sent ? state.sent : state.seen;
  element("picture").alt = sent ? "The image as it was sent" : "The image as the model saw it";
  if (sent) hideMap();
}

function hideMap() {
  element("map").hidden = element("map-tools").hidden = true;
  for (const button of element("bars").querySelectorAll("[aria-pressed=true]")) button.setAttribute("aria-pressed", "false");
}

async function explain(name, button) {
  const again = button.getAttribute("aria-pressed") === "true";
  hideMap();
  if (again) return;
  status(`Drawing the map of ${name} ...`);
  const answer = await post("/v1/explain", { image: image(), ...labels.prompts(name) });
  element("map").src = await drawMap(answer.map);
  status("");
  element("view-seen").checked = true;
  look();
  button.setAttribute("aria-pressed", "true");
  element("map").hidden = element("map-tools").hidden = false;
  element("map-note").textContent = answer.highest > answer.lowest
    ? `The brighter, the more this part moved the score of ${name} (${answer.method}). It does not show what is ill.`
    : `The map is empty: no part of the image moved the score of ${name} more than another (${answer.method}).`;
}

element("file").addEventListener("change", (event) => choose(event.target.files[0]));
element("clear").addEventListener("click", () => {
  forget();
  showProblem(null);
  element("file").focus();
});
for (const id of ["view-sent", "view-seen"]) element(id).addEventListener("change", look);
element("frame").addEventListener("change", (event) => {
  state.frame = Math.max(0, Math.trunc(Number(event.target.value)));
  attempt(classify);
});
element("opacity").addEventListener("input", (event) => (element("map").style.opacity = event.target.value / 100));
element("dismiss").addEventListener("click", () => showProblem(null));
document.addEventListener("keydown", (event) => event.key === "Escape" && showProblem(null));
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(element("key").value.trim());
  attempt(start).then(() => (element("key").value = ""));
});

for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    element("drop").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget || element("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  choose(event.dataTransfer.files[0]);
});

attempt(start);
