"use strict";
const at = (id) => document.getElementById(id);

function say(text) {
  at("state").textContent = text;
}

function summary(finding) {
  if (finding.reason) return "Not read: " + finding.message;
  if (!finding.verdict) return finding.facts.base + " · " + finding.no_prediction_reason;
  const { label, reason, confidence, answers } = finding.verdict;
  if (!label) return "The classifier abstains: " + reason;
  const others = Object.entries(answers).map(([task, one]) => task + ": " + (one.label ?? "abstains"));
  return [label + ", " + Math.round(100 * confidence) + " %", ...others].join(" · ");
}

async function judge(url, options, name) {
  at("result").hidden = true;
  say("Judging " + name + " …");
  try {
    const answer = await fetch(url, { method: "POST", ...options });
    const said = await answer.json();
    if (!answer.ok) {
      // A list is of what does not fit the description of the API: here only names of files can.
      const why = typeof said.detail === "string" ? said.detail : "expected hub:owner/name/file.safetensors, with @revision where wanted";
      say(name + ": " + why);
      return;
    }
    say(name);
    at("verdict").textContent = summary(said.finding);
    at("report").srcdoc = said.report;
    at("result").hidden = false;
  } catch (error) {
    say(name + ": no answer (" + error.message + ")");
  }
}

function upload(file) {
  if (file) judge("/v1/file?name=" + encodeURIComponent(file.name.slice(0, 200)), { body: file }, file.name);
}

at("file").addEventListener("change", () => upload(at("file").files[0]));
at("drop").addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
at("drop").addEventListener("dragleave", () => at("drop").classList.remove("over"));
at("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  upload(event.dataTransfer.files[0]);
});
at("hub").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = at("id").value.trim();
  const headers = { "Content-Type": "application/json" };
  judge("/v1/hub", { headers, body: JSON.stringify({ id }) }, id);
});
fetch("/v1/about").then((answer) => answer.json()).then((about) => {
  const model = about.classes.length
    ? about.classes.length + " classes of " + about.base + " adapters: " + about.classes.join(", ") + "."
    : "No classifier is loaded: files are described, not classified.";
  const known = about.known ? " Compared with " + about.known + " known adapters." : "";
  at("about").textContent = model + known + " Triage, never certification. Files up to " + about.max_mb + " MB; none is kept.";
});
