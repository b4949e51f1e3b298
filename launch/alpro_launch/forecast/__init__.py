"""What a run will take on machines that are not there yet; see docs/forecast.md."""
