// The labels an image is judged by: a set of the bundle, or an edited copy of one.

import { element } from "/page/view.js";

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

export class Labels {
  constructor(changed) {
    this.changed = changed;
    this.sets = [];
    this.own = false;
    element("labelset").addEventListener("change", () => this.choose());
    element("edit").addEventListener("click", () => this.edit());
    element("add").addEventListener("click", () => this.add({ name: "", positive: [], negative: [] }, true));
    element("exclusive").addEventListener("change", () => this.changed());
  }

  fill(sets) {
    this.sets = sets;
    element("labelset").replaceChildren(...sets.map((set) => new Option(`${set.name} (${set.labels.length})`, set.name, set.default, set.default)));
    element("edit").disabled = !sets.length;
    if (!sets.length) this.edit();
  }

  chosen() {
    return this.sets.find((set) => set.name === element("labelset").value);
  }

  choose() {
    this.own = false;
    element("labels").replaceChildren();
    element("add").hidden = true;
    this.changed();
  }

  edit() {
    this.own = true;
    element("labels").replaceChildren();
    element("add").hidden = false;
    for (const label of this.chosen()?.labels ?? []) this.add(label, false);
    element("labels").querySelector("input")?.focus();
    this.changed();
  }

  add(label, focus) {
    const row = element("label-template").content.firstElementChild.cloneNode(true);
    row.querySelector(".label-name").value = label.name;
    row.querySelector(".positive").value = label.positive.join("\n");
    row.querySelector(".negative").value = label.negative.join("\n");
    row.addEventListener("input", () => this.changed());
    row.querySelector(".remove").addEventListener("click", () => {
      const next = row.nextElementSibling?.querySelector("input") ?? element("add");
      row.remove();
      next.focus();
      this.changed();
    });
    element("labels").append(row);
    if (focus) row.querySelector("input").focus();
  }

  // What of a request says by which labels; null while no label has a name.
  body() {
    const multi_label = !element("exclusive").checked;
    if (!this.own) return { labelset: this.chosen()?.name, multi_label };
    const candidate_labels = [...element("labels").children]
      .map((row) => ({
        name: row.querySelector(".label-name").value.trim(),
        positive: lines(row.querySelector(".positive").value),
        negative: lines(row.querySelector(".negative").value),
      }))
      .filter((label) => label.name)
      // Without sentences of its own a label is asked about by the service's templates.
      .map((label) => (label.positive.length ? label : label.name));
    return candidate_labels.length ? { candidate_labels, multi_label } : null;
  }

  // What to draw a map for: the prompts of a label that is shown.
  prompts(name) {
    if (!this.own) return { labelset: this.chosen()?.name, label: name };
    const label = this.body()?.candidate_labels.find((one) => (one.name ?? one) === name);
    return label?.positive ? { positive: label.positive, negative: label.negative } : { positive: [`${name}.`], negative: [] };
  }
}
