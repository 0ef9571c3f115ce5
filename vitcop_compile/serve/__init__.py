"""A server: `scheduler` batches requests over static programs, `openai` speaks HTTP. Neither knows of Ray."""
