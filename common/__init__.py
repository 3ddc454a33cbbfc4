"""What every folder needs and nothing of the project is needed for: errors, files, flags, running a script."""
