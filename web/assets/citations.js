// A citation in an answer is a link to #cite-MESSAGE-n. Its click is reported to the script and
// goes no further, so the address stays as it is.
export default function ({ setTriggerValue }) {
  const listen = (event) => {
    const link = event.target.closest?.('a[href*="#cite-"]');
    if (!link) return;
    event.preventDefault();
    event.stopPropagation();
    setTriggerValue("open", link.getAttribute("href").split("#cite-")[1]);
  };
  document.addEventListener("click", listen, true);
  return () => document.removeEventListener("click", listen, true);
}
