"""The model: architecture, attention, cache. Knows neither losses nor data."""
