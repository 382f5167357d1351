"use strict";
// The choice of rows in report.html of an evaluation: all, or those that got worse or better.

document.getElementById("show").addEventListener("change", (event) => {
  for (const row of document.querySelectorAll(".row"))
    row.hidden = event.target.value !== "all" && !row.classList.contains(event.target.value);
});
