// Cases of an index: by an image, by words, or like another case; with small pictures where the key allows them.

import { get, post } from "/page/api.js";
import { Filters } from "/page/filters.js";
import { element, made, status } from "/page/view.js";

export class Cases {
  constructor(attempt, image) {
    this.attempt = attempt;
    this.image = image;
    this.indexes = [];
    this.running = null;
    this.filters = new Filters();
    element("index").addEventListener("change", () => this.choose());
    element("similar").addEventListener("click", () => attempt(() => this.similar()));
    element("search").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = element("query").value.trim();
      if (text) attempt(() => this.ask({ text }, `\u201c${text}\u201d`));
      else element("query").focus();
    });
  }

  async start(models) {
    this.scopes = models.scopes;
    this.most = models.limits.max_images;
    this.indexes = models.indexes.length && models.scopes.includes("search") ? await get("/v1/indexes") : [];
    element("cases").hidden = !this.indexes.length;
    if (!this.indexes.length) return;
    element("index").replaceChildren(...this.indexes.map((index) => new Option(`${index.name} (${index.size})`, index.name)));
    element("index-line").hidden = this.indexes.length < 2;
    this.choose();
  }

  choose() {
    const index = (this.index = this.indexes.find((one) => one.name === element("index").value));
    element("router-line").hidden = !index.domains.length;
    element("router-domain").replaceChildren(new Option("by the image", ""), ...index.domains.map((name) => new Option(name, name)));
    element("text-line").hidden = !(index.text_included && this.scopes.includes("text"));
    element("with-text").checked = false;
    this.filters.show(index);
  }

  similar() {
    return this.ask({ image: this.image() }, "this image");
  }

  async ask(query, what) {
    this.running?.abort();
    const running = (this.running = new AbortController());
    status("Searching ...");
    element("hits").classList.add("stale");
    const body = { ...query, index: this.index.name, include_text: element("with-text").checked, ...this.filters.body() };
    const domain = element("router-domain").value;
    if (this.index.domains.length && domain && !body.domain) body.domain = domain;
    // A row asks for others: its own patient is left out, as they say no more than it does.
    if (query.id !== undefined) {
      body.other_patients = true;
      delete body.not_patient;
    }
    try {
      this.show(await post("/v1/search", body, running.signal), what, body.k);
    } finally {
      if (this.running === running) element("hits").classList.remove("stale");
    }
    status("");
    await this.pictures(running.signal);
  }

  show(answer, what, k) {
    const { name, size, domain } = answer.index;
    this.domain = domain;
    const place = domain ? `${domain} of ${name}` : name;
    const nearest = answer.hits.length === 1 ? "The case" : `The ${answer.hits.length} cases`;
    const fewer = answer.hits.length < k ? " No others meet what was asked." : "";
    element("cases-note").textContent = answer.hits.length
      ? `${nearest} nearest to ${what}, of ${size} in ${place}. The number is the cosine.${fewer}`
      : `No case in ${place} meets what was asked of it: loosen a filter.`;
    const pictured = this.index.thumbnails && this.scopes.includes("thumbnails");
    element("hits").classList.toggle("pictured", pictured);
    element("hits").replaceChildren(...answer.hits.map((hit) => this.hit(hit, pictured)));
  }

  hit(hit, pictured) {
    const row = made("li", "hit");
    row.dataset.id = hit.id;
    if (pictured) row.append(made("div", "thumb"));
    const text = made("div", "said");
    const head = made("p", "head");
    head.append(made("span", "rank", hit.rank), made("span", "study", hit.study_id), made("span", "cosine", hit.score.toFixed(3).replace("-", "\u2212")));
    text.append(head);
    const more = Object.entries(hit.fields).filter(([, value]) => value !== null && typeof value !== "object");
    const shown = more.filter(([field]) => field !== "image" && field !== "split");
    const said = made("p", "more");
    said.append(...shown.map(([field, value]) => made("span", "", `${field.replaceAll("_", " ")} ${value}`)));
    if (shown.length) text.append(said);
    const present = Object.entries(hit.fields.labels ?? {}).filter(([, state]) => state === 1).map(([label]) => label);
    if (present.length) {
      const labels = made("ul", "chips");
      labels.append(...present.map((label) => made("li", "", label)));
      text.append(labels);
    }
    if (hit.text) text.append(made("p", "report", hit.text));
    const like = made("button", "like", "More like this");
    like.type = "button";
    like.setAttribute("aria-label", `More cases like ${hit.study_id}`);
    like.addEventListener("click", () =>
      this.attempt(() => this.ask({ id: hit.id, ...(this.domain ? { domain: this.domain } : {}) }, `study ${hit.study_id}, of other patients`)),
    );
    text.append(like);
    row.append(text);
    return row;
  }

  // Pictures come after the cases, into places that are already there.
  async pictures(signal) {
    const places = [...element("hits").querySelectorAll(".thumb")];
    for (let start = 0; start < places.length; start += this.most) {
      const some = places.slice(start, start + this.most);
      const ids = some.map((place) => Number(place.parentNode.dataset.id));
      const answer = await post("/v1/thumbnails", { ids, index: this.index.name, ...(this.domain ? { domain: this.domain } : {}) }, signal);
      answer.thumbnails.forEach(({ image }, at) => {
        if (!image) return some[at].replaceChildren(made("span", "muted small", "no image"));
        const picture = made("img");
        picture.alt = `Study ${some[at].parentNode.querySelector(".study").textContent}`;
        picture.src = `data:image/jpeg;base64,${image}`;
        some[at].replaceChildren(picture);
      });
    }
  }

  forget() {
    this.running?.abort();
    element("hits").replaceChildren();
    element("cases-note").textContent = "The nearest cases of the index, by an image or by words.";
  }
}
