export default function ({ data }) {
  if (data.target === "/login" || data.target === "/password") {
    window.location.replace(data.target);
  }
}
