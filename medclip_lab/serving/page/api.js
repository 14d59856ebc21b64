// Asks the service; every refusal becomes a Refusal with the service's own words.

let key = null;

export class Refusal extends Error {
  constructor(status, title, detail, id) {
    super(detail);
    Object.assign(this, { status, title, id });
  }
}

export function useKey(value) {
  key = value;
}

async function answered(path, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The service does not answer", "It was stopped, or the connection is gone: try again.", null);
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  const { title = `HTTP ${response.status}`, detail = "The answer cannot be read.", request_id = null } = body ?? {};
  throw new Refusal(response.status, title, detail, request_id);
}

export const get = (path) => answered(path, {});

export const post = (path, body, signal) =>
  answered(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

// The bytes of a file as base64, read by the browser off the page's own thread.
export const base64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refusal(0, "The file cannot be read", "Choose it again.", null));
    reader.readAsDataURL(file);
  });
