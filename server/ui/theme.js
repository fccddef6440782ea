// Before the first paint, so that no page flashes in the wrong colours: "light", "dark", or as the system has it.
const chosen = (() => {
  try { return localStorage.getItem('lensrack.theme'); } catch { return null; }
})();
if (chosen) document.documentElement.dataset.theme = chosen;
