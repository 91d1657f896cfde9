"""What Lectern measures and how it is shown: metric definitions, Prometheus rules, dashboards."""
