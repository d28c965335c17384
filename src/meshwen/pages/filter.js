// SPDX-License-Identifier: Apache-2.0
// Shows the answers of a kind (wrong, cut off, ...) that have a text in them. Without it, all stay.
"use strict";
{
  const bar = document.getElementById("filter");
  const [kind, words, shown] = ["kind", "words", "shown"].map((id) => document.getElementById(id));
  const answers = [...document.querySelectorAll("details.answer")];
  const texts = answers.map((one) => one.textContent.toLowerCase());
  const apply = () => {
    const text = words.value.toLowerCase();
    let count = 0;
    answers.forEach((one, at) => {
      const kinds = one.dataset.kinds.split(" ");
      const matches = kinds.includes(kind.value) && texts[at].includes(text);
      one.hidden = !matches;
      count += matches;
    });
    shown.textContent = `${count} of ${answers.length} shown`;
  };
  kind.addEventListener("change", apply);
  words.addEventListener("input", apply);
  bar.hidden = false;
  apply();
}
