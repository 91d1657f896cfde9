"""The one script that Streamlit runs; it lives alone so that its folder adds no module names."""
