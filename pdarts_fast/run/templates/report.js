(() => {
  "use strict";
  const status = document.getElementById("copied");

  const copyByHand = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser does not allow copying");
  };

  const copy = async (button) => {
    const text = document.getElementById(button.dataset.copy).textContent;
    const label = button.firstChild;
    try {
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        copyByHand(text);
      }
      label.data = "Copied";
      status.textContent = "Copied";
    } catch {
      label.data = "Press Ctrl+C";
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
    }
    setTimeout(() => { label.data = "Copy"; status.textContent = ""; }, 2000);
  };

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }

  const keys = [...document.querySelectorAll(".legend button")];
  const follow = (op) => {
    for (const line of document.querySelectorAll("#alphas .line")) {
      line.classList.toggle("faded", op !== null && line.dataset.op !== op);
    }
    for (const key of keys) key.setAttribute("aria-pressed", String(key.dataset.key === op));
  };
  for (const key of keys) {
    key.addEventListener("click", () => {
      follow(key.getAttribute("aria-pressed") === "true" ? null : key.dataset.key);
    });
  }
})();
