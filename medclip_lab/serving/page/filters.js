// What an index can be asked: its fields become controls, and the controls conditions.

import { element, made } from "/page/view.js";

// Ids have a control of their own or none, and which image of a study it is tells nobody anything.
const UNSHOWN = ["study_id", "patient_id", "text", "image", "part"];
const title = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");
const range = (field) => `${field.lowest} to ${field.highest}`;

const POLICIES = { "fixed-k": "All that are found", ratio: "While near the best", calibrated: "By a calibration" };

export class Filters {
  constructor(changed) {
    this.changed = changed;
    this.index = null;
    this.controls = [];
    element("add-filter").addEventListener("click", () => this.addLabel().querySelector("select").focus());
    element("policy").addEventListener("change", () => this.policyChanged());
    element("options").addEventListener("input", () => this.count());
    element("reset").addEventListener("click", () => this.reset());
  }

  // Draws the controls of an index, as GET /v1/indexes tells of it.
  show(index) {
    this.index = index;
    this.controls = [];
    const kept = index.fields.filter((field) => !UNSHOWN.includes(field.name) && field.kind !== "label");
    element("fields").replaceChildren(...kept.flatMap((field) => this.control(field)));
    element("fields").hidden = !this.controls.length;
    this.labels = index.fields.filter((field) => field.kind === "label").map((field) => field.name);
    element("label-filters").hidden = !this.labels.length;
    element("label-rows").replaceChildren();
    const calibrations = index.calibrations.map((one) => new Option(`${POLICIES.calibrated}: ${one.name}`, `calibrated ${one.name}`));
    const others = index.policies.filter((name) => name !== "calibrated").map((name) => new Option(POLICIES[name] ?? name, name));
    element("policy").replaceChildren(...others, ...calibrations);
    this.reset();
  }

  control(field) {
    if (field.kind === "text") {
      if (!field.values || field.values.length < 2) return [];
      const select = made("select");
      select.append(new Option("any", ""), ...field.values.map((value) => new Option(value, value)));
      this.controls.push([select, () => (select.value ? [`${field.name}=${select.value}`] : [])]);
      return [this.named(title(field.name), select)];
    }
    const ends = [["from", ">=", field.lowest], ["to", "<=", field.highest]].map(([word, sign, end]) => {
      const input = made("input");
      input.type = field.kind === "date" ? "date" : "number";
      if (input.type === "number") input.step = "any";
      if (end !== null) input.placeholder = end;
      this.controls.push([input, () => (input.value ? [`${field.name}${sign}${input.value}`] : [])]);
      return this.named(word, input);
    });
    const group = made("fieldset", "ends");
    const legend = made("legend", "", title(field.name));
    if (field.lowest !== null) legend.title = range(field);
    group.append(legend, ...ends);
    return [group];
  }

  named(text, control) {
    const label = made("label", "", `${text} `);
    label.append(control);
    return label;
  }

  addLabel() {
    const row = element("filter-template").content.firstElementChild.cloneNode(true);
    row.querySelector(".which").append(...this.labels.map((name) => new Option(name.slice("labels.".length), name)));
    row.querySelector(".remove").addEventListener("click", () => {
      row.remove();
      element("add-filter").focus();
      this.count();
    });
    element("label-rows").append(row);
    this.count();
    return row;
  }

  policyChanged() {
    const [policy, name] = this.policy();
    element("ratio-line").hidden = policy !== "ratio";
    element("least-line").hidden = policy === "calibrated";
    const calibration = this.index.calibrations.find((one) => one.name === name);
    element("policy-note").hidden = !calibration;
    if (!calibration) return;
    const { risk, alpha, queries, holds_for } = calibration;
    element("policy-note").textContent = `Keeps the risk of a ${risk} under ${alpha}, on average over queries; by ${queries} patients. It holds for ${holds_for}.`;
    element("k").value = calibration.k;
  }

  policy() {
    const [policy, ...name] = element("policy").value.split(" ");
    return [policy, name.join(" ")];
  }

  conditions() {
    const labels = [...element("label-rows").children].map(
      (row) => `${row.querySelector(".which").value}=${row.querySelector(".state").value}`,
    );
    return [...this.controls.flatMap(([, written]) => written()), ...labels];
  }

  // What of a request says which answers are wanted, and how many.
  body() {
    const [policy, calibration] = this.policy();
    const number = (id) => (element(id).value === "" ? undefined : Number(element(id).value));
    const patient = element("not-patient").value.trim();
    const given = { where: this.conditions(), k: number("k") ?? 12, policy };
    if (patient) given.not_patient = patient;
    if (policy === "ratio") given.ratio = number("ratio");
    if (policy === "calibrated") given.calibration = calibration;
    else if (number("least") !== undefined) given.min_score = number("least");
    return given;
  }

  // How many things narrow the answers, beside the closed box of controls.
  count() {
    const chosen = this.conditions().length + ["least", "not-patient"].filter((id) => element(id).value.trim()).length + (element("policy").selectedIndex > 0 ? 1 : 0);
    element("active").hidden = !chosen;
    element("active").textContent = chosen ? `${chosen} set` : "";
    element("reset").disabled = !chosen;
  }

  reset() {
    for (const [control] of this.controls) control.value = "";
    element("label-rows").replaceChildren();
    for (const id of ["least", "not-patient"]) element(id).value = "";
    element("policy").selectedIndex = 0;
    element("k").value = 12;
    this.policyChanged();
    this.count();
  }
}
