const panel = document.getElementById("panel");
const tokens = [...document.querySelectorAll("#tokens a")];
const columns = [...document.querySelectorAll("#positions thead th")].map((cell) => cell.textContent);
let selected = null;

function show(token) {
  const list = document.createElement("dl");
  [...document.querySelector(token.hash).cells].forEach((cell, i) => {
    const pair = document.createElement("div");
    const name = document.createElement("dt");
    const value = document.createElement("dd");
    name.textContent = columns[i];
    value.append(...cell.cloneNode(true).childNodes);
    pair.append(name, value);
    list.append(pair);
  });
  panel.replaceChildren(list);
  panel.hidden = false;
}

function select(token) {
  selected?.classList.remove("selected");
  selected = token;
  token.classList.add("selected");
  show(token);
}

for (const [i, token] of tokens.entries()) {
  token.addEventListener("click", (event) => { event.preventDefault(); select(token); });
  token.addEventListener("focus", () => select(token));
  token.addEventListener("mouseenter", () => show(token));
  token.addEventListener("mouseleave", () => { if (selected) show(selected); });
  token.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) { event.preventDefault(); tokens[i + step]?.focus(); }
  });
}
