"""The losses as pure functions, and the objective that puts them together."""
