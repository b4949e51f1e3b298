"""The prompter: soft labels for PEM from a frozen dual encoder, in its own process beside each rank."""
