// Before the first paint, so that who chose dark never sees a white flash.
const chosen = localStorage.getItem('kiss-vdb-theme');
if (chosen === 'light' || chosen === 'dark') document.documentElement.dataset.theme = chosen;
