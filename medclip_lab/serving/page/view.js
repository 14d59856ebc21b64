// Draws what the service answers. Text goes in as text, never as HTML.

export const element = (id) => document.getElementById(id);

export const status = (text) => (element("status").textContent = text);

export function made(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export function showFacts(list, facts) {
  list.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [made("dt", "", name), made("dd", "", value)]));
}

// The service's sentences start small, as they follow a name elsewhere.
const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

// What went wrong; `again` does it once more where that may help.
export function showProblem(error, again) {
  const box = element("problem-text");
  element("problem").hidden = !error;
  if (!error) return box.replaceChildren();
  element("again").hidden = !([0, 408, 429].includes(error.status) || error.status >= 500);
  element("again").onclick = again;
  const parts = [made("strong", "", error.title ?? "Something went wrong"), document.createTextNode(`${sentence(error.message)} `)];
  if (error.id) parts.push(made("span", "", `request ${error.id}`));
  box.replaceChildren(...parts);
}

const MEANINGS = {
  softmax: "Which one of these labels fits best: shares of 1. Wrong for findings that occur together.",
  sigmoid: "Scores order images; they are no probabilities, as the bundle is not calibrated for these labels. Bars are relative to the longest.",
};
MEANINGS.pair_softmax = MEANINGS.sigmoid;

function number(value) {
  return value >= 0.0995 || value === 0 ? value.toFixed(3) : value.toPrecision(2);
}

export function showFindings(answer, canExplain, explain) {
  const result = answer.results[0];
  const calibrated = result.labels.some((label) => label.probability !== null);
  // Of a calibrated set, what has no probability has no place among those that have one.
  const apart = (label) => calibrated && label.probability === null;
  const absolute = calibrated || answer.score_type === "softmax";
  element("meaning").textContent = calibrated
    ? "Calibrated probabilities, from 0 to 1; the line is the threshold of each label's operating point."
    : MEANINGS[answer.score_type] ?? `Scores by ${answer.score_type}; they order images.`;
  const strange = result.out_of_domain?.flag;
  element("flag").hidden = !strange;
  element("flag").textContent = strange ? "This image is unlike those the model was calibrated with: nothing below holds." : "";
  const far = result.out_of_domain;
  element("domain-note").hidden = !far;
  element("domain-note").textContent = far ? `Distance from the images of the calibration: ${far.distance.toFixed(1)}; flagged above ${far.threshold.toFixed(1)}.` : "";
  const shown = (label) => label.probability ?? label.score;
  const longest = absolute ? 1 : Math.max(...result.labels.map((label) => Math.abs(shown(label))), 1e-12);
  const order = (a, b) => apart(a) - apart(b) || shown(b) - shown(a);
  const rows = [...result.labels].sort(order).map((label) => {
    const row = element("bar-template").content.firstElementChild.cloneNode(true);
    const name = row.querySelector(".name");
    name.textContent = label.label;
    name.disabled = !canExplain;
    name.setAttribute("aria-pressed", "false");
    if (canExplain) name.title = "Show where in the image this comes from";
    name.addEventListener("click", () => explain(label.label, name));
    if (apart(label)) {
      row.classList.add("apart");
      row.querySelector(".track").replaceWith(made("span", "reason", label.reason ?? "not calibrated"));
      row.querySelector(".value").textContent = number(label.score);
      return row;
    }
    row.querySelector(".fill").style.width = `${(100 * Math.max(shown(label), 0)) / longest}%`;
    row.querySelector(".value").textContent = number(shown(label));
    if (label.threshold != null) {
      const mark = row.querySelector(".mark");
      mark.hidden = false;
      mark.style.left = `calc(${100 * label.threshold}% - 1px)`;
      row.classList.toggle("present", label.decision === true);
      row.querySelector(".verdict").textContent = `${label.decision ? "Above" : "Below"} its threshold of ${number(label.threshold)}`;
    }
    return row;
  });
  const first = rows.findIndex((row) => row.classList.contains("apart"));
  if (first >= 0) rows.splice(first, 0, made("li", "between", "Not calibrated: these numbers are scores, and no probabilities"));
  element("bars").replaceChildren(...rows);
  element("bars").classList.remove("stale");
  const ms = answer.timings_ms;
  element("took").textContent = `${Math.round(ms.total)} ms in the service: decoding ${Math.round(ms.decode)}, waiting ${Math.round(ms.queue)}, model ${Math.round(ms.model)}.`;
}

export function showImageFacts(facts) {
  const windows = { file: "the file's own window", percentiles: "between percentiles of its values" };
  const told = { File: `${facts.format}, ${facts.width} x ${facts.height} pixels, ${facts.channels === 1 ? "grey" : "colour"}` };
  if (facts.frame !== null) told.Frame = facts.frame;
  if (facts.deep) {
    told.Window = windows[facts.window] ?? `center ${facts.window[0]}, width ${facts.window[1]}`;
    told.Inverted = facts.inverted ? "yes, low values are bright in the file" : "no";
  }
  told.Resized = `to ${facts.resized_to} x ${facts.resized_to} (${facts.resize_mode}, ${facts.interpolation})`;
  showFacts(element("facts"), told);
}

// Grey relevance becomes light of one colour, as bright as the map; nothing is laid over what is below its middle.
export async function drawMap(base64) {
  const image = new Image();
  image.src = `data:image/png;base64,${base64}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < pixels.data.length; at += 4) {
    const share = Math.max(0, (pixels.data[at] - 128) / 127);
    pixels.data.set([255, 110 + 120 * share, 20, 255 * share], at);
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png");
}
