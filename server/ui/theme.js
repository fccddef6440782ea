// Runs before the first paint, so that no page flashes in the wrong colours: "light", "dark", or the system's scheme.
const chosen = (() => {
  try { return localStorage.getItem('lensrack.theme'); } catch { return null; }
})();
if (chosen) document.documentElement.dataset.theme = chosen;
